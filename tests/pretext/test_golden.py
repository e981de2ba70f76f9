"""A small official HySparK, seeded: our features, loss and gradients with its weights."""
import pytest
import torch
from torch import nn

from nnunetv2_hyspark.networks.reconstruction import ReconstructionDecoder
from nnunetv2_hyspark.networks.segmentation import build_encoder
from nnunetv2_hyspark.networks.vit import sincos_position_embedding
from nnunetv2_hyspark.pretext.hyspark import HySparK, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout
from nnunetv2_hyspark.transfer.official import from_official, our_name

STRIDES = [(1, 1, 1)] + [(2, 2, 2)] * 4


@pytest.fixture(scope="module")
def golden(shared_data):
    """The stored run; its mask without the channel axis."""
    path = shared_data / "golden" / "official_mini.pt"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    stored = torch.load(path, weights_only=True)
    return {**stored, "active": stored["active"][:, 0]}


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


@pytest.mark.parametrize("layout", [BlockLayout, DenseMaskLayout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients(golden, layout, dtype):
    """Loss to 1e-5; gradient norms to 1e-4 in float64, to 1e-2 in float32."""
    model = load(golden, layout).to(dtype)
    image = golden["image"].to(dtype)
    loss = reconstruction_loss(image, model(image, golden["active"]), golden["active"])
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    loss.backward()
    # In float32 our order of summation puts single ReLU inputs that lie within rounding of zero (one in fuse.1, one in
    # dec.3) on the other side; each shifts the gradients below it by a few thousandths. In float64 none flips.
    tolerance = 1e-2 if dtype == torch.float32 else 1e-4
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
            assert ours[name] == pytest.approx(norm, rel=tolerance), name
        else:  # the batch norm that follows removes this bias: its gradient is zero but for rounding
            parent, index, kind = name.rsplit(".", 2)
            assert kind == "bias" and isinstance(modules[f"{parent}.{int(index) + 1}"], nn.BatchNorm3d), name
            assert norm < 1e-7 and ours[name] < 1e-7, name
    assert compared == set(ours)


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
