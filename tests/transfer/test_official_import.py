"""Files of the official HySparK release: in, out and back, numerically checked."""
import dataclasses
import json

import pytest
import torch

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.networks.segmentation import HySparKUNet
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse import BlockLayout
from nnunetv2_hyspark.transfer.exporting import export_official
from nnunetv2_hyspark.transfer.importing import import_official
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder, load_pretraining
from nnunetv2_hyspark.transfer.official import official_name, our_name

PREFIX = "sparse_encoder."


def encoder_part(state: dict) -> dict:
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


LAYOUTS = {
    "training file": lambda state: state,
    "as saved by the official script": lambda state: {
        "args": "{}", "input_size": 48, "epoch": 7, "module": {**state, "config": {"mask_ratio": 0.75}},
        "optimizer": {"state": {}}, "is_pretrain": True,
    },
    "of DDP, as state_dict": lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
    "as model": lambda state: {"model": state},
    "encoder file": encoder_part,
    "encoder of DDP, as module": lambda state: {"module": {f"module.{n}": t for n, t in encoder_part(state).items()}},
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request) -> str:
    return request.param


@pytest.fixture
def official_file(golden, layout, tmp_path):
    path = tmp_path / "official.pth"
    torch.save(LAYOUTS[layout](golden["state_dict"]), path)
    return path


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_architecture(golden, official_file, layout):
    """Every number of the official configuration is found in the tensors; the heads follow from the position table."""
    config, found = golden["config"], import_official(official_file).architecture
    kwargs = found.arch_kwargs
    assert tuple(kwargs["features_per_stage"]) == config["channels"]
    assert tuple(kwargs["n_blocks_per_stage"]) == config["depths"]
    assert tuple(kwargs["expansion_per_stage"]) == config["expansion"]
    assert kwargs["kernel_sizes"] == [[k] * 3 for k in config["kernel_sizes"]]
    assert kwargs["strides"] == [[1] * 3] + [[2] * 3] * 4
    assert (kwargs["transformer_depth"], kwargs["transformer_heads"]) == (config["vit_depth"], config["vit_heads"])
    assert kwargs["mlp_ratio"] == 4 and found.input_channels == 1
    assert found.decoder_width == (0 if "encoder" in layout else config["decoder_width"])


def test_features_for_fine_tuning(golden, official_file, tmp_path):
    """The segmentation network that the printed settings give has the official features."""
    imported = import_official(official_file)
    torch.save(imported.checkpoint, tmp_path / "ours.pth")
    strides, kernels = ([imported.architecture.arch_kwargs[key] for key in ("strides", "kernel_sizes")])
    names = {field.name for field in dataclasses.fields(ArchitectureConfig)}
    config = ArchitectureConfig(**{key: value for key, value in imported.settings.items() if key in names})
    network = HySparKUNet(1, 3, **derive_arch_kwargs(strides, kernels, config))
    report = load_pretrained_encoder(network, tmp_path / "ours.pth")
    assert {e.name for e in report.of("loaded")} == {f"encoder.{n}" for n in network.encoder.state_dict()}
    with torch.no_grad():
        features = network.encoder(golden["image"])
        where = BlockLayout(golden["active"])
        sparse = network.encoder(where.gather(golden["image"]), where)
    for ours, theirs, masked, stored in zip(
        features, golden["dense_features"], sparse, golden["sparse_features"], strict=True
    ):
        assert relative(ours[:, : theirs.shape[1]], theirs) < 1e-5
        visible = where.scatter(masked)[:, : stored.shape[1]]
        assert relative(where.gather(visible), where.gather(stored)) < 1e-5


