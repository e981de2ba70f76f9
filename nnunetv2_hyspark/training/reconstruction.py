"""One masked crop, reconstructed: what validation, previews and ``hyspark reconstruct`` share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..geometry import as_size3
from ..masking import upsample_mask
from ..pretext.hyspark import HySparK, denormalise, reconstruction_loss


@dataclass(frozen=True)
class Reconstruction:
    """A crop and what the network made of it, in preprocessed intensities.

    Attributes:
        image: float32 ``(C, D, H, W)``.
        visible: boolean ``(D, H, W)``, what the encoder saw.
        restored: the image with its hidden cells reconstructed; by a network whose target is normalised per cell, each
            with its own true mean and deviation.
        loss: see :func:`nnunetv2_hyspark.pretext.hyspark.reconstruction_loss`.
    """

    image: np.ndarray
    visible: np.ndarray
    restored: np.ndarray
    loss: float

    @property
    def masked_mae(self) -> float:
        """Mean absolute error on hidden voxels."""
        return float(np.abs(self.restored - self.image)[:, ~self.visible].mean())


@torch.no_grad()
def reconstruct(
    network: HySparK, crop: np.ndarray, mask_ratio: float, seed: int, device: torch.device
) -> Reconstruction:
    """Masks a crop and reconstructs it.

    Args:
        network: in evaluation mode.
        crop: float32 ``(C, D, H, W)``, edges divisible by the junction's stride.
        mask_ratio: fraction of hidden cells.
        seed: of the mask.
        device: where to compute.
    """
    image = torch.from_numpy(np.ascontiguousarray(crop, dtype=np.float32))[None].to(device)
    generator = torch.Generator().manual_seed(seed)
    visible = network.draw_mask(1, as_size3(image.shape[2:]), mask_ratio, generator).to(device)
    prediction = network(image, visible)
    return Reconstruction(
        image[0].cpu().numpy(),
        upsample_mask(visible, network.encoder.junction_stride)[0, 0].cpu().numpy(),
        denormalise(image, prediction, visible, network.target)[0].float().cpu().numpy(),
        reconstruction_loss(image, prediction, visible, network.target).item(),
    )
