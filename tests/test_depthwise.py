"""Gradients of depthwise convolutions against PyTorch's own, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nnunetv2_hyspark.depthwise import depthwise_conv3d, has_fast_gradients, input_gradient, weight_gradient
from nnunetv2_hyspark.networks.convolution import Conv3d


def tensors(samples, channels, size, kernel, padding, channels_last=True):
    """Input, weight, bias and gradient of the output, float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, *size, generator=generator)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, 1, *kernel, generator=generator)
    bias = torch.randn(channels, generator=generator)
    out = [s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel)]
    return x, weight, bias, torch.randn(samples, channels, *out, generator=generator)


def reference(x, weight, bias, grad, padding):
    """Output and gradients by PyTorch in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    out = F.conv3d(*leaves, padding=padding, groups=len(weight))
    return out, torch.autograd.grad(out, leaves, grad.double())


def assert_close(found, wanted):
    """Equal to float32's rounding, on the scale of the whole tensor."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= 3e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 5), (5, 3, 1)])
@pytest.mark.parametrize("channels", [8, 16, 20, 48])
@pytest.mark.parametrize("same", [True, False])
def test_values_and_gradients(same, channels, kernel, channels_last):
    padding = tuple(k // 2 for k in kernel) if same else (0, 0, 0)
    x, weight, bias, grad = tensors(2, channels, (6, 5, 7), kernel, padding, channels_last)
    assert has_fast_gradients(x, weight, channels)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = depthwise_conv3d(*leaves, padding)
    wanted, gradients = reference(x, weight, bias, grad, padding)
    assert_close(out.detach(), wanted.detach())
    for found, expected in zip(torch.autograd.grad(out, leaves, grad), gradients):
        assert_close(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 3),
    channels=st.sampled_from([2, 16, 32]),
    size=st.tuples(*[st.integers(1, 6)] * 3),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5, 7])] * 3),
    data=st.data(),
)
def test_gradients_of_any_form(samples, channels, size, kernel, data):
    """Kernels larger than the map and any padding that leaves an output."""
    padding = tuple(data.draw(st.integers(max(0, -((s - k) // 2)), k - 1)) for s, k in zip(size, kernel))
    x, weight, bias, grad = tensors(samples, channels, size, kernel, padding)
    _, (grad_x, grad_weight, _) = reference(x, weight, bias, grad, padding)
    assert_close(input_gradient(grad, weight, padding), grad_x)
    assert_close(weight_gradient(x, grad, weight, padding), grad_weight)


def test_autocast_is_left_to_pytorch():
    """Its output is in half precision, and so is the gradient that comes back."""
    convolution = Conv3d(16, 16, (3, 3, 3), groups=16)
    x = torch.randn(1, 16, 4, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = convolution(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and convolution.weight.grad is not None


def test_only_what_is_asked_for():
    """Frozen weights get no gradient, and nothing is kept where no gradients are recorded."""
    x, weight, bias, grad = tensors(1, 16, (4, 4, 4), (3, 3, 3), (1, 1, 1))
    x.requires_grad_()
    depthwise_conv3d(x, weight, bias, (1, 1, 1)).backward(grad)
    assert x.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert depthwise_conv3d(x, weight.requires_grad_(), bias, (1, 1, 1)).grad_fn is None
    assert depthwise_conv3d(x, weight, None, (1, 1, 1)).shape == x.shape


def test_a_second_derivative_is_refused():
    """Rather than taken for zero."""
    x, weight, bias, _ = tensors(1, 16, (4, 4, 4), (3, 3, 3), (1, 1, 1))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(depthwise_conv3d(x, weight, bias, (1, 1, 1)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "x, weight, groups",
    [
        (torch.zeros(1, 16, 4, 4, 4, dtype=torch.float64), torch.zeros(16, 1, 3, 3, 3, dtype=torch.float64), 16),
        (torch.zeros(1, 16, 4, 4, 4, dtype=torch.bfloat16), torch.zeros(16, 1, 3, 3, 3, dtype=torch.bfloat16), 16),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), 1),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(32, 1, 3, 3, 3), 16),
        (torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 3, 3, 3), 1),
        (torch.zeros(1, 16, 4, 4, 4, device="meta"), torch.zeros(16, 1, 3, 3, 3, device="meta"), 16),
    ],
)
def test_left_to_pytorch(x, weight, groups):
    """Other types, other convolutions, other devices."""
    assert not has_fast_gradients(x, weight, groups)
