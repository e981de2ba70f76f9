"""Loading pre-trained weights into a network: all of the encoder, or nothing and the reason."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..geometry import as_size3
from .adaptation import adapt_channels, adapt_kernel
from .description import as_mapping, description_of
from .official import is_official
from .reading import ENCODER, image_weight, network_weights, read_checkpoint
from .report import Entry, LoadReport, summarise

_BLOCK = re.compile(r"^(encoder\.cnn\.stages\.\d+|encoder\.transformer\.blocks)\.\d+\.")
_DECODER = re.compile(r"^(decoder\.[a-z_]+\.)(\d+)(?=\.)")
# the last layers of a residual branch: with zeros in them the block is the identity
_LAST = (
    ".compress.weight", ".compress.bias", ".attn.proj.weight", ".attn.proj.bias", ".mlp.fc2.weight", ".mlp.fc2.bias",
)


def load_pretrained_encoder(
    network: nn.Module,
    filename: str | os.PathLike[str],
    allow_partial: bool = False,
    channels: Sequence[int] = (),
    on_refusal: Callable[[LoadReport], None] | None = None,
    with_decoder: bool = True,
    masks: int = 0,
) -> LoadReport:
    """Reads a checkpoint file and loads its encoder; see :func:`load_encoder`.

    The segmentation decoder, its last layers aside, is loaded too where the file holds a trained one, unless
    ``with_decoder`` is false: a checkpoint of fine-tuning, of nnU-Net's own trainer, or of pre-training,
    unless with ``decoder=reconstruction``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be used. The network is then unchanged.
    """
    checkpoint = read_checkpoint(filename)
    description = description_of(checkpoint)
    weights = _with_decoder_by_scale(network_weights(checkpoint, filename), network.state_dict())
    trained = ("decoder.",) if with_decoder and has_trained_decoder(description, weights) else ()
    first, own_first = image_weight(weights), image_weight(network.state_dict())
    if description.get("kind") == "finetuning" and first is not None and own_first is not None:
        masks = 0 if first.shape[1] == own_first.shape[1] else masks  # it was such a stage itself
    return load_encoder(
        network, weights, str(filename), description, allow_partial, channels, trained, on_refusal=on_refusal,
        masks=masks,
    )


def _with_decoder_by_scale(
    weights: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The weights with the modules of the segmentation decoder counted as in the target. They are numbered from the
    coarsest scale, so where one network has more stages a number stands for another scale; scales finer than the
    target's own are none of its."""
    theirs, ours = ({int(m[2]) for n in names if (m := _DECODER.match(n))} for names in (weights, target))
    further = len(ours) - len(theirs)
    if not theirs or not ours or not further:
        return weights
    counted = {}
    for name, tensor in weights.items():
        match = _DECODER.match(name)
        step = int(match[2]) + further if match else 0
        if step >= 0:
            counted[f"{match[1]}{step}{name[match.end():]}" if match else name] = tensor
    return counted


