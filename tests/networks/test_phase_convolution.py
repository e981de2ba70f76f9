"""Phases equal the two convolutions they replace."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nnunetv2_hyspark.networks.phase_convolution import has_phases, phases_pay, upsample_conv3d

STRIDES = [(2, 2, 2), (1, 2, 2), (2, 1, 2), (1, 1, 1)]
KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)]


def random_tensors(stride, kernel, size, batch, inner):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, *size), (4, inner, *stride), (inner,), (5, inner, *kernel), (5,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "batch"), [((3, 4, 2), 2), ((1, 1, 1), 1), ((1, 2, 5), 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_transposed_then_plain_convolution(stride, kernel, size, batch, has_bias):
    assert has_phases(stride, kernel)
    x, up_weight, up_bias, weight, bias = random_tensors(stride, kernel, size, batch, 3)
    inputs = [x, up_weight, up_bias, weight] + ([bias] if has_bias else [])
    used = bias if has_bias else None
    up = F.conv_transpose3d(x, up_weight, up_bias, stride=stride)
    expected = F.conv3d(up, weight, used, padding=[k // 2 for k in kernel])
    actual = upsample_conv3d(x, up_weight, up_bias, weight, used, stride)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, inputs, upstream) for result in (actual, expected))
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_a_map_without_gradient():
    """The rest gets its gradients all the same."""
    x, *parameters = random_tensors((2, 2, 2), (3, 3, 3), (3, 4, 2), 2, 3)
    results = []
    for image in (x, x.detach()):
        up_weight, up_bias, weight, bias = parameters
        result = upsample_conv3d(image, up_weight, up_bias, weight, bias, (2, 2, 2))
        results.append(torch.autograd.grad(result.square().sum(), parameters))
    for got, want in zip(*results):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16], ids=["float64", "autocast"])
def test_compiled_without_graph_breaks(precision):
    mixed = precision == torch.bfloat16
    tensors = random_tensors((2, 2, 2), (3, 3, 3), (3, 4, 2), 2, 3)
    if mixed:
        tensors = [tensor.detach().float().requires_grad_() for tensor in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(upsample_conv3d, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        results = [run(*tensors, (2, 2, 2)) for run in (upsample_conv3d, compiled)]
    assert results[1].dtype == precision
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(result.float().square().sum(), tensors) for result in results]
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want)


def test_large_maps_gain_and_small_wide_ones_do_not():
    assert phases_pay(48**3, (2, 2, 2), (3, 3, 3), 96)
    assert not phases_pay(6**3, (2, 2, 2), (3, 3, 3), 768)
    assert not phases_pay(48**3, (3, 2, 2), (3, 3, 3), 96)


def test_half_precision_stays_half_with_a_bias_in_float32():
    x, up_weight, up_bias = torch.randn(1, 4, 3, 3, 3), torch.randn(4, 4, 2, 2, 2), torch.randn(4)
    weight, bias = torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = upsample_conv3d(x, up_weight, up_bias, weight, bias, (2, 2, 2))
    exact = upsample_conv3d(x, up_weight, up_bias, weight, bias, (2, 2, 2))
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.03 * exact.abs().max()
