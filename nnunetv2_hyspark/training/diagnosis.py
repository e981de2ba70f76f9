"""Signs of trouble, said in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..geometry import as_size3
from ..pretext.hyspark import HySparK, patchify

WINDOW = 20
MIN_IMPROVEMENT = 0.002
MIN_RATE = 0.05
MIN_DEVIATION = 0.05
MIN_RANK = 3.0
MAX_CLIPPED = 0.9
MAX_BACKGROUND = 0.3
MAX_WAITING = 0.3


def effective_rank(tokens: torch.Tensor) -> float:
    """Along how many directions tokens vary: exp of the entropy of their normalised singular values.

    Args:
        tokens: ``(N, C)``.

    Returns:
        Between 1 (all on a line) and ``min(N - 1, C)``; NaN if they hold NaN or infinite values; 1 if all are equal.
    """
    centred = tokens.float() - tokens.float().mean(0)
    if not torch.isfinite(centred).all():
        return math.nan
    singular = torch.linalg.svdvals(centred.cpu())
    total = singular.sum()
    if total <= 0:
        return 1.0
    share = singular / total
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


@torch.no_grad()
def representation_health(
    network: HySparK, image: torch.Tensor, visible: torch.Tensor
) -> tuple[float, float]:
    """Effective rank of a batch's tokens, and standard deviation of the prediction inside masked cells.

    Args:
        network: in evaluation mode.
        image: ``(B, C, D, H, W)``.
        visible: boolean ``(B, g0, g1, g2)``.
    """
    layout = network.lay_out(visible)
    features = network.encode(image, layout)
    tokens, _, padding = layout.to_tokens(features[-1])
    rows = tokens.flatten(0, 1) if padding is None else tokens[~padding]
    prediction = network.reconstruction(features, layout)
    cells = patchify(prediction.float(), as_size3(network.encoder.junction_stride))[~visible]
    return effective_rank(rows), cells.std(-1).mean().item()


def signs_of_trouble(log: Mapping[str, Sequence[float]], peak_rate: float) -> dict[str, str]:
    """What the last twenty epochs of a log suggest, as sentences under short names; empty if all is well.

    Args:
        log: see :class:`nnunetv2_hyspark.training.progress.PretrainingLog`.
        peak_rate: of the learning-rate schedule.
    """
    recent = {key: np.asarray(values[-WINDOW:], dtype=float) for key, values in log.items()}
    if len(recent["train_losses"]) < WINDOW:
        return {}
    signs = {}
    losses = recent["train_losses"]
    earlier, later = np.nanmean(losses[: WINDOW // 2]), np.nanmean(losses[WINDOW // 2 :])
    is_training = np.nanmean(recent["lrs"]) > MIN_RATE * peak_rate
    if is_training and abs(earlier - later) < MIN_IMPROVEMENT * earlier:
        guess = (
            "it predicts each cell's mean and nothing else; check intensities and learning rate"
            if later > 0.97
            else "either it has converged or the learning rate is unsuitable"
        )
        signs["flat"] = f"the training loss has been flat at {later:.4f} for {WINDOW} epochs: {guess}."
    elif is_training and later > 1.05 * earlier:
        signs["rising"] = f"the training loss rises ({earlier:.4f} to {later:.4f}); lower learning_rate."
    deviation = _last(recent["reconstruction_deviation"])
    if deviation < MIN_DEVIATION:
        signs["constant"] = (
            f"reconstructions are constant inside cells (deviation {deviation:.3f}, the targets' is 1): nothing but "
            f"the mean is predicted."
        )
    rank = _last(recent["effective_rank"])
    if rank < MIN_RANK:
        signs["collapsed"] = (
            f"the tokens have collapsed to {rank:.1f} effective dimensions; lower learning_rate or mask_ratio."
        )
    clipped = np.nanmean(recent["clipped_steps"])
    if clipped > MAX_CLIPPED:
        signs["clipped"] = (
            f"{clipped:.0%} of the steps of the last {WINDOW} epochs were clipped; raise gradient_clip or lower "
            f"learning_rate."
        )
    background = np.nanmean(recent["background_crops"])
    if background > MAX_BACKGROUND:
        signs["background"] = (
            f"{background:.0%} of the crops hold background only; make the data set with hyspark prepare, whose mask "
            f"steers crops to the body, or raise foreground_fraction."
        )
    waiting = np.nanmean(recent["waiting_for_data"])
    if waiting > MAX_WAITING:
        signs["waiting"] = (
            f"{waiting:.0%} of the time is spent waiting for data; use more workers (nnUNet_n_proc_DA) or a faster "
            f"disk."
        )
    return signs


def new_signs(log: Mapping[str, Sequence[float]], peak_rate: float) -> list[str]:
    """Sentences that were not yet true one epoch ago, so that each is said once."""
    before = signs_of_trouble({key: values[:-1] for key, values in log.items()}, peak_rate)
    return [sentence for name, sentence in signs_of_trouble(log, peak_rate).items() if name not in before]


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.inf
