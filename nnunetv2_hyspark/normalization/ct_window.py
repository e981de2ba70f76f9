"""Intensity normalization of CT by a fixed window."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization


class CTWindow01Normalization(ImageNormalization):
    """Clips CT to [-175, 250] HU and scales it to [0, 1], as HySparK's paper and Swin UNETR do.

    Looks at no statistics of the data set, so images of any source are treated alike.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False
    window: ClassVar[tuple[float, float]] = (-175.0, 250.0)

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """HU of any shape and type to values from 0 to 1 in the target type; ``seg`` is not used."""
        low, high = self.window
        image = image.astype(self.target_dtype, copy=False)
        np.clip(image, low, high, out=image)
        image -= low
        image /= high - low
        return image
