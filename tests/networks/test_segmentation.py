"""The segmentation network and nnU-Net's contract."""
import inspect

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import NETWORK_CLASS, ArchitectureConfig, derive_arch_kwargs

PLANS = {  # strides, kernel sizes, patch size
    "isotropic": ([[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 3, (8, 16, 8)),
    "anisotropic": (
        [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], (4, 16, 8)
    ),
    "6 stages, cut at 16": (
        [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], [[3, 3, 3]] * 6, (4, 32, 32)
    ),
}
SMALL = ArchitectureConfig(base_width=4, head_width=4, transformer_depth=1)


@pytest.fixture(params=list(PLANS))
def plan(request):
    strides, kernel_sizes, patch = PLANS[request.param]
    return derive_arch_kwargs(strides, kernel_sizes, SMALL), patch


def build(kwargs: dict, channels: int = 2, classes: int = 3, deep_supervision=False) -> HySparKUNet:
    torch.manual_seed(0)
    return get_network_from_plans(
        NETWORK_CLASS, kwargs, [], channels, classes, allow_init=True, deep_supervision=deep_supervision
    )


def counted_by_hooks(network: nn.Module, image: torch.Tensor) -> int:
    """Elements that convolutions and linear layers put out in one forward pass."""
    total = 0

    def count(_module, _inputs, output):
        nonlocal total
        total += output.numel()

    for module in network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(image)
    return total


def test_shapes(plan):
    kwargs, patch = plan
    network, image = build(kwargs), torch.randn(2, 2, *patch)
    assert isinstance(network, HySparKUNet)
    assert network(image).shape == (2, 3, *patch)


def test_deep_supervision(plan):
    """One output per skip scale, finest first, each of its scale's size; nnU-Net switches it on the decoder."""
    kwargs, patch = plan
    network, image = build(kwargs, deep_supervision=True), torch.randn(1, 2, *patch)
    assert network.decoder.deep_supervision is True
    outputs = network(image)
    size, expected = list(patch), []
    for stride in kwargs["strides"][:-1]:
        size = [s // t for s, t in zip(size, stride)]
        expected.append((1, 3, *size))
    assert [tuple(out.shape) for out in outputs] == expected
    network.decoder.deep_supervision = False
    assert torch.equal(network(image), outputs[0])


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_every_parameter_is_trained(plan, deep_supervision):
    """With deep supervision all; without, all but the coarser segmentation layers, which nnU-Net leaves idle too."""
    kwargs, patch = plan
    network = build(kwargs, deep_supervision=deep_supervision)
    outputs = network(torch.randn(2, 2, *patch))
    sum(out.square().sum() for out in (outputs if deep_supervision else [outputs])).backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    coarse = range(len(kwargs["strides"]) - 2)
    expected = {f"decoder.seg_layers.{n}.{kind}" for n in coarse for kind in ("weight", "bias")}
    assert idle == (set() if deep_supervision else expected)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("depth", [0, 2])
def test_feature_map_size_is_what_layers_put_out(plan, depth, deep_supervision):
    kwargs, patch = plan
    network = build({**kwargs, "transformer_depth": depth}, deep_supervision=deep_supervision)
    size = network.compute_conv_feature_map_size(patch)
    assert size > 0
    # in float64, where no layers are merged
    assert size == counted_by_hooks(network.double(), torch.randn(1, 2, *patch, dtype=torch.float64))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_nnunet_counts_the_same_way(deep_supervision):
    """The convention above is nnU-Net's own, so its planner compares like with like."""
    network = PlainConvUNet(
        2, 3, [4, 8, 12], nn.Conv3d, [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [2, 2, 2], 3,
        [2, 2], deep_supervision=deep_supervision,
    )
    assert network.compute_conv_feature_map_size((4, 16, 8)) == counted_by_hooks(network, torch.randn(1, 2, 4, 16, 8))


@pytest.mark.parametrize("patch", [[4, 16, 8], torch.tensor([4, 16, 8]).numpy()])
def test_feature_map_size_takes_what_the_planner_gives(patch):
    strides, kernel_sizes, size = PLANS["anisotropic"]
    network = build(derive_arch_kwargs(strides, kernel_sizes, SMALL))
    assert network.compute_conv_feature_map_size(patch) == network.compute_conv_feature_map_size(size)


def test_signature_is_nnunet_s():
    """Every derived value is an argument, and nnU-Net's own are there."""
    parameters = inspect.signature(HySparKUNet).parameters
    kwargs = derive_arch_kwargs(*PLANS["isotropic"][:2], SMALL)
    own = {"input_channels", "num_classes", "deep_supervision", "cnn"}
    assert own | set(kwargs) == set(parameters)


def test_segmentation_layers_have_nnunet_s_name():
    """nnU-Net skips keys with ``.seg_layers.`` when it loads pre-trained weights; nothing else may be skipped."""
    network = build(derive_arch_kwargs(*PLANS["isotropic"][:2], SMALL))
    skipped = [key for key in network.state_dict() if ".seg_layers." in key]
    assert skipped and all(key.startswith("decoder.") for key in skipped)
    wider = build(derive_arch_kwargs(*PLANS["isotropic"][:2], SMALL), classes=7)
    for key, tensor in wider.state_dict().items():
        assert (tensor.shape == network.state_dict()[key].shape) == (".seg_layers." not in key)


def test_batch_equals_one_by_one(plan):
    kwargs, patch = plan
    network, image = build(kwargs).double(), torch.randn(3, 2, *patch, dtype=torch.float64)
    alone = torch.cat([network(one[None]) for one in image])
    torch.testing.assert_close(network(image), alone, rtol=1e-11, atol=1e-11)


def test_other_image_sizes(plan):
    """Fully convolutional down to the junction, and the transformer takes any grid."""
    kwargs, patch = plan
    network, larger = build(kwargs), tuple(2 * edge for edge in patch)
    assert network(torch.randn(1, 2, *larger)).shape == (1, 3, *larger)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_stages": 4}, "features_per_stage has 3 entries for n_stages = 4"),
        ({"n_blocks_per_stage_decoder": [1]}, r"n_blocks_per_stage_decoder has 1 entries; expected n_stages - 1 = 2"),
        ({"n_blocks_per_stage": [1]}, "n_blocks_per_stage has 1 entries for 3 stages"),
        ({"expansion_per_stage": [2] * 4}, "expansion_per_stage has 4 entries for 3 stages"),
        ({"strides": [[1, 1, 1]]}, "strides has 1 entries for 3 stages"),
        ({"kernel_sizes": [[3, 3, 3]]}, "kernel_sizes has 1 entries for 3 stages"),
        ({"transformer_heads": 5}, "channels wide with 5 heads"),
    ],
)
def test_impossible_networks_are_refused(changes, message):
    kwargs = derive_arch_kwargs(*PLANS["isotropic"][:2], SMALL)
    with pytest.raises(ValueError, match=message):
        build({**kwargs, **changes})


def test_paper_encoder_has_the_paper_s_size():
    """Built without memory: the CNN and ViT of 32 to 384 channels."""
    kwargs = derive_arch_kwargs([[1, 1, 1], *[[2, 2, 2]] * 4], [[3, 3, 3]] * 5, ArchitectureConfig())
    with torch.device("meta"):
        network = HySparKUNet(1, 14, **kwargs)
    assert network.encoder.feature_channels == [64, 128, 256, 384, 384]
    assert network.encoder.junction_stride == (16, 16, 16)
    blocks = network.encoder.transformer.blocks
    assert len(blocks) == 3 and blocks[0].attn.num_heads == 12 and blocks[0].mlp.fc1.out_features == 4 * 384


def test_networks_can_be_traced_and_stored_for_other_programs(plan, tmp_path, monkeypatch):
    """TorchScript cannot hold functions written in Python, such as those that serve on CPUs otherwise."""
    kwargs, patch = plan
    monkeypatch.setattr("nnunetv2_hyspark.inverted_bottleneck.EXPANDED", 2**8)
    network = build(kwargs).eval()
    image = torch.randn(1, 2, *patch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(image)
        torch.jit.save(torch.jit.trace(network, image), tmp_path / "network.pt")
        found = torch.jit.load(tmp_path / "network.pt")(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
