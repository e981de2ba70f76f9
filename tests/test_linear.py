"""Linear layers by convolution against PyTorch's own."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_hyspark.linear import IMAGES, Linear, images_for, layer_by_layer, linear, use_linear
from nnunetv2_hyspark.networks.vit import ViT

SHAPES = [(5,), (7, 5), (2, 3, 5), (4, 3, 4, 2, 5), (16, 5), (1, 1, 5)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)])
def test_values_and_gradients(dtype, tolerance, shape, bias):
    torch.manual_seed(0)
    weight, offset = torch.randn(6, 5, dtype=dtype), torch.randn(6, dtype=dtype)
    inputs = [torch.randn(shape, dtype=dtype), weight, *([offset] if bias else [])]
    gradient = torch.randn(*shape[:-1], 6, dtype=dtype)
    results = []
    for function in (linear, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        assert out.shape == gradient.shape and out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_any_memory_layout():
    """Voxels of a channels-last map, of a contiguous one, and of a part of one."""
    torch.manual_seed(0)
    layer = Linear(4, 3)
    whole = torch.randn(2, 4, 3, 5, 2)
    maps = whole, whole.contiguous(memory_format=torch.channels_last_3d), torch.randn(2, 8, 3, 5, 2)[:, ::2]
    for x in maps:
        voxels = x.permute(0, 2, 3, 4, 1)
        torch.testing.assert_close(layer(voxels), F.linear(voxels, layer.weight, layer.bias))


@pytest.mark.parametrize("threads, odd", [(1, 0), (2, 1)])
def test_where_it_serves(threads, odd):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        available = torch.backends.mkldnn.is_available()
        assert images_for(torch.randn(2, 16, 3)) == (IMAGES if available else 0)
        assert images_for(torch.randn(17, 3)) == (odd if available else 0)
    finally:
        torch.set_num_threads(before)
    assert not images_for(torch.randn(16, 3, dtype=torch.float64))
    assert not images_for(torch.randn(16, 3, dtype=torch.bfloat16))
    with torch.autocast("cpu"):
        assert not images_for(torch.randn(16, 3))
    with layer_by_layer():
        assert not images_for(torch.randn(16, 3))
    assert bool(images_for(torch.randn(16, 3))) == torch.backends.mkldnn.is_available()
    assert not images_for(torch.randn(0, 3))
    assert not images_for(torch.randn(16, 3, device="meta"))
    assert Linear(3, 2)(torch.randn(0, 3)).shape == (0, 2)


def test_what_is_compiled_is_one_graph():
    layer = Linear(3, 2)
    x = torch.randn(16, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_memory_on_gpus_is_counted_with_products_of_matrices():
    """The planner traces steps on the CPU in autocast; what serves there must not change a plan."""
    layer, operations = Linear(3, 2), []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Names():
        layer(torch.randn(16, 3)).sum().backward()
    assert torch.ops.aten.addmm in operations
    assert torch.ops.aten.convolution not in operations


def test_a_library_s_network_keeps_its_parameters():
    network = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 2, bias=False)))
    before, x = dict(network.named_parameters()), torch.randn(5, 3)
    expected = network(x)
    use_linear(network)
    assert isinstance(network[0], Linear) and isinstance(network[1][1], Linear)
    after = dict(network.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    torch.testing.assert_close(network(x), expected)


def test_the_transformer_uses_it():
    layers = [module for module in ViT(12, 2, 2).modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 8 and all(isinstance(layer, Linear) for layer in layers)
