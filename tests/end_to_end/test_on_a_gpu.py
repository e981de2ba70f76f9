"""The same numbers on a GPU: float32, mixed precision, compiled, and nnU-Net's commands from plan to prediction.

Skipped without one. ``HYSPARK_TEST_DEVICE=cpu`` runs them on the CPU, to see that the tests themselves work.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.benchmark.request import Request, build, make_step
from nnunetv2_hyspark.pretext.hyspark import reconstruction_loss
from nnunetv2_hyspark.sparse.backends import disagreement, load_backend

DEVICE = torch.device(os.environ.get("HYSPARK_TEST_DEVICE", "cuda"))

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device; none is at hand"
)

SMALL = Request(size=(32, 32, 32), batch=2, base_width=8, device=DEVICE.type)


def loss_and_gradients(request: Request, variant: str = "blocks", dtype: torch.dtype | None = None):
    """Of the whole network; the encoder's gradients in one vector."""
    model, image, visible = build(request, variant)
    with torch.autocast(request.device, dtype=dtype, enabled=dtype is not None):
        reconstruction = model(image, visible)
    loss = reconstruction_loss(image, reconstruction, visible)
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # or its gradients are below what float16 can hold
    gradients = torch.autograd.grad(scale * loss, list(model.encoder.parameters()))
    return loss.item(), torch.cat([gradient.flatten().float().cpu() / scale for gradient in gradients])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_device_computes_what_the_cpu_computes():
    loss, gradients = loss_and_gradients(SMALL)
    expected_loss, expected = loss_and_gradients(Request(**{**SMALL.__dict__, "device": "cpu"}))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert distance(gradients, expected) < 1e-2  # single ReLU inputs flip between devices


def test_blocks_equal_dense_then_mask():
    results = {variant: loss_and_gradients(SMALL, variant) for variant in ("blocks", "dense")}
    assert results["blocks"][0] == pytest.approx(results["dense"][0], rel=1e-4)
    assert distance(results["blocks"][1], results["dense"][1]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    """The same loss, and gradients no further from float32's than twice the dense path's."""
    if DEVICE.type == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU's float16 kernels are incomplete")
    loss, exact = loss_and_gradients(SMALL)
    found = {variant: loss_and_gradients(SMALL, variant, dtype) for variant in ("blocks", "dense")}
    assert found["blocks"][0] == pytest.approx(loss, rel=2e-2)
    errors = {variant: distance(gradients, exact) for variant, (_, gradients) in found.items()}
    assert errors["blocks"] < 2 * errors["dense"] + 1e-3, errors


@pytest.mark.slow
def test_compiled_steps_train_alike():
    """The same loss at first; then as close as AdamW allows, whose first steps turn rounding near zero into signs."""
    losses = {}
    for compiled in (False, True):
        step = make_step(Request(**{**SMALL.__dict__, "compile": compiled}), "blocks")
        losses[compiled] = [step() for _ in range(4)]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-4)
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="PyTorch counts its memory on CUDA only")
def test_blocks_need_less_memory_than_dense_maps():
    peaks = {}
    for variant in ("blocks", "dense"):
        step = make_step(Request(size=(64, 64, 64), base_width=16, device="cuda"), variant)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[variant] = torch.cuda.max_memory_allocated()
    assert peaks["blocks"] < 0.8 * peaks["dense"]


@pytest.mark.parametrize("backend", ["gathered", "triton"])
def test_backends_agree(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    assert disagreement(load_backend(backend), DEVICE) is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_from_plan_to_prediction(workspace, shared_data: Path, backend):
    """Stock commands with nnU-Net's default device handling, mixed precision and compilation."""
    source = shared_data / "data" / "hippocampus"
    splits = json.loads((source / "splits.json").read_text())
    labels = {"background": 0, "Anterior": 1, "Posterior": 2}
    number = {"auto": 4, "triton": 5}[backend]
    workspace.add_dataset(source, number, "Hippo", splits["train_labelled"][:6], splits["val"][:2], "MRI", labels)
    settings = f"{workspace.settings},backend={backend}"
    plans = "nnUNetHySparKPlans"
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", number, "-pl", "HySparKPlanner", "-c", "3d_fullres", "-np", 2)
    train, where = ("nnUNetv2_train", number, "3d_fullres"), ("-p", plans, "-device", DEVICE.type)
    log = workspace.run(*train, "all", "-tr", "HySparKPretrainTrainer", *where, settings=settings)
    if DEVICE.type == "cuda":
        assert "is not used on cuda" not in log
    name = f"Dataset{number:03d}_Hippo"
    weights = workspace.output(name, "HySparKPretrainTrainer", plans, "all") / "checkpoint_final.pth"
    losses = torch.load(weights, weights_only=True, map_location="cpu")["logging"]["train_losses"]
    assert losses[-1] < losses[0]
    again = workspace.run(*train, "all", "-tr", "HySparKPretrainTrainer", *where, "--c", settings=settings)
    assert "Mean reconstruction loss" in again
    log = workspace.run(*train, 0, "-tr", "HySparKFinetuneTrainer", *where, "-pretrained_weights", weights)
    assert "Mean Validation Dice" in log
    predicted = workspace.folder / f"predicted_{backend}"
    workspace.run(
        "nnUNetv2_predict", "-d", number, "-tr", "HySparKFinetuneTrainer", "-p", plans, "-c", "3d_fullres", "-f", 0,
        "-i", workspace.raw / name / "imagesTs", "-o", predicted, "-device", DEVICE.type,
    )  # fmt: skip
    assert len(list(predicted.glob("*.nii.gz"))) == 2
