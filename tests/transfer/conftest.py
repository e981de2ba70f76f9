"""Small networks and checkpoints of the same make as real ones."""
import copy

import pytest
import torch

from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import NETWORK_CLASS
from nnunetv2_hyspark.transfer.description import FORMAT_VERSION

ARCHITECTURE = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 12],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "n_blocks_per_stage": [1, 2, 1],
    "expansion_per_stage": [2, 3, 2],
    "transformer_depth": 2,
    "transformer_heads": 2,
    "mlp_ratio": 2.0,
    "n_blocks_per_stage_decoder": [1, 1],
    "expansion_decoder": 2,
}


@pytest.fixture(scope="session")
def architecture():
    """A copy of the small network's ``arch_kwargs``, with changes."""
    return lambda **changes: {**copy.deepcopy(ARCHITECTURE), **changes}


@pytest.fixture(scope="session")
def make_network(architecture):
    """Makes a seeded network; every weight is random, biases and norms too."""

    def make(seed: int = 0, channels: int = 1, classes: int = 2, **changes) -> HySparKUNet:
        torch.manual_seed(seed)
        network = HySparKUNet(channels, classes, **architecture(**changes)).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return network

    return make


@pytest.fixture(scope="session")
def make_checkpoint(architecture):
    """Wraps a network's weights as a pre-training checkpoint does."""

    def make(network: HySparKUNet, **changes) -> dict:
        return {
            "network_weights": {name: tensor.clone() for name, tensor in network.state_dict().items()},
            "hyspark": {
                "format_version": FORMAT_VERSION,
                "kind": "pretraining",
                "architecture": {"network_class_name": NETWORK_CLASS, "arch_kwargs": architecture(**changes)},
            },
        }

    return make


@pytest.fixture(scope="session")
def image():
    """``(1, 1, 8, 8, 8)``."""
    return torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(5))
