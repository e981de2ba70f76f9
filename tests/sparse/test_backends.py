"""Backends agree with the reference, and one that does not is not used.

Without a GPU Triton's kernels run in its interpreter, on the CPU (tests/conftest.py).
"""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_hyspark.geometry import multiply
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.backends import choose_backend, disagreement, gathered_where_small, load_backend
from nnunetv2_hyspark.sparse.convolution import submanifold_conv3d

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def triton_conv3d():
    pytest.importorskip("triton")
    return load_backend("triton")


def test_the_check_passes(triton_conv3d):
    assert disagreement(triton_conv3d, DEVICE) is None
    assert disagreement(gathered_where_small, DEVICE) is None


def assert_equals_dense_then_mask(layouts, shape, weight_shape, bias, groups, values, assert_close):
    """Values and gradients of a convolution on two layouts of the same mask."""
    results = []
    for layout in layouts:
        dense = values(*shape, dtype=torch.float32).to(DEVICE).requires_grad_()
        weight = values(*weight_shape, seed=1, dtype=torch.float32).to(DEVICE).requires_grad_()
        offset = values(weight_shape[0], seed=2, dtype=torch.float32).to(DEVICE).requires_grad_() if bias else None
        leaves = [leaf for leaf in (dense, weight, offset) if leaf is not None]
        out = layout.scatter(layout.conv3d(layout.gather(dense), weight, offset, (1, 1, 1), groups))
        grad = values(*out.shape, seed=3, dtype=torch.float32).to(DEVICE)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, theirs in zip(*results):
        assert_close(ours, theirs, 1e-5)


