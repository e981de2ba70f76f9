"""Whether a training by dense maps is the one by visible blocks but for rounding.

    python experiments/rounding.py nnUNet_preprocessed/DatasetNNN_NAME/nnUNetHySparKPlans.json --steps 50

The plan's encoder is pre-trained, with either decoder, for some steps by blocks and by dense-then-mask, from the same
weights on the same crops and masks, in float64, where rounding is 1e-16, and in float32. Controls in float32: blocks by
PyTorch's convolutions in place of the fastest, and blocks from weights that differ by one part in ten million. Losses
of every step go to experiments/results/rounding.json; with ``--decoders`` one can be run alone, the other's stay.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hyspark.data.cases import find_image
from nnunetv2_hyspark.data.loader import CropBatches
from nnunetv2_hyspark.geometry import as_size3
from nnunetv2_hyspark.masking import random_visible
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparK, HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.backends import choose_backend

NUDGE = 1e-7
DECODERS = ("reconstruction", "segmentation")
RATE = 2e-3


def make_network(plan: Any, decoder: str, dtype: torch.dtype) -> HySparK:
    """The plan's pre-training network with the weights that all variants start from."""
    torch.manual_seed(0)
    return build_hyspark(1, plan.network_arch_init_kwargs, HySparKConfig(decoder=decoder)).to(dtype)


def nudge(network: HySparK, seed: int) -> HySparK:
    """Changes every weight by about one part in ten million."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
    return network


def train(network: HySparK, batches: CropBatches, steps: int) -> list[float]:
    """Losses of AdamW's steps."""
    dtype = next(network.parameters()).dtype
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    losses = []
    for step in range(steps):
        batch = batches[step]
        image, visible = batch["data"].to(dtype), batch["visible"]
        loss = reconstruction_loss(image, network(image, visible), visible)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Trains every variant and writes the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), choices=DECODERS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rounding.json")
    options = parser.parse_args()
    plan = PlansManager(str(options.plans)).get_configuration("3d_fullres")
    folder = options.plans.parent / plan.data_identifier
    names = sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    patch = as_size3(plan.patch_size)
    grid = make_network(plan, DECODERS[0], torch.float32).encoder.grid(patch)
    batches = CropBatches(
        [find_image(folder, name) for name in names], names, patch, range(options.batch),
        functools.partial(random_visible, 1, grid, 0.75), (0, 0), (0, 1, 2),
    )
    fastest = choose_backend("auto", torch.device("cpu"), print)

    def by(layout: Callable[..., Any], decoder: str, dtype: torch.dtype) -> HySparK:
        network = make_network(plan, decoder, dtype)
        network.layout = layout
        return network

    def nudged(seed: int, decoder: str) -> HySparK:
        return nudge(by(blocks, decoder, torch.float32), seed)

    blocks = functools.partial(BlockLayout, convolve=fastest)
    variants: dict[str, Callable[[str], HySparK]] = {
        "float64, blocks": lambda decoder: by(BlockLayout, decoder, torch.float64),
        "float64, dense maps": lambda decoder: by(DenseMaskLayout, decoder, torch.float64),
        "float32, blocks": lambda decoder: by(blocks, decoder, torch.float32),
        "float32, dense maps": lambda decoder: by(DenseMaskLayout, decoder, torch.float32),
        "float32, blocks, PyTorch's convolutions": lambda decoder: by(BlockLayout, decoder, torch.float32),
        **{
            f"float32, blocks, weights nudged, {seed}": functools.partial(nudged, seed) for seed in range(3)
        },
    }
    settings = {"plans": options.plans.stem, "cases": len(names), "patch": list(patch), "batch": options.batch}
    losses: dict[str, dict[str, list[float]]] = {}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        losses = before["losses"] if before["rounding"] == settings else {}
    for decoder in options.decoders:
        losses[decoder] = {}
        for name, make in variants.items():
            found = train(make(decoder), batches, options.steps)
            losses[decoder][name] = found
            print(f"{decoder}: {name}: {found[0]:.6f} ... {found[-1]:.6f}", flush=True)
    options.output.write_text(json.dumps({"rounding": settings, "losses": losses}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
