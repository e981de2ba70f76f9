"""How the images of a labelled data set are to be prepared for a pre-trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..transfer.preparation import CT_NORMALIZATION, difference_in_intensities
from .source import PretrainedSource

HOUNSFIELD_SCHEMES = ("CTNormalization", "CTWindow01Normalization")
"""Normalization schemes that take images for CT in Hounsfield units."""


@dataclass(frozen=True)
class Normalization:
    """Per channel: nnU-Net's scheme and whether it uses the nonzero mask; the intensities; remarks for the user."""

    schemes: list[str]
    use_mask: list[bool]
    intensities: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def match_normalization(
    source: PretrainedSource,
    channel_names: Sequence[str],
    default: Normalization,
    choice: str,
) -> Normalization:
    """Normalization of the target's channels.

    Args:
        source: the checkpoint.
        channel_names: of the target.
        default: what nnU-Net would do with the target.
        choice: ``pretrained`` or ``default``.

    Raises:
        ValueError: if the pre-trained normalization takes values for Hounsfield units that are none.
    """
    notes = []
    count, before = len(channel_names), source.input_channels
    if count != before:
        notes.append(
            f"the checkpoint has {before} input channel(s) ({_names(source.channel_names)}), the target {count} "
            f"({_names(channel_names)}): the first convolution is adapted; finetuning.adapt_channels chooses how"
        )
    if choice == "default":
        if default.schemes != list(source.normalization_schemes):
            notes.append(
                f"images are normalised by {_names(default.schemes)}, in pre-training by "
                f"{_names(source.normalization_schemes) or 'something the checkpoint does not tell'}"
            )
        for channel, scheme in enumerate(default.schemes):
            properties = (source.intensities.get(str(channel)), default.intensities.get(str(channel)))
            if scheme == CT_NORMALIZATION and (said := difference_in_intensities(*properties)):
                notes.append(f"channel {channel_names[channel]}: {said}")
        return Normalization(default.schemes, default.use_mask, default.intensities, notes)
    if not source.normalization_schemes:
        notes.append("the checkpoint does not tell its normalization: nnU-Net's for the target is planned")
        return Normalization(default.schemes, default.use_mask, default.intensities, notes)
    if count == before:
        picked = list(range(count))
    elif len(set(source.normalization_schemes)) == 1:
        picked = [0] * count
    else:
        notes.append(
            f"the checkpoint's channels were normalised in several ways ({_names(source.normalization_schemes)}), "
            f"which does not tell what to do with {count}: nnU-Net's normalization is planned"
        )
        return Normalization(default.schemes, default.use_mask, default.intensities, notes)
    schemes = [source.normalization_schemes[index] for index in picked]
    wrong = [
        name for name, ours, theirs in zip(channel_names, schemes, default.schemes)
        if ours in HOUNSFIELD_SCHEMES and theirs not in HOUNSFIELD_SCHEMES
    ]
    if wrong:
        raise ValueError(
            f"{source.file.path} was pre-trained on CT ({_names(schemes)} of Hounsfield units), but the target's "
            f"channel(s) {_names(wrong)} are not CT; use --normalization default to normalise them nnU-Net's way, "
            f"or call them CT in dataset.json if they are."
        )
    for name, ours, theirs in zip(channel_names, schemes, default.schemes):
        if ours != theirs and theirs in HOUNSFIELD_SCHEMES and ours not in HOUNSFIELD_SCHEMES:
            notes.append(f"channel {name} is CT but is normalised by {ours}, as in pre-training")
    masks = [source.use_mask_for_norm[i] if i < len(source.use_mask_for_norm) else False for i in picked]
    intensities = dict(default.intensities)
    for channel, index in enumerate(picked):
        if isinstance(source.intensities.get(str(index)), Mapping):
            intensities[str(channel)] = dict(source.intensities[str(index)])
    return Normalization(schemes, masks, intensities, notes)


def match_axes(
    source: PretrainedSource, target_forward: Sequence[int], native_spacing: Sequence[float], aniso_threshold: float
) -> tuple[list[int], list[str]]:
    """Which axis of the target's images is stored first: the checkpoint's, unless slices lie along another one.

    Args:
        source: the checkpoint, with a spacing.
        target_forward: what nnU-Net would do with the target.
        native_spacing: the target's median, mm, in the order images are read.
        aniso_threshold: from this ratio of spacings on, images consist of slices.

    Returns:
        ``transpose_forward`` and remarks.
    """
    spacing = source.spacing or (1.0, 1.0, 1.0)
    theirs, ours = list(source.transpose_forward), list(target_forward)
    finest = sorted(native_spacing)[1]
    sliced = max(native_spacing) > aniso_threshold * finest
    trained_on_slices = max(spacing) > aniso_threshold * min(spacing)
    if theirs != ours and sliced and trained_on_slices:
        return ours, [
            f"the target's slices lie along axis {ours[0]}, those of pre-training along axis {theirs[0]}: the target's "
            f"axes are reordered so that the network meets its slices where it learnt them"
        ]
    return theirs, []


def _names(values: Sequence[str]) -> str:
    return ", ".join(values)