@given(
    samples=st.integers(1, 2),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    block=st.tuples(*[st.integers(1, 3)] * 3),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gathered_equals_dense_then_mask(
    bernoulli_mask, values, assert_close, samples, grid, block, kernel, inputs, outputs, bias, seed
):
    visible = bernoulli_mask(samples, grid, 0.6, seed).to(DEVICE)
    layouts = BlockLayout(visible, convolve=gathered_where_small), DenseMaskLayout(visible)
    assert_equals_dense_then_mask(
        layouts, (samples, inputs, *multiply(grid, block)), (outputs, inputs, *kernel), bias, 1, values, assert_close
    )


def test_gathered_gradients_numerically(bernoulli_mask, values):
    visible = bernoulli_mask(2, (2, 1, 2), 0.5, 0)
    layout = BlockLayout(visible)
    blocks = values(int(visible.sum()), 3, 2, 1, 2).requires_grad_()
    weight, bias = values(2, 3, 3, 1, 3, seed=1).requires_grad_(), values(2, seed=2).requires_grad_()
    table = layout.halo((2, 1, 2), (1, 0, 1))
    assert torch.autograd.gradcheck(lambda x, w, b: gathered_where_small(x, w, b, table), (blocks, weight, bias))


def test_gathered_only_what_is_asked_for(bernoulli_mask, values):
    """A frozen convolution passes gradients on and gets none."""
    visible = bernoulli_mask(1, (2, 2, 2), 0.5, 0)
    table = BlockLayout(visible).halo((2, 2, 2), (1, 1, 1))
    blocks, weight = values(int(visible.sum()), 3, 2, 2, 2), values(2, 3, 3, 3, 3, seed=1)
    gathered_where_small(blocks.requires_grad_(), weight, None, table).sum().backward()
    assert blocks.grad is not None and weight.grad is None
    gathered_where_small(blocks.detach(), weight.requires_grad_(), None, table).sum().backward()
    assert weight.grad is not None


@settings(max_examples=12, deadline=None)
@given(
    samples=st.integers(1, 2),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    block=st.tuples(*[st.integers(1, 4)] * 3),
    kernel=st.sampled_from([(3, 3, 3), (1, 3, 3), (3, 1, 5), (1, 1, 1), (1, 7, 1)]),
    channels=st.sampled_from([2, 5, 16, 70]),
    bias=st.booleans(),
    splits=st.sampled_from([1, 2, 128]),
    seed=st.integers(0, 99),
)
def test_triton_equals_dense_then_mask(
    triton_conv3d, bernoulli_mask, values, assert_close, samples, grid, block, kernel, channels, bias, splits, seed
):
    visible = bernoulli_mask(samples, grid, 0.6, seed).to(DEVICE)
    layouts = BlockLayout(visible, convolve=triton_conv3d), DenseMaskLayout(visible)
    # with few parts, each of them sums the weight's gradient over several groups of rows
    with mock.patch("nnunetv2_hyspark.sparse.triton_depthwise.SPLITS", splits):
        assert_equals_dense_then_mask(
            layouts, (samples, channels, *multiply(grid, block)), (channels, 1, *kernel), bias, channels, values,
            assert_close,
        )  # fmt: skip


@pytest.mark.parametrize(
    "backend, groups, stride, hidden, dtype",
    [
        ("triton", 1, (1, 1, 1), "zero", torch.float32),
        ("triton", 8, (2, 2, 2), "zero", torch.float32),
        ("triton", 8, (1, 1, 1), "nearest", torch.float32),
        ("triton", 8, (1, 1, 1), "zero", torch.float64),
        ("triton", 4, (1, 1, 1), "zero", torch.float32),
        ("gathered", 2, (1, 1, 1), "zero", torch.float32),
        ("gathered", 1, (2, 2, 2), "zero", torch.float32),
        ("gathered", 1, (1, 1, 1), "nearest", torch.float32),
    ],
)
def test_what_a_backend_does_not_do_is_the_reference(backend, bernoulli_mask, values, groups, stride, hidden, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    convolve = load_backend(backend)
    visible = bernoulli_mask(1, (2, 2, 2), 0.5, 0)
    layout = BlockLayout(visible, hidden)
    blocks = values(int(visible.sum()), 8, 2, 2, 2, dtype=dtype)
    weight = values(8, 8 // groups, 3, 3, 3, dtype=dtype)
    table = layout.halo((2, 2, 2), (1, 1, 1))
    ours = convolve(blocks, weight, None, table, groups, stride)
    assert torch.equal(ours, submanifold_conv3d(blocks, weight, None, table, groups, stride))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["gathered", "triton"])
def test_a_whole_step_is_the_same(backend, compiled):
    """Loss and every gradient of pre-training, also where the network is compiled."""
    if backend == "triton":
        pytest.importorskip("triton")
    convolution = load_backend(backend)
    torch.manual_seed(0)
    kwargs = {
        "features_per_stage": [4, 6, 12], "strides": [[1] * 3, [2] * 3, [2] * 3], "kernel_sizes": [[3] * 3] * 3,
        "n_blocks_per_stage": [1, 1, 1], "expansion_per_stage": [2, 2, 2], "transformer_depth": 1,
        "transformer_heads": 2,
    }  # fmt: skip
    model = build_hyspark(1, kwargs, HySparKConfig(decoder="reconstruction", decoder_width=8)).to(DEVICE)
    image = torch.randn(2, 1, 8, 8, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    visible = model.draw_mask(2, image.shape[2:], 0.6, torch.Generator().manual_seed(2)).to(DEVICE)
    found = []
    for convolve in (submanifold_conv3d, convolution):
        model.compute_with(convolve)
        network = torch.compile(model, backend="aot_eager") if compiled and convolve is convolution else model
        loss = reconstruction_loss(image, network(image, visible), visible)
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    for reference, ours in zip(found[0][1], found[1][1]):
        assert (reference - ours).norm() <= 1e-4 * reference.norm().clamp(min=1e-3)


def test_a_backend_that_disagrees_is_not_used(monkeypatch):
    """Wrong values, wrong gradients, or none at all."""

    def wrong_values(blocks, weight, bias, table, groups=1, stride=(1, 1, 1)):
        return 1.01 * submanifold_conv3d(blocks, weight, bias, table, groups, stride)

    def wrong_gradients(blocks, weight, bias, table, groups=1, stride=(1, 1, 1)):
        out = submanifold_conv3d(blocks, weight, bias, table, groups, stride)
        other = submanifold_conv3d(blocks, 2 * weight, bias, table, groups, stride)
        return out.detach() + other - other.detach()

    def nan(blocks, weight, bias, table, groups=1, stride=(1, 1, 1)):
        return submanifold_conv3d(blocks, weight, bias, table, groups, stride) * torch.nan

    def broken(*_args, **_kwargs):
        raise RuntimeError("no kernel image\nis available")

    for backend, words in (
        (wrong_values, "its values in float32 differ"), (wrong_gradients, "its gradients of the input in float32"),
        (nan, "differ from theirs by nan"), (broken, r"it failed (RuntimeError: no kernel image is available)"),
    ):  # fmt: skip
        monkeypatch.setattr("nnunetv2_hyspark.sparse.backends.load_backend", lambda name, chosen=backend: chosen)
        warnings: list[str] = []
        assert choose_backend("triton", CPU, warnings.append) is submanifold_conv3d
        (warning,) = warnings
        assert warning.startswith("backend triton is not used on cpu, PyTorch's convolutions are: ")
        assert words in warning


def test_choice():
    def never(why):
        raise AssertionError(why)

    assert choose_backend("auto", CPU, never) is choose_backend("gathered", CPU, never) is gathered_where_small
    assert choose_backend("torch", CPU, never) is submanifold_conv3d
    assert choose_backend("auto", torch.device("cuda"), never) is submanifold_conv3d, "no GPU has been measured yet"
    for ask in (lambda: choose_backend("cuda", CPU, never), lambda: load_backend("cuda")):
        with pytest.raises(ValueError, match="the backend is 'cuda'; expected one of auto, torch, gathered, triton"):
            ask()


def test_without_triton_or_a_gpu_it_says_so():
    """In a process of its own, without the interpreter."""
    code = (
        "import torch; from nnunetv2_hyspark.sparse.backends import choose_backend; "
        "choose_backend('triton', torch.device('cpu'), print)"
    )
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=surroundings)
    assert done.stdout.startswith("backend triton is not used on cpu, PyTorch's convolutions are: it failed (")
