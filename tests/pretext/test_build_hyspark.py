"""From a segmentation network's arguments to the model that pre-trains its encoder."""
import pytest
import torch

from nnunetv2_hyspark.masking import random_visible
from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig
from nnunetv2_hyspark.sparse import DenseMaskLayout

ISOTROPIC = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]


def arch_kwargs(strides) -> dict:
    config = ArchitectureConfig(base_width=4, head_width=3, transformer_depth=1)
    return derive_arch_kwargs(strides, [[3, 3, 3]] * len(strides), config)


@pytest.mark.parametrize("fuse_finest", [True, False])
@pytest.mark.parametrize("strides, size", [(ISOTROPIC, (16, 8, 16)), (ANISOTROPIC, (4, 32, 16))])
def test_model_of_a_plan(strides, size, fuse_finest):
    model = build_hyspark(2, arch_kwargs(strides), HySparKConfig(decoder="reconstruction", fuse_finest=fuse_finest))
    visible = random_visible(2, model.encoder.grid(size), 0.5, torch.Generator().manual_seed(0))
    image = torch.randn(2, 2, *size)
    assert model(image, visible).shape == image.shape


@pytest.mark.parametrize("decoder", ["segmentation", "reconstruction"])
@pytest.mark.parametrize("strides", [ISOTROPIC, ANISOTROPIC])
def test_the_encoder_is_the_segmentation_network_s(strides, decoder):
    """Same names, same shapes, same dense features: weights move without translation."""
    kwargs = arch_kwargs(strides)
    model, network = build_hyspark(1, kwargs, HySparKConfig(decoder=decoder)), HySparKUNet(1, 3, **kwargs)
    network.encoder.load_state_dict(model.encoder.state_dict())
    image = torch.randn(1, 1, 8, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(image), network.encoder(image)))


@pytest.mark.parametrize(
    "features, expected", [([32, 64, 128, 256, 384], 256), ([4, 8, 16, 30], 16), ([8, 12], 8), ([1, 6], 2)]
)
def test_default_decoder_width(features, expected):
    """The finest scale gets half of the first stage's width (256 at the junction of the paper's encoder)."""
    n = len(features)
    strides = [[1, 1, 1], *[[2, 2, 2]] * (n - 1)]
    kwargs = {
        "features_per_stage": features, "strides": strides, "kernel_sizes": [[3, 3, 3]] * n,
        "n_blocks_per_stage": [1] * n, "expansion_per_stage": [2] * n, "transformer_depth": 1, "transformer_heads": 1,
    }
    with torch.device("meta"):
        model = build_hyspark(1, kwargs, HySparKConfig(decoder="reconstruction"))
    assert model.reconstruction.projections[0].out_channels == expected
    assert model.reconstruction.head.in_channels == expected // 2 ** (n - 1) == max(features[0] // 2, 1)


def test_chosen_decoder_width():
    model = build_hyspark(1, arch_kwargs(ISOTROPIC), HySparKConfig(decoder="reconstruction", decoder_width=16))
    assert [p.out_channels for p in model.reconstruction.projections] == [16, 8, 4, 2]


@pytest.mark.parametrize("strides", [ISOTROPIC, ANISOTROPIC])
def test_segmentation_decoder(strides):
    """Same names and shapes as in the segmentation network, its segmentation layers aside."""
    kwargs = arch_kwargs(strides)
    model = build_hyspark(2, kwargs, HySparKConfig(decoder="segmentation"))
    ours = {name: tensor.shape for name, tensor in model.reconstruction.decoder.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in HySparKUNet(2, 3, **kwargs).decoder.state_dict().items()}
    assert ours == {name: shape for name, shape in theirs.items() if not name.startswith("seg_layers.")}
    visible = random_visible(1, (2, 1, 1), 0.5, torch.Generator().manual_seed(0))
    image = torch.randn(1, 2, *(g * s for g, s in zip((2, 1, 1), model.encoder.junction_stride)))
    assert model(image, visible).shape == image.shape


def test_decoder_width_that_can_not_be_halved():
    with pytest.raises(ValueError, match="decoder_width is 12; with 4 scales it must be a multiple of 8"):
        build_hyspark(1, arch_kwargs(ISOTROPIC), HySparKConfig(decoder="reconstruction", decoder_width=12))


def test_norm_and_layout_are_passed_on():
    config = HySparKConfig(decoder="reconstruction", decoder_norm="batch")
    model = build_hyspark(1, arch_kwargs(ISOTROPIC), config, DenseMaskLayout)
    assert model.layout is DenseMaskLayout
    assert any(isinstance(module, torch.nn.BatchNorm3d) for module in model.reconstruction.modules())
