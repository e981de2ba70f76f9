"""A small pre-training model of the same make as the paper's."""
import pytest
import torch

from nnunetv2_hyspark.networks.reconstruction import ReconstructionDecoder, TransferableDecoder
from nnunetv2_hyspark.networks.segmentation import MedNeXtDecoder, build_encoder
from nnunetv2_hyspark.pretext.hyspark import HySparK
from nnunetv2_hyspark.sparse import BlockLayout

STRIDES = {
    "isotropic": [(1, 1, 1), (2, 2, 2), (2, 2, 2)],
    "anisotropic": [(1, 1, 1), (1, 2, 2), (2, 2, 2)],
}


def _make_model(
    topology="isotropic", channels=1, depth=2, fuse_finest=True, norm="instance", layout=BlockLayout, hidden="zero",
    skips="concatenate", bottom_up=True, decoder="reconstruction",
) -> HySparK:
    torch.manual_seed(0)
    strides = STRIDES[topology]
    kernels = [(1, 3, 3) if topology == "anisotropic" else (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    encoder = build_encoder(channels, [4, 6, 12], strides, kernels, [1, 2, 1], [2, 3, 2], depth, 2, 2.0)
    if decoder == "segmentation":
        transferred = MedNeXtDecoder(encoder, 0, [4, 6], kernels[:-1], [1, 1], 2, deep_supervision=False)
        reconstruction = TransferableDecoder(channels, encoder.feature_channels, transferred, 4)
    else:
        reconstruction = ReconstructionDecoder(
            channels, encoder.feature_channels, strides, kernels, 8, fuse_finest, norm, skips
        )
    return HySparK(encoder, reconstruction, layout, hidden, bottom_up).double()


@pytest.fixture(scope="session")
def make_model():
    """Makes a seeded float64 model with 4x4x4 (anisotropic: 2x4x4) junction cells."""
    return _make_model


@pytest.fixture(scope="session")
def batch():
    """Images and Bernoulli masks with unequal counts; every sample has visible and masked cells."""

    def make(model: HySparK, batch_size: int = 3, grid=(2, 3, 2), channels: int = 1):
        source = torch.Generator().manual_seed(11)
        size = [g * s for g, s in zip(grid, model.encoder.junction_stride)]
        image = torch.randn(batch_size, channels, *size, generator=source, dtype=torch.float64)
        visible = torch.rand(batch_size, *grid, generator=source) < 0.4
        visible[:, 0, 0, 0], visible[:, -1, -1, -1] = True, False
        return image, visible

    return make
