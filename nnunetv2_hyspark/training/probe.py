"""A linear probe: how much of a segmentation can be read off the frozen encoder's features."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch.nn import functional as F

from ..geometry import Size3
from ..networks.encoder import HybridEncoder
from .previews import spread_evenly

VOXELS_PER_CASE = 4096
CLASS_SHARE = 0.5
PENALTY = 1e-3
ITERATIONS = 60


@dataclass(frozen=True)
class LabelledCrop:
    """A crop around the foreground: float32 ``(1, C, D, H, W)``, int64 labels ``(D, H, W)``; -1 counts nowhere."""

    name: str
    image: torch.Tensor
    labels: torch.Tensor


def load_labelled_crops(
    dataset: int, data_identifier: str, patch_size: Size3, channels: int, count: int
) -> list[LabelledCrop]:
    """Reads crops of cases that are evenly spread over a preprocessed data set.

    Args:
        dataset: its number.
        data_identifier: folder of the preprocessed configuration.
        patch_size: voxels per axis.
        channels: that the encoder takes.
        count: how many cases.

    Raises:
        ValueError: if there is no such data set, or it is not preprocessed for this configuration, has other channels
            or too few cases.
    """
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except RuntimeError as error:
        raise ValueError(
            f"probe_dataset is {dataset}, but there is no such data set ({' '.join(str(error).split())}); give the "
            f"number of one that is preprocessed."
        ) from None
    folder = Path(os.path.join(nnUNet_preprocessed, name, data_identifier))
    if not folder.is_dir():
        raise ValueError(
            f"probe_dataset is {dataset}, but there is no folder {folder}; preprocess that data set with the same "
            f"plans name and configuration."
        )
    dataset_class = infer_dataset_class(str(folder))
    names = dataset_class.get_identifiers(str(folder))
    if len(names) < 2:
        raise ValueError(f"{name} has {len(names)} case(s) for the probe; expected two or more, one to test it.")
    chosen = spread_evenly(names, count)
    cases = dataset_class(str(folder), chosen)
    # nnU-Net's reserved name for voxels without annotation
    ignored = json.loads((folder.parent / "dataset.json").read_text())["labels"].get("ignore")
    crops = []
    for case in chosen:
        image, labels = (np.asarray(part[:]) for part in cases.load_case(case)[:2])
        if image.shape[0] != channels:
            raise ValueError(
                f"{name} has {image.shape[0]} channel(s), the encoder takes {channels}; probe with a data set of the "
                f"same channels."
            )
        labels = labels[0].astype(np.int64)
        labels[labels < 0] = 0
        foreground = np.argwhere((labels > 0) & (labels != ignored))
        middle = foreground.mean(0) if len(foreground) else np.array(labels.shape) / 2
        if ignored is not None:
            labels[labels == ignored] = -1
        corner = [
            int(np.clip(round(m - edge / 2), min(0, extent - edge), max(0, extent - edge)))
            for m, edge, extent in zip(middle, patch_size, labels.shape)
        ]
        crops.append(
            LabelledCrop(
                case,
                torch.from_numpy(_cut(image, corner, patch_size, 0).astype(np.float32))[None],
                torch.from_numpy(_cut(labels[None], corner, patch_size, -1)[0].copy()),
            )
        )
    return crops


def _cut(array: np.ndarray, corner: Sequence[int], size: Size3, fill: int) -> np.ndarray:
    """A box of an array ``(C, D, H, W)``; ``fill`` where it reaches over the edge."""
    result = np.full((array.shape[0], *size), fill, dtype=array.dtype)
    inside, outside = [slice(None)], [slice(None)]
    for start, edge, extent in zip(corner, size, array.shape[1:]):
        low, high = max(start, 0), min(start + edge, extent)
        outside.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    result[tuple(inside)] = array[tuple(outside)]
    return result


class LinearProbe:
    """Fits one 1x1x1 convolution on the encoder's up-sampled, concatenated features, and tests it on other cases.

    Deterministic, and without a trace: it draws from generators of its own, computes no gradient for the encoder, and
    leaves the encoder's mode as it was.

    Args:
        crops: cases in turn for fitting and for testing.
        device: where to compute.
    """

    def __init__(self, crops: Sequence[LabelledCrop], device: torch.device):
        self.fitted_on = list(crops)[0::2]
        self.tested_on = list(crops)[1::2]
        self.device = device
        self.classes = sorted({int(c) for crop in crops for c in crop.labels.unique() if c >= 0} | {0})

    def score(self, encoder: HybridEncoder) -> float:
        """Mean Dice over the foreground classes of the test crops, [0, 1]; NaN if these have none."""
        was_training = encoder.training
        encoder.eval()
        try:
            weight, bias = self._fit(encoder)
            return self._dice(encoder, weight, bias)
        finally:
            encoder.train(was_training)

    @torch.no_grad()
    def _features(self, encoder: HybridEncoder, crop: LabelledCrop) -> list[torch.Tensor]:
        return [feature.float() for feature in encoder(crop.image.to(self.device))]

    def _fit(self, encoder: HybridEncoder) -> tuple[torch.Tensor, torch.Tensor]:
        rows, targets = [], []
        for number, crop in enumerate(self.fitted_on):
            points, classes = self._draw_voxels(crop, number)
            sampled = [_at_points(feature, points.to(self.device), crop) for feature in self._features(encoder, crop)]
            rows.append(torch.cat(sampled, dim=1))
            targets.append(classes.to(self.device))
        x, y = torch.cat(rows), torch.cat(targets)
        mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
        x = (x - mean) / deviation
        with torch.enable_grad():
            weight = torch.zeros(len(self.classes), x.shape[1], device=self.device, requires_grad=True)
            bias = torch.zeros(len(self.classes), device=self.device, requires_grad=True)
            optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

            def loss() -> torch.Tensor:
                optimizer.zero_grad()
                value = F.cross_entropy(x @ weight.T + bias, y) + PENALTY * weight.square().sum()
                value.backward()
                return value

            optimizer.step(loss)
        scaled = weight.detach() / deviation
        return scaled, bias.detach() - scaled @ mean

    def _draw_voxels(self, crop: LabelledCrop, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxel indices ``(N, 3)`` and class positions ``(N,)``: half of the voxels foreground, if there is so much."""
        rng = np.random.default_rng((0, number))
        labels = crop.labels.numpy()
        chosen = []
        for voxels, share in ((np.argwhere(labels > 0), CLASS_SHARE), (np.argwhere(labels == 0), 1 - CLASS_SHARE)):
            count = min(int(VOXELS_PER_CASE * share), len(voxels))
            chosen.append(voxels[np.sort(rng.choice(len(voxels), count, replace=False))])
        points = np.concatenate(chosen)
        classes = np.searchsorted(self.classes, labels[tuple(points.T)])
        return torch.from_numpy(points), torch.from_numpy(classes)

    @torch.no_grad()
    def _dice(self, encoder: HybridEncoder, weight: torch.Tensor, bias: torch.Tensor) -> float:
        overlap, total = torch.zeros(len(self.classes)), torch.zeros(len(self.classes))
        for crop in self.tested_on:
            logits, first = torch.zeros(1, device=self.device), 0
            for feature in self._features(encoder, crop):
                part = weight[:, first : first + feature.shape[1]]
                first += feature.shape[1]
                # a 1x1x1 convolution and up-sampling commute; this order needs little memory
                low = torch.einsum("kc,bcdhw->bkdhw", part, feature)
                logits = logits + F.interpolate(low, crop.labels.shape, mode="trilinear", align_corners=False)
            predicted = (logits[0] + bias[:, None, None, None]).argmax(0).cpu()
            counted = crop.labels >= 0
            for position, label in enumerate(self.classes):
                found, true = (predicted == position) & counted, crop.labels == label
                overlap[position] += 2 * (found & true).sum()
                total[position] += found.sum() + true.sum()
        present = total[1:] > 0
        return float((overlap[1:][present] / total[1:][present]).mean()) if present.any() else float("nan")


def _at_points(feature: torch.Tensor, points: torch.Tensor, crop: LabelledCrop) -> torch.Tensor:
    """Features ``(N, C)`` at voxels, interpolated as ``F.interpolate(mode="trilinear")`` would."""
    size = torch.tensor(crop.labels.shape, device=points.device)
    normalised = (2 * points + 1) / size - 1
    grid = normalised.flip(1).to(feature.dtype).view(1, -1, 1, 1, 3)
    sampled = F.grid_sample(feature, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0, :, :, 0, 0].T
