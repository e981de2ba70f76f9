"""A small official HySparK, seeded: our features, loss and gradients with its weights."""
import functools

import pytest
import torch
from torch import nn

from nnunetv2_hyspark.linear import Linear
from nnunetv2_hyspark.networks.reconstruction import ReconstructionDecoder
from nnunetv2_hyspark.networks.segmentation import build_encoder
from nnunetv2_hyspark.networks.vit import sincos_position_embedding
from nnunetv2_hyspark.pretext.hyspark import HySparK, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.transfer.official import from_official, our_name

STRIDES = [(1, 1, 1)] + [(2, 2, 2)] * 4


def load(golden: dict, layout=BlockLayout, fuse_finest: bool = False) -> HySparK:
    """The official variant with the official weights, in train mode."""
    config = golden["config"]
    kernels = [(k,) * 3 for k in config["kernel_sizes"]]
    encoder = build_encoder(
        1, config["channels"], STRIDES, kernels, config["depths"], config["expansion"], config["vit_depth"],
        config["vit_heads"], 4.0,
    )
    reconstruction = ReconstructionDecoder(
        1, encoder.feature_channels, STRIDES, kernels, config["decoder_width"], fuse_finest=fuse_finest, norm="batch"
    )
    model = HySparK(encoder, reconstruction, layout)
    result = model.load_state_dict(from_official(golden["state_dict"]), strict=False)
    if not fuse_finest:
        assert not result.missing_keys
    return model.train()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_sparse_features(golden, layout):
    """At visible cells; elsewhere the official junction feature holds the ViT's mask token."""
    model, where = load(golden, layout), layout(golden["active"])
    with torch.no_grad():
        features = model.encoder(where.gather(golden["image"]), where)
    assert len(features) == len(golden["sparse_features"])
    at_visible = BlockLayout(golden["active"])
    for feature, stored in zip(features, golden["sparse_features"]):
        ours = where.scatter(feature)[:, : stored.shape[1]]
        assert ours.shape == stored.shape
        assert relative(at_visible.gather(ours), at_visible.gather(stored)) < 1e-5


def test_dense_features(golden):
    with torch.no_grad():
        features = load(golden).encoder(golden["image"])
    assert len(features) == len(golden["dense_features"])
    for feature, stored in zip(features, golden["dense_features"]):
        assert relative(feature[:, : stored.shape[1]], stored) < 1e-5


def batch_norms(model: HySparK) -> dict[str, nn.BatchNorm3d]:
    """Every batch norm is followed by a ReLU."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm3d)}


def check_loss_and_gradients(golden: dict, model: HySparK, dtype: torch.dtype) -> None:
    """Loss to 1e-5, the norm of every parameter's gradient to 1e-4."""
    image = golden["image"].to(dtype)
    loss = reconstruction_loss(image, model(image, golden["active"]), golden["active"])
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    loss.backward()
    ours = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    compared = set()
    for official, norm in golden["grad_norm"].items():
        name = our_name(official)
        if name is None:
            assert official.endswith("mae.mask_token") and norm == 0
            continue
        compared.add(name)
        if norm > 1e-6:
            assert ours[name] == pytest.approx(norm, rel=1e-4), name
        else:  # the batch norm that follows removes this bias: its gradient is zero but for rounding
            parent, index, kind = name.rsplit(".", 2)
            assert kind == "bias" and isinstance(modules[f"{parent}.{int(index) + 1}"], nn.BatchNorm3d), name
            assert norm < 1e-7 and ours[name] < 1e-7, name
    assert compared == set(ours)


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_loss_and_gradients_in_float64(golden, layout):
    check_loss_and_gradients(golden, load(golden, layout).double(), torch.float64)


def test_loss_and_gradients_of_the_reference_in_float32(golden):
    """Dense maps, PyTorch's own batch norm and linear layers: the official order of summation."""
    model = load(golden, DenseMaskLayout)
    for norm in batch_norms(model).values():
        norm.__class__ = nn.BatchNorm3d
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    check_loss_and_gradients(golden, model, torch.float32)


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
def test_loss_and_gradients_in_float32(golden, layout):
    """With every ReLU on the side where float64 has it.

    Another order of summation puts single ReLU inputs that lie within rounding of zero on the other side; each shifts
    the gradients below it by a few thousandths. They are put back, and may only be a handful of 1.5 million, all tiny.
    """
    exact: dict[str, torch.Tensor] = {}

    def remember(name, _module, _inputs, output):
        exact[name] = output.detach().float()

    flips: list[torch.Tensor] = []

    def put_back(name, _module, _inputs, output):
        flipped = (output > 0) != (exact[name] > 0)
        flips.append(output.detach()[flipped])
        return output + torch.where(flipped, exact[name] - output.detach(), 0)

    model = load(golden, layout).double()
    handles = [m.register_forward_hook(functools.partial(remember, n)) for n, m in batch_norms(model).items()]
    model(golden["image"].double(), golden["active"])
    for handle in handles:
        handle.remove()
    model = load(golden, layout)
    for name, module in batch_norms(model).items():
        module.register_forward_hook(functools.partial(put_back, name))
    check_loss_and_gradients(golden, model, torch.float32)
    assert sum(tensor.numel() for tensor in exact.values()) > 1_400_000
    assert torch.cat(flips).numel() <= 8
    assert all(tensor.abs().max() < 1e-5 for tensor in flips if tensor.numel())


def test_from_official_covers_every_key(golden):
    """Every key has a place, alone and of the right shape, or is known to have none."""
    converted = from_official(golden["state_dict"])
    dropped = {key for key in golden["state_dict"] if our_name(key) is None}
    assert len(converted) == len(golden["state_dict"]) - len(dropped)
    assert all(key.startswith("dense_decoder.fuse.0.") or ".mae." in key for key in dropped)
    assert {key for key in dropped if ".mae." in key} == {
        "sparse_encoder.mae.pos_embed", "sparse_encoder.mae.mask_token",
    }
    official_variant, ours = load(golden), load(golden, fuse_finest=True)
    unused = set(converted) - set(official_variant.state_dict())
    assert unused == {f"reconstruction.{n}" for n in ("projections.4.weight", "projections.4.bias", "mask_tokens.4")}
    missing = set(ours.state_dict()) - set(converted)
    assert missing and all(name.startswith("reconstruction.fuse.3.") for name in missing)
    for model in (official_variant, ours):
        for name, tensor in model.state_dict().items():
            assert name in missing or converted[name].shape == tensor.shape


def test_encoder_file(golden):
    """The official encoder file has the same names without their first part."""
    prefix = "sparse_encoder."
    bare = {k.removeprefix(prefix): v for k, v in golden["state_dict"].items() if k.startswith(prefix)}
    converted = from_official(bare)
    whole = from_official(golden["state_dict"])
    assert set(converted) == {name for name in whole if name.startswith("encoder.")}
    assert all(torch.equal(converted[name], whole[name]) for name in converted)


def test_positions(golden):
    """Computed positions are the official table."""
    table = golden["state_dict"]["sparse_encoder.mae.pos_embed"][0]
    torch.testing.assert_close(
        sincos_position_embedding(torch.arange(27), (3, 3, 3), table.shape[1]), table, rtol=0, atol=1e-6
    )


def test_foreign_names_are_refused():
    with pytest.raises(ValueError, match="'network.conv.weight' is no parameter of the official HySparK release"):
        our_name("network.conv.weight")
