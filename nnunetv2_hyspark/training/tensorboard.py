"""TensorBoard as one more of nnU-Net's loggers."""

from __future__ import annotations

import json
import math
import os
from typing import Any


class TensorBoardLogger:
    """Has the methods of nnU-Net's WandbLogger.

    Args:
        output_folder: of the run; files go to its ``tensorboard`` folder.

    Raises:
        RuntimeError: if TensorBoard is not installed.
    """

    def __init__(self, output_folder: str | os.PathLike[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError(
                "tensorboard=true is set, but TensorBoard is not installed; run: pip install "
                "tensorboard, or set tensorboard=false."
            ) from None
        self._writer = SummaryWriter(os.path.join(output_folder, "tensorboard"))

    def update_config(self, config: dict[str, Any]) -> None:
        """Writes settings as text."""
        for name, value in config.items():
            self._writer.add_text(name, f"```\n{json.dumps(value, indent=2, default=str)}\n```")

    def log(self, key: str, value: Any, step: int) -> None:
        """Writes a number of an epoch; times of day and NaN are left out."""
        if isinstance(value, (int, float)) and math.isfinite(value) and not key.endswith("_timestamps"):
            self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def log_summary(self, key: str, value: Any) -> None:
        """Writes a number of the whole run."""
        if isinstance(value, (int, float)) and math.isfinite(value):
            self._writer.add_scalar(key, value, 0)
            self._writer.flush()
