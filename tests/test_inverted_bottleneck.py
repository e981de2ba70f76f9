"""LayerNorm, expansion, GELU, compression and residual in one pass, against PyTorch's layers in float64."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nnunetv2_hyspark import inverted_bottleneck as module
from nnunetv2_hyspark.inverted_bottleneck import inverted_bottleneck, passes_once, rows_at_once
from nnunetv2_hyspark.networks.mednext import MedNeXtBlock


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch):
    monkeypatch.setattr(module, "EXPANDED", 32 * 12)


def tensors(shape, expansion):
    """Voxels, residual, and the parameters in the order of the function; float32."""
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator)

    parameters = [
        draw(width), draw(width), draw(expansion * width, width), draw(expansion * width),
        draw(width, expansion * width), draw(width),
    ]
    return draw(*shape), draw(*shape), parameters


def plain(voxels, residual, norm_weight, norm_bias, eps, expand, expand_bias, compress, compress_bias):
    hidden = F.layer_norm(voxels, voxels.shape[-1:], norm_weight, norm_bias, eps)
    return residual + F.linear(F.gelu(F.linear(hidden, expand, expand_bias)), compress, compress_bias)


def assert_as_pytorch(voxels, residual, parameters):
    grad = torch.randn(voxels.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function, dtype in ((inverted_bottleneck, torch.float32), (plain, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (voxels, residual, *parameters)]
        out = function(*leaves[:4], 1e-6, *leaves[4:])
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for found, wanted in zip(*results):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).abs().max() <= 3e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(64, 6), (2, 4, 5, 7, 6), (1, 33, 6), (97, 5), (16, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_values_and_gradients(shape, expansion, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_pytorch(*tensors(shape, expansion))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 200), width=st.integers(3, 9), expansion=st.integers(1, 4))
def test_any_number_of_rows(rows, width, expansion):
    """From three features on: of one or two LayerNorm leaves next to nothing but rounding."""
    assert_as_pytorch(*tensors((rows, width), expansion))


def test_any_memory_layout():
    """Voxels of channels-last maps, of contiguous ones, and of parts of them."""
    _, _, parameters = tensors((1, 6), 2)
    whole = torch.randn(2, 6, 3, 5, 4)
    for x in (whole, whole.contiguous(memory_format=torch.channels_last_3d), torch.randn(2, 12, 3, 5, 4)[:, ::2]):
        voxels = x.permute(0, 2, 3, 4, 1)
        assert_as_pytorch(voxels, voxels.flip(0), parameters)


def test_where_it_serves(monkeypatch):
    monkeypatch.undo()
    rows = rows_at_once(128)
    assert rows % 16 == 0 and rows * 128 == module.EXPANDED
    assert rows_at_once(10**9) == 16
    large = torch.empty(2, rows, 32)
    assert passes_once(large, 128) == torch.backends.mkldnn.is_available()
    assert not passes_once(large[:1], 128), "one pass is all there is: the layers keep more and compute less"
    assert not passes_once(large.double(), 128)
    assert not passes_once(large.bfloat16(), 128)
    assert not passes_once(torch.empty(2, rows, 32, device="meta"), 128)
    with torch.autocast("cpu"):
        assert not passes_once(large, 128)


def test_a_block_is_the_same_either_way(monkeypatch):
    torch.manual_seed(0)
    block, x = MedNeXtBlock(6, (3, 3, 3), 2), torch.randn(2, 6, 5, 4, 6, requires_grad=True)
    results = []
    for limit in (16 * 12, 2**20):
        monkeypatch.setattr(module, "EXPANDED", limit)
        out = block(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_no_expanded_features_are_kept():
    kept = []
    block = MedNeXtBlock(6, (3, 3, 3), 4)
    x = torch.randn(2, 6, 8, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x)
    assert max(kept) == x.numel()
    assert sum(count == x.numel() for count in kept) == 2, "the block's input, and what LayerNorm reads"


def test_what_is_compiled_is_one_graph():
    block, x = MedNeXtBlock(4, (3, 3, 3), 2), torch.randn(1, 4, 8, 8, 8)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


def test_only_what_is_asked_for():
    """Nothing is kept where no gradients are recorded; frozen weights get none."""
    voxels, residual, parameters = tensors((64, 6), 2)
    arguments = (*parameters[:2], 1e-6, *parameters[2:])
    with torch.no_grad():
        assert inverted_bottleneck(voxels.requires_grad_(), residual, *arguments).grad_fn is None
    inverted_bottleneck(voxels, residual, *arguments).sum().backward()
    assert voxels.grad is not None and all(p.grad is None for p in parameters)


def test_a_second_derivative_is_refused():
    """Rather than taken for zero."""
    voxels, residual, parameters = tensors((64, 6), 2)
    voxels.requires_grad_()
    out = inverted_bottleneck(voxels, residual, *parameters[:2], 1e-6, *parameters[2:])
    (gradient,) = torch.autograd.grad(out.square().sum(), voxels, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_frozen_blocks_train_what_is_before_them():
    torch.manual_seed(0)
    block, before = MedNeXtBlock(6, (3, 3, 3), 2), nn.Conv3d(1, 6, 1)
    x = torch.randn(1, 1, 8, 8, 8)
    (trained,) = torch.autograd.grad(block(before(x)).square().sum(), before.weight)
    block.requires_grad_(False)
    (frozen,) = torch.autograd.grad(block(before(x)).square().sum(), before.weight)
    assert torch.equal(frozen, trained) and frozen.abs().max() > 0