@pytest.mark.parametrize("layout", ["training file", "of DDP, as state_dict"], indirect=True)
def test_loss_for_going_on(golden, official_file, tmp_path):
    """The pre-training network that the printed settings give has the official loss."""
    imported = import_official(official_file)
    torch.save(imported.checkpoint, tmp_path / "ours.pth")
    names = {field.name for field in dataclasses.fields(HySparKConfig)}
    config = HySparKConfig(**{key: value for key, value in imported.settings.items() if key in names})
    model = build_hyspark(1, imported.architecture.arch_kwargs, config).train()
    report = load_pretraining(model, tmp_path / "ours.pth")
    assert not report.of("fresh") and not report.of("adapted")
    loss = reconstruction_loss(golden["image"], model(golden["image"], golden["active"]), golden["active"])
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.parametrize("layout", ["training file"], indirect=True)
def test_report_as_json(golden, official_file, tmp_path, capsys):
    """On request, tensor by tensor: every official one is accounted for."""
    ours, written = tmp_path / "ours.pth", tmp_path / "report.json"
    assert main(["import", str(official_file), "-o", str(ours), "--json", str(written)]) == 0
    report = json.loads(written.read_text())
    assert report["source"] == str(official_file) and "attention heads: 6" in " ".join(report["notes"])
    taken = [entry for entry in report["entries"] if entry["action"] != "fresh"]
    assert len(taken) == len(golden["state_dict"])
    weights = torch.load(ours, weights_only=True)["network_weights"]
    for entry in report["entries"]:
        if entry["target_shape"] is not None:
            assert tuple(entry["target_shape"]) == tuple(weights[entry["name"]].shape)
            assert entry["parameters"] == weights[entry["name"]].numel()
    assert main(["import", str(official_file), "-o", str(tmp_path / "other.pth"), "--json", str(written)]) == 2
    assert "report.json exists already" in capsys.readouterr().err and not (tmp_path / "other.pth").exists()