def has_trained_decoder(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the segmentation decoder in a checkpoint is more than fresh weights that stand there for nnU-Net's own
    loader: in pre-training only the one that reconstructed is."""
    return description.get("kind") != "pretraining" or _segmentation_decoder_reconstructs(weights)


def load_pretraining(
    network: nn.Module,
    filename: str | os.PathLike[str],
    on_refusal: Callable[[LoadReport], None] | None = None,
) -> LoadReport:
    """Reads a checkpoint file to go on pre-training: the encoder, and what reconstructs where it is of the same kind
    and fits.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be used, or its encoder is another one. The network is then unchanged.
    """
    checkpoint = read_checkpoint(filename)
    description = description_of(checkpoint)
    weights = network_weights(checkpoint, filename)
    same_kind = _segmentation_decoder_reconstructs(weights) == _segmentation_decoder_reconstructs(network.state_dict())
    report = load_encoder(
        network, weights, str(filename), description, optional=("reconstruction.",) if same_kind else (),
        advice="plan the data set for the network of that checkpoint, or go on without it", on_refusal=on_refusal,
    )
    if not any(name.startswith("reconstruction.") for name in weights):
        report.notes.append("the file has no decoder that reconstructed, so this pre-training's starts fresh")
    elif not same_kind:
        kinds = ("segmentation", "reconstruction")
        theirs, ours = kinds if _segmentation_decoder_reconstructs(weights) else kinds[::-1]
        report.notes.append(
            f"the file was pre-trained with decoder={theirs}, this run has decoder={ours}, which starts fresh; go on "
            f"with decoder={theirs} to take the file's"
        )
    return report


def _segmentation_decoder_reconstructs(weights: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith("reconstruction.decoder.") for name in weights)


def load_encoder(
    network: nn.Module,
    weights: Mapping[str, torch.Tensor],
    source: str,
    description: Mapping[str, Any] | None = None,
    allow_partial: bool = False,
    channels: Sequence[int] = (),
    optional: tuple[str, ...] = (),
    advice: str = "plan the data set like the pre-training one, or set finetuning.allow_partial=true to take what fits",
    on_refusal: Callable[[LoadReport], None] | None = None,
    masks: int = 0,
) -> LoadReport:
    """Copies every ``encoder.*`` tensor into the network, adapted to its input channels and kernel sizes.

    Args:
        network: has an ``encoder``.
        weights: under our names.
        source: for messages.
        description: what the checkpoint says about itself; heads and strides, which no shape shows, are compared.
        allow_partial: take what fits of an encoder of other depth, width, heads or strides. Additional blocks of a
            stage then start as the identity.
        channels, masks: see :func:`nnunetv2_hyspark.transfer.adaptation.adapt_channels`.
        optional: prefixes of other parts that are loaded where they fit.
        advice: what to do where the two encoders differ, for the message.
        on_refusal: called with all entries, none of them loaded, before a source that does not cover the encoder is
            refused; the message names only some.

    Returns:
        What was loaded, adapted, left fresh and skipped.

    Raises:
        ValueError: if the source and the network's encoder do not cover each other, unless ``allow_partial``; or if
            the source has no encoder, or holds NaN. The network is then unchanged.
    """
    target = network.state_dict()
    if is_official(weights):
        raise ValueError(f"{source} is a file of the official HySparK release; convert it first with 'hyspark import'.")
    if not any(name.startswith(ENCODER) for name in weights):
        some = ", ".join(sorted(weights)[:4])
        raise ValueError(
            f"{source} has no encoder weights (its first ones: {some}); expected a checkpoint of "
            f"HySparKPretrainTrainer, or one converted with 'hyspark import'."
        )
    report = LoadReport(source, notes=source_notes(description or {}), description=description or {})
    plan = _Plan(network, target, weights, channels, masks, optional)
    hidden = hidden_differences(network, description or {})
    problems = plan.problems() + [text for _, text in hidden]
    if problems and not allow_partial:
        if on_refusal is not None:
            report.notes += [f"refused, nothing was loaded: {problem}" for problem in problems]
            report.entries += plan.refused()
            on_refusal(report)
        raise ValueError(
            f"{source} does not cover this network's encoder ({'; '.join(problems)}); {advice}."
        )
    if any(name == "heads" for name, _ in hidden):
        plan.drop(r"^encoder\.transformer\.blocks\.\d+\.attn\.", "trained with another number of attention heads")
    report.notes += [f"partial load: {problem}" for problem in problems]
    report.notes += plan.incomplete_parts()
    update, entries = plan.carry_out()
    if not any(name.startswith(ENCODER) and entry.action != "fresh" for name, entry in entries.items()):
        raise ValueError(f"{source} has no encoder weight that fits this network; use another checkpoint or plan.")
    report.entries += list(entries.values())
    report.entries += plan.skipped()
    _copy(target, update, source)
    return report


class _Plan:
    """Which tensor of the source goes where, before anything is changed."""

    def __init__(
        self,
        network: nn.Module,
        target: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        channels: Sequence[int],
        masks: int,
        optional: tuple[str, ...],
    ):
        self.target = target
        self.weights = weights
        self.optional = optional
        self.wanted = [name for name in target if name.startswith((ENCODER, *optional)) and ".seg_layers." not in name]
        self.misfits: dict[str, str] = {}  # by shape
        self.reasons: dict[str, str] = {}  # why a tensor of the source cannot be used
        self.fitted: dict[str, tuple[torch.Tensor, str]] = {}
        first = image_weight(target)
        adapt = functools.partial(adapt_channels, chosen=channels, masks=masks)
        for name in self.wanted:
            if name in weights:
                is_first = first is not None and target[name].data_ptr() == first.data_ptr()
                try:
                    self.fitted[name] = _fit(weights[name], target[name], adapt if is_first else None)
                except _DoesNotFit as error:
                    self.misfits[name] = str(error)
        self.reasons.update(self.misfits)
        self._keep_layers_whole()

    def _keep_layers_whole(self) -> None:
        """A weight without its bias, or the other way round, is worth nothing."""
        broken = {name.rpartition(".")[0] for name in self.wanted if name not in self.fitted}
        for name in [name for name in self.fitted if name.rpartition(".")[0] in broken]:
            del self.fitted[name]
            self.reasons[name] = "the rest of its layer does not fit"

    def drop(self, pattern: str, reason: str) -> None:
        """Leaves tensors out."""
        for name in [name for name in self.fitted if re.match(pattern, name)]:
            del self.fitted[name]
            self.reasons[name] = reason

    def problems(self) -> list[str]:
        """What keeps source and target from covering each other's encoder, in words."""
        encoder = [name for name in self.wanted if name.startswith(ENCODER)]
        missing = [name for name in encoder if name not in self.weights]
        surplus = [name for name in self.weights if name.startswith(ENCODER) and name not in self.target]
        misfits = [f"{name} {self.misfits[name]}" for name in encoder if name in self.misfits]
        problems = [f"missing {summarise(missing)}"] if missing else []
        if misfits:
            problems.append(", ".join(misfits[:4]) + (f" and {len(misfits) - 4} more" if len(misfits) > 4 else ""))
        has_transformer = any(name.startswith("encoder.transformer.") for name in self.target)
        if not has_transformer:  # leaving the transformer out is a choice of the plan
            surplus = [name for name in surplus if not name.startswith("encoder.transformer.")]
        if surplus:
            problems.append(f"the network has no place for {summarise(surplus)}")
        return problems

    def incomplete_parts(self) -> list[str]:
        """Which optional parts are taken in pieces, in words."""
        notes = []
        for prefix in self.optional:
            names = [name for name in self.wanted if name.startswith(prefix)]
            taken = sum(name in self.fitted for name in names)
            if taken < len(names) and any(name.startswith(prefix) for name in self.weights):
                notes.append(f"{taken} of {len(names)} tensors of {prefix.rstrip('.')} fit; the others stay fresh")
        return notes

    def carry_out(self) -> tuple[dict[str, torch.Tensor], dict[str, Entry]]:
        """New values, and what to report, per tensor of the target."""
        known = {match.group(1) for name in self.weights if (match := _BLOCK.match(name))}
        update: dict[str, torch.Tensor] = {}
        entries: dict[str, Entry] = {}
        for name, tensor in self.target.items():
            shape = tuple(tensor.shape)
            block = _BLOCK.match(name)
            if name in self.fitted:
                update[name], how = self.fitted[name]
                entries[name] = Entry(name, "adapted" if how else "loaded", tuple(self.weights[name].shape), shape, how)
            elif name not in self.wanted:
                part = "segmentation layer" if ".seg_layers." in name else "not part of the encoder"
                part = "another kind of decoder than the file's" if name.startswith("reconstruction.") else part
                entries[name] = Entry(name, "fresh", None, shape, part)
            elif name in self.reasons:
                entries[name] = Entry(name, "fresh", tuple(self.weights[name].shape), shape, self.reasons[name])
            elif block and block.group(1) in known and not any(n.startswith(block.group(0)) for n in self.weights):
                reason = "additional block, starts as the identity"
                entries[name] = Entry(name, "fresh", None, shape, reason)
                if name.endswith(_LAST):
                    update[name] = torch.zeros(shape)
            else:
                entries[name] = Entry(name, "fresh", None, shape, "not in the file")
        return update, entries

    def refused(self) -> list[Entry]:
        """What to report if nothing of it is carried out."""
        _, entries = self.carry_out()
        fits = "fits, but the load was refused"
        return [
            Entry(name, "fresh", entry.source_shape, entry.target_shape, fits if name in self.fitted else entry.reason)
            for name, entry in entries.items()
        ] + self.skipped()

    def skipped(self) -> list[Entry]:
        """What of the source is not used."""
        entries = []
        for name, tensor in self.weights.items():
            if name in self.fitted or name in self.reasons:
                continue
            entries.append(Entry(name, "skipped", tuple(tensor.shape), None, self._why_skipped(name)))
        return entries

    def _why_skipped(self, name: str) -> str:
        in_pretraining = any(own.startswith("reconstruction.") for own in self.target)
        if name.startswith("reconstruction."):
            if in_pretraining:
                return "another kind of decoder than this pre-training's"
            return "stands under decoder too" if name.startswith("reconstruction.decoder.") else "pre-training only"
        if not name.startswith("decoder."):
            return "not used by this network"
        if ".seg_layers." in name:
            return "segmentation layer"
        if in_pretraining:
            stands = f"reconstruction.{name}" in self.weights
            return "stands under reconstruction too" if stands else "not a decoder that reconstructed"
        return "untrained, since the paper's decoder reconstructed, or not asked for"


class _DoesNotFit(ValueError):
    """A tensor cannot be brought to the target's shape."""


def _fit(
    tensor: torch.Tensor,
    target: torch.Tensor,
    adapt: Callable[[torch.Tensor, int], tuple[torch.Tensor, str]] | None,
) -> tuple[torch.Tensor, str]:
    if target.is_floating_point() != tensor.is_floating_point():
        raise _DoesNotFit(f"is {tensor.dtype} in the file, {target.dtype} in the network")
    done = []
    misfit = f"is {tuple(tensor.shape)} in the file, {tuple(target.shape)} in the network"
    if tensor.ndim != target.ndim or tensor.shape[:1] != target.shape[:1]:
        raise _DoesNotFit(misfit)
    if adapt is not None:
        tensor, how = adapt(tensor, target.shape[1])
        done.append(how)
    if tensor.shape[1:2] != target.shape[1:2]:
        raise _DoesNotFit(misfit)
    if tensor.ndim == 5 and tensor.shape != target.shape:
        try:
            tensor, how = adapt_kernel(tensor, target.shape[2:])
        except ValueError as error:
            raise _DoesNotFit(f"has {error}") from None
        done.append(how)
    if tensor.shape != target.shape:
        raise _DoesNotFit(misfit)
    return tensor, "; ".join(how for how in done if how)


def _copy(target: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor], source: str) -> None:
    for name, tensor in update.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source} holds NaN or infinite weights in {name}; use an earlier checkpoint.")
    with torch.no_grad():
        for name, tensor in update.items():
            target[name].copy_(tensor)


