"""nnU-Net's encoders run sparsely, unchanged, and equal dense-then-mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_hyspark.networks.segmentation import HySparKUNet, build_encoder
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.sparse.carried import SparseMap

STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2)]
KERNELS = [(1, 3, 3), (3, 3, 3), (3, 3, 3)]
SIZE = (4, 12, 8)


def encoder(kind: str, depth: int = 1):
    torch.manual_seed(0)
    return build_encoder(2, [4, 6, 12], STRIDES, KERNELS, [1, 2, 2], [2, 2, 2], depth, 2, 2.0, kind).double()


def draw(batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(batch, 2, 3, 2, generator=generator) < 0.4
    visible[:, 0, 0, 0] = True
    return torch.randn(batch, 2, *SIZE, generator=generator, dtype=torch.float64), visible


@pytest.mark.parametrize("kind", ["residual", "plain", "mednext"])
def test_blocks_equal_dense_then_mask(kind):
    network = encoder(kind)
    image, visible = draw()
    results = []
    for layout in (BlockLayout(visible), DenseMaskLayout(visible)):
        features = [layout.scatter(f) for f in network(layout.gather(image), layout)]
        loss = sum(f.square().mean() for f in features)
        results.append([*features, *torch.autograd.grad(loss, list(network.parameters()))])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_everything_visible_equals_dense_and_masked_voxels_change_nothing(kind):
    network = encoder(kind)
    image, visible = draw()
    layout = BlockLayout(torch.ones_like(visible))
    for sparse, dense in zip(network(layout.gather(image), layout), network(image)):
        torch.testing.assert_close(layout.scatter(sparse), dense, rtol=1e-9, atol=1e-10)
    layout = BlockLayout(visible)
    poisoned = DenseMaskLayout(visible).scatter(image, torch.full((2,), float("nan"), dtype=torch.float64))
    for clean, other in zip(network(layout.gather(image), layout), network(layout.gather(poisoned), layout)):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("decoder", ["segmentation", "reconstruction"])
@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_pre_trains_and_segments(kind, decoder):
    config = ArchitectureConfig(cnn=kind, base_width=4, head_width=4, transformer_depth=1)
    kwargs = derive_arch_kwargs(STRIDES, KERNELS, config)
    assert kwargs["cnn"] == kind
    model = build_hyspark(2, kwargs, HySparKConfig(decoder=decoder)).double()
    image, visible = draw()
    loss = reconstruction_loss(image, model(image, visible), visible)
    for name, gradient in zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))):
        assert gradient.isfinite().all(), name
    network = HySparKUNet(2, 3, **kwargs, deep_supervision=True).double()
    network.encoder.load_state_dict(model.encoder.state_dict())
    assert [tuple(o.shape[2:]) for o in network(image)] == [SIZE, (4, 6, 4)]
    assert network.compute_conv_feature_map_size(SIZE) > 0


def test_what_would_mix_masked_voxels_in_is_refused():
    image, visible = draw()
    layout = BlockLayout(visible)
    x = SparseMap(layout.gather(image), layout)
    for network, error, message in (
        (nn.Conv3d(2, 2, 3, dtype=torch.float64), ValueError, r"sparse maps need odd kernels, padding \(1, 1, 1\)"),
        (nn.MaxPool3d(2, 1), ValueError, "sparse maps need the window to be the stride"),
        (nn.GroupNorm(1, 2), TypeError, "^group_norm is not known for sparse maps; known are 3D convolutions"),
    ):
        with pytest.raises(error, match=message):
            network(x)
    with pytest.raises(TypeError, match="^interpolate is not known for sparse maps; known are 3D convolutions"):
        F.interpolate(x, scale_factor=2)
    with pytest.raises(TypeError, match="^conv3d got its sparse map as another argument than the first one"):
        F.conv3d(image, x)
    with pytest.raises(ValueError, match="expected 'mednext', 'residual' or 'plain'"):
        encoder("resnet")