def assert_equal(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value


def test_round_trip_is_exact(golden, official_file, layout, tmp_path, capsys):
    """By the commands: names, their order, shapes, types and every bit."""
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    assert main(["import", str(official_file), "-o", str(ours)]) == 0
    assert main(["export", str(ours), "-o", str(back)]) == 0
    state = encoder_part(golden["state_dict"]) if "encoder" in layout else dict(golden["state_dict"])
    if layout == "as saved by the official script":
        state["config"] = {"mask_ratio": 0.75}
    assert_equal(torch.load(back, weights_only=True), state)
    out = capsys.readouterr().out
    assert "kept for hyspark export" in out and "features_per_stage=[8,12,16,24,48]" in out
    assert "note: attention heads: 6, from the position table" in out
    assert main(["export", str(ours), "-o", str(back), "--encoder-only"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(ours), "-o", str(back), "--encoder-only", "--overwrite"]) == 0
    assert_equal(torch.load(back, weights_only=True), encoder_part(golden["state_dict"]))


def test_own_model_to_official(golden, architecture, tmp_path):
    """A model that never was official gets all official names and shapes, and computes the same on the way back."""
    state = golden["state_dict"]
    torch.save(state, tmp_path / "official.pth")
    imported = import_official(tmp_path / "official.pth")
    own = dict(imported.checkpoint)
    del own["official"]
    own["hyspark"]["configuration"] = {"patch_size": [48, 48, 48]}
    torch.save(own, tmp_path / "own.pth")
    exported = export_official(tmp_path / "own.pth")
    assert {name: tuple(t.shape) for name, t in exported.items()} == {n: tuple(t.shape) for n, t in state.items()}
    torch.testing.assert_close(exported[PREFIX + "mae.pos_embed"], state[PREFIX + "mae.pos_embed"], rtol=0, atol=1e-6)
    torch.save(exported, tmp_path / "exported.pth")
    again = import_official(tmp_path / "exported.pth").checkpoint["network_weights"]
    assert_equal(again, own["network_weights"])
    assert_equal(export_official(tmp_path / "own.pth", encoder_only=True), encoder_part(exported))


@pytest.mark.parametrize(
    "changes",
    [{"fuse_finest": True}, {"decoder_norm": "instance"}, {"skips": "add"}, {"decoder": "segmentation"}],
    ids=str,
)
def test_decoder_that_official_cannot_express(tmp_path, architecture, changes):
    options = {"decoder": "reconstruction", "fuse_finest": False, "decoder_norm": "batch", **changes}
    model = build_hyspark(1, architecture(), HySparKConfig(**options))
    torch.save({"network_weights": model.state_dict()}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="fuse_finest=false,decoder_norm=batch,skips=concatenate, or export the enc"):
        export_official(tmp_path / "own.pth")
    with pytest.raises(ValueError, match="does not say for which patch"):
        export_official(tmp_path / "own.pth", encoder_only=True)


def test_names_there_and_back(golden):
    for name in golden["state_dict"]:
        ours = our_name(name)
        assert ours is None or official_name(ours) == name
    with pytest.raises(ValueError, match="has no counterpart"):
        official_name("decoder.up.0.weight")


def test_heads(golden, tmp_path):
    """Given, from the position table, or head width 32."""
    state = encoder_part(golden["state_dict"])
    path = tmp_path / "official.pth"
    torch.save(state, path)
    assert import_official(path, heads=4).architecture.arch_kwargs["transformer_heads"] == 4
    with pytest.raises(ValueError, match="which 5 attention heads .given. do not divide"):
        import_official(path, heads=5)
    del state["mae.pos_embed"]
    torch.save(state, path)
    found = import_official(path).architecture
    assert found.arch_kwargs["transformer_heads"] == 1 and found.heads_from == "head width 32, the official default"


def test_strides(golden, tmp_path):
    path = tmp_path / "official.pth"
    torch.save(encoder_part(golden["state_dict"]), path)
    found = import_official(path, strides=[1, 2, 2, 2, 1]).architecture
    assert found.arch_kwargs["strides"][-1] == [1, 1, 1] and found.strides_from == "given"
    with pytest.raises(ValueError, match="strides are .1, 2. for 5 stages"):
        import_official(path, strides=[1, 2])


def test_projection_that_official_leaves_out(golden, tmp_path):
    """Where the junction is as wide as the decoder, official has no projection there; ours is then the identity."""
    path = tmp_path / "official.pth"
    config = HySparKConfig(decoder="reconstruction", decoder_width=48, fuse_finest=False, decoder_norm="batch")
    kwargs = import_of(golden, tmp_path)
    model = build_hyspark(1, kwargs, config)
    weights = {**model.state_dict()}
    torch.save({"network_weights": weights, "hyspark": {
        "configuration": {"patch_size": [48] * 3}, "architecture": {"arch_kwargs": kwargs}}}, path)
    official = export_official(path)
    for kind in ("weight", "bias"):
        del official[f"densify_projs.0.{kind}"]
    torch.save(official, path)
    imported = import_official(path)
    weight = imported.checkpoint["network_weights"]["reconstruction.projections.0.weight"]
    assert torch.equal(weight.flatten(1), torch.eye(48))
    torch.save(imported.checkpoint, tmp_path / "ours.pth")
    assert_equal(export_official(tmp_path / "ours.pth"), official)


def import_of(golden, folder) -> dict:
    torch.save(golden["state_dict"], folder / "whole.pth")
    return import_official(folder / "whole.pth").architecture.arch_kwargs


def test_segmentation_network_of_official(golden, tmp_path):
    """Its encoder is taken; its decoder is another one and is reported."""
    state = {**encoder_part(golden["state_dict"]), "decoder.out.conv.weight": torch.zeros(14, 8, 1, 1, 1)}
    torch.save(state, tmp_path / "hybrid.pth")
    imported = import_official(tmp_path / "hybrid.pth")
    assert [e.name for e in imported.report.of("skipped") if e.reason.startswith("official seg")] == [
        "decoder.out.conv.weight"
    ]


def test_foreign_files(tmp_path, make_network, capsys):
    """Ours is no official file, and an unconverted official file is refused with the way to convert it."""
    path = tmp_path / "f.pth"
    torch.save({"network_weights": make_network().state_dict()}, path)
    assert main(["import", str(path), "-o", str(tmp_path / "o.pth")]) == 2
    assert "is no file of the official HySparK release" in capsys.readouterr().err
    torch.save({"embeddings.stem.weight": torch.zeros(4, 1, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match="convert it first with 'hyspark import'"):
        load_pretrained_encoder(make_network(), path)
    assert main(["import", str(path), "-o", str(tmp_path / "no" / "o.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["import", str(path), "-o", str(tmp_path / "o.pth")]) == 2
    assert not (tmp_path / "o.pth").exists()
