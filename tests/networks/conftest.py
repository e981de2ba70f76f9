"""Small encoders of the same make as the paper's."""
import pytest
import torch

from nnunetv2_hyspark.networks.encoder import HybridEncoder
from nnunetv2_hyspark.networks.segmentation import build_encoder

TOPOLOGIES = {
    "isotropic": {
        "features_per_stage": [4, 6, 12],
        "strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)],
        "kernel_sizes": [(3, 3, 3)] * 3,
        "n_blocks_per_stage": [1, 2, 1],
        "expansion_per_stage": [2, 3, 2],
    },
    "anisotropic": {
        "features_per_stage": [2, 4, 6, 12],
        "strides": [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)],
        "kernel_sizes": [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 5, 1)],
        "n_blocks_per_stage": [1, 1, 1, 1],
        "expansion_per_stage": [2, 2, 2, 2],
    },
    "two stages": {
        "features_per_stage": [4, 6],
        "strides": [(1, 1, 1), (1, 3, 2)],
        "kernel_sizes": [(5, 5, 5), (3, 3, 3)],
        "n_blocks_per_stage": [0, 1],
        "expansion_per_stage": [2, 2],
    },
}


def _small_encoder(topology: str = "isotropic", channels: int = 1, depth: int = 2, **changes) -> HybridEncoder:
    torch.manual_seed(0)
    kwargs = {**TOPOLOGIES[topology], **changes}
    return build_encoder(channels, **kwargs, transformer_depth=depth, transformer_heads=2, mlp_ratio=2.0).double()


@pytest.fixture(scope="session")
def small_encoder():
    """Makes a seeded float64 encoder: name of the topology, image channels, transformer depth, changed arguments."""
    return _small_encoder


@pytest.fixture(params=list(TOPOLOGIES))
def topology(request) -> str:
    """Each of the small topologies."""
    return request.param
