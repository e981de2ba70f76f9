"""Up-sampling and fusion as one against one after the other."""
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_hyspark.networks.convolution import Conv3d
from nnunetv2_hyspark.networks.fusion import upsample_and_fuse


def layers(stride, below=5, width=4, skip=6):
    torch.manual_seed(0)
    return nn.ConvTranspose3d(below, width, stride, stride), nn.Conv3d(width + skip, 3, 1)


def maps(stride, batch=2, below=5, skip=6):
    generator = torch.Generator().manual_seed(1)
    coarse = (2, 3, 4)
    fine = [n * s for n, s in zip(coarse, stride)]
    x = torch.randn(batch, below, *coarse, generator=generator)
    return x, torch.randn(batch, skip, *fine, generator=generator)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 1), (3, 1, 2)], ids=str)
def test_values_and_gradients(stride, channels_last, threads):
    up, fuse = layers(stride)
    inputs = maps(stride)
    if channels_last:
        inputs = [t.contiguous(memory_format=torch.channels_last_3d) for t in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = upsample_and_fuse(*leaves, up, fuse)
        grad = torch.randn(out.shape)
        found = torch.autograd.grad(out, [*leaves, *up.parameters(), *fuse.parameters()], grad)
    finally:
        torch.set_num_threads(before)
    up, fuse = up.double(), fuse.double()
    doubles = [t.double().requires_grad_() for t in inputs]
    wanted_out = fuse(torch.cat([up(doubles[0]), doubles[1]], 1))
    wanted = torch.autograd.grad(wanted_out, [*doubles, *up.parameters(), *fuse.parameters()], grad.double())
    for got, want in zip([out, *found], [wanted_out, *wanted]):
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


class Operations(TorchDispatchMode):
    """Names of what runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["float64", "autocast", "no bias"])
def test_where_layers_run_one_after_the_other(case):
    up, fuse = layers((2, 2, 2))
    x, skip = maps((2, 2, 2))
    if case == "float64":
        up, fuse, x, skip = up.double(), fuse.double(), x.double(), skip.double()
    if case == "no bias":
        up = nn.ConvTranspose3d(5, 4, 2, 2, bias=False)
    with torch.autocast("cpu", enabled=case == "autocast"), Operations() as ran:
        out = upsample_and_fuse(x, skip, up, fuse)
    assert torch.ops.aten.cat in ran.names
    with torch.autocast("cpu", enabled=case == "autocast"):
        torch.testing.assert_close(out, fuse(torch.cat([up(x), skip], 1)))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_nothing_is_concatenated_in_float32():
    with Operations() as ran:
        out = upsample_and_fuse(*maps((2, 2, 2)), *layers((2, 2, 2)))
    assert torch.ops.aten.cat not in ran.names
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("size", [(4, 4, 8), (2, 4, 8), (4, 6, 16)])
def test_a_skip_of_another_size_is_refused(size):
    """Also one with as many voxels."""
    up, fuse = layers((2, 2, 2))
    with pytest.raises(ValueError, match=r"the skip feature has .* voxels; expected \(4, 6, 8\)"):
        upsample_and_fuse(maps((2, 2, 2))[0], torch.randn(2, 6, *size), up, fuse)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_kernel_of_one_keeps_channels_last_memory(batch, threads):
    """Also with one thread, where PyTorch's convolution does not."""
    torch.manual_seed(0)
    layer = Conv3d(6, 4, (1, 1, 1))
    x = torch.randn(batch, 6, 5, 4, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        last = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        out = layer(last)
        assert out.is_contiguous(memory_format=torch.channels_last_3d)
        grads = torch.autograd.grad(out.square().sum(), [last, *layer.parameters()])
    finally:
        torch.set_num_threads(before)
    plain = x.clone().requires_grad_()
    expected = nn.functional.conv3d(plain, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), [plain, *layer.parameters()])):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
