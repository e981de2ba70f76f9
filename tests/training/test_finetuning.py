"""Which parameter is trained at which rate."""
import pytest
import torch

from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.training.finetuning import FinetuningConfig, encoder_depth, parameter_groups
from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule


@pytest.fixture(scope="module")
def network() -> HySparKUNet:
    torch.manual_seed(0)
    return HySparKUNet(
        1, 2, 3, [4, 6, 12], [[1] * 3, [2] * 3, [2] * 3], [[3] * 3] * 3, [1, 2, 1], [2, 2, 2], 1, 2, [1, 1], 2.0, 2
    )


def names_of(network, groups) -> dict[str, dict]:
    by_id = {id(parameter): name for name, parameter in network.named_parameters()}
    return {by_id[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_one_group(network, layer_decay):
    groups = parameter_groups(network, FinetuningConfig(layer_decay=layer_decay))
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    found = names_of(network, groups)
    assert set(found) == {name for name, _ in network.named_parameters()}
    for name, group in found.items():
        assert group["weight_decay"] == (0.05 if network.get_parameter(name).ndim > 1 else 0.0)
        assert group["name"].startswith("encoder" if name.startswith("encoder.") else "decoder")


def test_encoder_and_decoder_rates(network):
    found = names_of(network, parameter_groups(network, FinetuningConfig(encoder_lr_scale=0.1)))
    for name, group in found.items():
        assert group["lr_scale"] == (0.1 if name.startswith("encoder.") else 1.0)


def test_layer_decay(network):
    """One factor per stage away from the decoder: the transformer none, the junction's stage one, the stem most."""
    found = names_of(network, parameter_groups(network, FinetuningConfig(layer_decay=0.5, encoder_lr_scale=0.8)))
    expected = {
        "encoder.transformer.norm.weight": 0.8,
        "encoder.cnn.stages.2.0.norm.weight": 0.4,
        "encoder.cnn.widen.1.weight": 0.2,
        "encoder.cnn.stages.1.1.expand.weight": 0.2,
        "encoder.cnn.stages.0.0.depthwise.bias": 0.1,
        "encoder.cnn.stem.weight": 0.1,
        "decoder.seg_layers.0.weight": 1.0,
    }
    for name, scale in expected.items():
        assert found[name]["lr_scale"] == pytest.approx(scale), name
    assert {g["name"] for g in found.values()} == {"decoder", *(f"encoder-{d}" for d in range(4))}


def test_depth_of_names():
    names = ["transformer.blocks.0.norm1.weight", "cnn.stages.4.0.norm.bias", "cnn.widen.3.weight", "cnn.stem.bias"]
    assert [encoder_depth(name, 5) for name in names] == [0, 1, 2, 5]


def train(network, config, steps, iterations_per_epoch=2, epochs=4):
    """Steps of AdamW on the sum of the outputs; returns which parameters changed, per step."""
    optimizer = torch.optim.AdamW(parameter_groups(network, config), lr=config.learning_rate)
    schedule = WarmupCosineSchedule(
        optimizer, config.learning_rate, epochs, 0, iterations_per_epoch, config.frozen_epochs
    )
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    changed = []
    for step in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        schedule.set_step(step)
        optimizer.zero_grad()
        (network(image)[:, 0] ** 2).mean().backward()
        optimizer.step()
        changed.append({name for name, p in network.named_parameters() if not torch.equal(p, before[name])})
    return changed


def test_frozen_encoder_then_not(network):
    """Two epochs of two steps: not one encoder weight moves, weight decay included; then all parts do."""
    changed = train(network, FinetuningConfig(frozen_epochs=2, weight_decay=0.5), 5)
    for step in range(4):
        assert changed[step] and all(name.startswith("decoder.") for name in changed[step])
    assert any(name.startswith("encoder.cnn.stem") for name in changed[4])
    assert any(name.startswith("encoder.transformer") for name in changed[4])


def test_linear_probe(network):
    """encoder_lr_scale=0 trains the decoder only, for good."""
    for names in train(network, FinetuningConfig(encoder_lr_scale=0), 6):
        assert names and all(name.startswith("decoder.") for name in names)