def hidden_differences(network: nn.Module, description: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Heads and strides in which a checkpoint's network differs from this one; no tensor's shape shows them.

    Returns:
        ``("heads" or "strides", what differs)``; nothing where the checkpoint does not say.
    """
    kwargs = as_mapping(as_mapping(description.get("architecture")).get("arch_kwargs"))
    encoder: Any = network.encoder
    differences = []
    heads = kwargs.get("transformer_heads")
    blocks = getattr(getattr(encoder, "transformer", None), "blocks", None)
    if blocks is not None and len(blocks) and isinstance(heads, int) and kwargs.get("transformer_depth"):
        here = blocks[0].attn.num_heads
        if heads != here:
            differences.append(("heads", f"its transformer has {heads} attention heads, this network's {here}"))
    try:
        strides = [as_size3(stride) for stride in kwargs.get("strides", ())]
    except (TypeError, ValueError):
        strides = []
    if strides and strides != list(encoder.strides):
        differences.append((
            "strides",
            f"its strides are {[list(s) for s in strides]}, this network's {[list(s) for s in encoder.strides]}",
        ))
    return differences


def source_notes(description: Mapping[str, Any]) -> list[str]:
    """What a user compares with the own data: where the weights come from and how their images were prepared."""
    configuration = as_mapping(description.get("configuration"))
    facts = {
        "data set": description.get("dataset_name"),
        "channels": description.get("channel_names"),
        "spacing in mm": configuration.get("spacing"),
        "normalization": configuration.get("normalization_schemes"),
        "patch size": configuration.get("patch_size"),
        "origin": description.get("origin"),
    }
    return [f"trained with {name}: {value}" for name, value in facts.items() if value]
