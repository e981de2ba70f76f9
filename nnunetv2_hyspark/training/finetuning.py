"""Hyperparameters of fine-tuning, and the parameter groups that follow from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FinetuningConfig:
    """Hyperparameters of supervised training, the same for fine-tuning and for training from scratch."""

    learning_rate: float = field(default=5e-4, metadata={"range": (0.0, 1.0), "open": True, "help": "AdamW, peak"})
    encoder_lr_scale: float = field(
        default=1.0, metadata={"range": (0.0, 10.0), "help": "encoder's learning rate over learning_rate; 0 freezes it"}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={"range": (0.01, 1.0), "help": "learning rate factor per encoder stage away from the decoder"},
    )
    frozen_epochs: int = field(
        default=0,
        metadata={"range": (0, 10**7), "help": "first epochs in which the encoder is not trained; then it warms up"},
    )
    weight_decay: float = field(default=0.05, metadata={"range": (0.0, 1.0), "help": "AdamW, matrices only"})
    warmup_epochs: float = field(
        default=10.0,
        metadata={"range": (0.0, 1e6), "help": "linear warm-up, epochs; at most a tenth of the run is used"},
    )
    epochs: int = field(default=1000, metadata={"range": (1, 10**7), "help": "epochs of iterations_per_epoch steps"})
    iterations_per_epoch: int = field(default=250, metadata={"range": (1, 10**7), "help": "optimizer steps per epoch"})
    val_iterations_per_epoch: int = field(
        default=50, metadata={"range": (1, 10**7), "help": "validation batches per epoch"}
    )
    gradient_clip: float = field(default=12.0, metadata={"range": (0.0, 1e9), "open": True, "help": "largest norm"})
    batch_size: int = field(default=0, metadata={"range": (0, 4096), "help": "patches per step; 0: the plan's"})
    save_every: int = field(default=50, metadata={"range": (1, 10**6), "help": "epochs between checkpoint_latest"})
    max_bad_steps: int = field(
        default=10, metadata={"range": (1, 10**6), "help": "steps in a row without finite gradients that end a run"}
    )
    allow_partial: bool = field(
        default=False,
        metadata={"help": "load what fits of pre-trained weights that do not cover the encoder (other depth, width, "
                  "heads or strides)"},
    )
    load_decoder: bool = field(
        default=True,
        metadata={"help": "take over the decoder too where the pre-trained weights have a trained one"},
    )
    adapt_channels: tuple[int, ...] = field(
        default=(),
        metadata={"help": "for every image channel the pre-trained channel whose weights it takes, from 0, or -1 for "
                  "none; empty: their mean, if the numbers differ"},
    )
    mirror_axes: tuple[int, ...] = field(
        default=(0, 1, 2),
        metadata={"choices": (0, 1, 2), "help": "axes of preprocessed images that are mirrored, at random in training "
                  "and for test-time augmentation in validation and prediction; empty: none, as for labels that tell "
                  "left from right"},
    )
    seed: int = field(default=-1, metadata={"range": (-1, 2**31 - 1), "help": "of initialisation; -1: not fixed"})


def is_frozen(config: FinetuningConfig, epoch: int) -> bool:
    """Whether the encoder is not trained in an epoch (from 0)."""
    return epoch < config.frozen_epochs or config.encoder_lr_scale == 0


def encoder_depth(name: str, n_stages: int) -> int:
    """How many stages an encoder parameter lies away from the decoder: 0 for the transformer, 1 for the junction's
    CNN stage, and one more per finer stage.

    Args:
        name: parameter name below ``encoder.``.
        n_stages: CNN stages.
    """
    if name.startswith("transformer."):
        return 0
    match = re.match(r"cnn\.(?:encoder\.)?(?:stages|widen)\.(\d+)\.", name)
    return n_stages - int(match.group(1)) if match else n_stages


def parameter_groups(network: nn.Module, config: FinetuningConfig) -> list[dict[str, Any]]:
    """AdamW groups: encoder and decoder apart, encoder by depth, vectors (norms, biases) without weight decay.

    Every group holds ``lr_scale`` (its share of the schedule's rate), ``name`` and ``weight_decay``.
    """
    encoder: Any = network.encoder
    n_stages = len(encoder.strides)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        scale, part = 1.0, "decoder"
        if name.startswith("encoder."):
            depth = encoder_depth(name.removeprefix("encoder."), n_stages)
            scale, part = config.encoder_lr_scale * config.layer_decay**depth, "encoder"
            if config.layer_decay < 1:
                part = f"encoder-{depth}"
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(
            (part, decay), {"name": part, "lr_scale": scale, "weight_decay": decay, "params": []}
        )
        group["params"].append(parameter)
    return list(groups.values())
