"""Steps whose loss is not finite: the batch is kept for a look at it, and too many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MAX_STORED = 10


class NonFiniteGuard:
    """Counts steps in a row without a finite loss.

    Args:
        folder: where batches are stored, the first ten of a run and process.
        limit: steps in a row that end the run.
        log: takes a line.
    """

    def __init__(self, folder: Path, limit: int, log: Callable[[str], None]):
        self.folder = folder
        self.limit = limit
        self.log = log
        self.in_a_row = 0

    def report(self, batch: Mapping[str, Any], epoch: int, step: int, loss: float, rank: int) -> None:
        """Stores a batch and says so.

        Writes ``step_N_rank_R.json`` (what to make the batch from) and ``.pt`` (``data`` and ``visible``).

        Args:
            batch: see :meth:`nnunetv2_hyspark.data.loader.CropBatches.__getitem__`.
            epoch: from 0.
            step: optimizer step, from 0.
            loss: what came out.
            rank: of this process.
        """
        self.in_a_row += 1
        path = self.folder / f"step_{step:08d}_rank_{rank}.json"
        record = {
            "epoch": epoch,
            "step": step,
            "loss": str(loss),
            "samples": [
                {"case": case, "corner": list(corner), "flipped_axes": list(flips), "mask_seed": seed}
                for case, corner, flips, seed in zip(
                    batch["keys"], batch["corners"], batch["flips"], batch["mask_seeds"]
                )
            ],
        }
        where = "its batch is not stored, the first ten are"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if len(list(self.folder.glob(f"*_rank_{rank}.json"))) < MAX_STORED:
                path.write_text(json.dumps(record, indent=2))
                torch.save({"data": batch["data"].cpu(), "visible": batch["visible"].cpu()}, path.with_suffix(".pt"))
                where = f"its batch is in {path}"
        except OSError as error:
            where = f"its batch could not be stored ({error})"
        self.log(f"WARNING: the loss of step {step} is {loss}; the step is skipped, {where}.")

    def passed(self) -> None:
        """A step had a finite loss."""
        self.in_a_row = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run should end."""
        return self.in_a_row >= self.limit
