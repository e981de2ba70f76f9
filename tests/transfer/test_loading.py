"""What of a checkpoint reaches the network, and what the report says about it."""
import json

import pytest
import torch

from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig
from nnunetv2_hyspark.transfer.loading import load_encoder, load_pretrained_encoder, load_pretraining
from nnunetv2_hyspark.transfer.report import summarise


def same(network, state) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def snapshot(network) -> dict:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def features(network, image) -> list:
    with torch.no_grad():
        return network.encoder(image)


def assert_same_features(network, image, other, other_image=None, **tolerance) -> None:
    for ours, theirs in zip(features(network, image), features(other, image if other_image is None else other_image)):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.fixture
def saved(tmp_path, make_network, make_checkpoint):
    """Saves a network as a checkpoint and returns network and path."""

    def save(kind: str = "pretraining", **changes):
        network = make_network(1, **changes)
        changes.pop("channels", None)
        checkpoint = make_checkpoint(network, **changes)
        checkpoint["hyspark"]["kind"] = kind
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        return network, tmp_path / "checkpoint.pth"

    return save


def test_same_network(saved, make_network, image, tmp_path):
    """The encoder becomes the other one bit by bit, the decoder stays; the report accounts for every tensor."""
    source, path = saved()
    network = make_network(2)
    before = snapshot(network)
    report = load_pretrained_encoder(network, path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (source.state_dict() if name.startswith("encoder.") else before)[name]), name
    assert_same_features(network, image, source, rtol=0, atol=0)
    assert {entry.name for entry in report.of("loaded")} == {n for n in before if n.startswith("encoder.")}
    assert {entry.name for entry in report.of("fresh")} == {n for n in before if n.startswith("decoder.")}
    assert sum(entry.parameters for entry in report.of("loaded")) == sum(
        p.numel() for p in network.encoder.parameters()
    )
    report.write_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["totals"]["loaded"]["tensors"] == len(report.of("loaded"))
    assert {entry["action"] for entry in written["entries"]} == {"loaded", "fresh", "skipped"}
    assert "encoder.cnn.stem            loaded           2          112" in report.table()


def test_other_grid(saved, make_network):
    """Positions are computed: the same weights serve any patch, and equal the source there."""
    source, path = saved()
    network = make_network(2)
    load_pretrained_encoder(network, path)
    assert_same_features(network, torch.randn(1, 1, 4, 12, 16), source, rtol=0, atol=0)


@pytest.mark.parametrize("cnn", ["mednext", "residual", "plain"])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (2, 4), (4, 2)])
def test_other_channels(saved, make_network, image, cnn, old, new):
    """An image repeated in all channels gives the features it gave before."""
    source, path = saved(channels=old, cnn=cnn)
    network = make_network(2, channels=new, cnn=cnn)
    report = load_pretrained_encoder(network, path)
    assert_same_features(
        network, image.expand(-1, new, -1, -1, -1), source, image.expand(-1, old, -1, -1, -1), rtol=1e-4, atol=1e-5
    )
    entry, *names = report.of("adapted")
    assert "same response to a repeated image" in entry.reason
    if cnn == "mednext":
        assert entry.name == "encoder.cnn.stem.weight" and not names
        assert f"encoder.cnn.stem.weight: (4, {old}, 3, 3, 3) -> (4, {new}, 3, 3, 3), adapted" in report.table()
    else:  # nnU-Net's encoders hold their first convolution under two names
        first = network.get_parameter(entry.name)
        assert first.shape[1] == new and all(network.get_parameter(other.name) is first for other in names)


def test_chosen_channel(saved, make_network, image):
    """Pre-trained on two channels, fine-tuned on the second: as if the first were zero."""
    source, path = saved(channels=2)
    network = make_network(2)
    load_pretrained_encoder(network, path, channels=(1,))
    both = torch.cat([torch.zeros_like(image), image], 1)
    assert_same_features(network, image, source, both, rtol=1e-4, atol=1e-5)


def test_wrong_choice_changes_nothing(saved, make_network):
    _, path = saved()
    network = make_network(2)
    before = snapshot(network)
    with pytest.raises(ValueError, match="adapt_channels is"):
        load_pretrained_encoder(network, path, channels=(3,))
    assert same(network, before)


def test_larger_kernels(saved, make_network, image):
    source, path = saved()
    network = make_network(2, kernel_sizes=[[3, 3, 3], [5, 5, 3], [5, 5, 5]])
    report = load_pretrained_encoder(network, path)
    assert_same_features(network, image, source, rtol=1e-4, atol=1e-5)
    assert all(entry.reason.endswith("exact") for entry in report.of("adapted"))
    assert len(report.of("adapted")) == 4


def test_smaller_kernels_are_called_approximate(saved, make_network):
    _, path = saved()
    network = make_network(2, kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
    report = load_pretrained_encoder(network, path)
    assert {entry.reason for entry in report.of("adapted")} == {
        "kernel 3x3x3 -> 1x3x3: cropped to its centre, approximate"
    }


DIFFERENT = {
    "deeper stage": ({"n_blocks_per_stage": [1, 3, 1]}, r"missing encoder.cnn.stages.1.2 \(8 tensors\)"),
    "shallower stage": ({"n_blocks_per_stage": [1, 1, 1]}, r"no place for encoder.cnn.stages.1.1 \(8 tensors\)"),
    "deeper transformer": ({"transformer_depth": 3}, r"missing encoder.transformer.blocks.2 \(12 tensors\)"),
    "shallower transformer": ({"transformer_depth": 1}, "no place for encoder.transformer.blocks.1"),
    "wider": ({"features_per_stage": [4, 8, 12]}, r"is \(6, 1, 3, 3, 3\) in the file, \(8, 1, 3, 3, 3\) in the net"),
    "expansion": ({"expansion_per_stage": [2, 4, 2]}, "encoder.cnn.stages.1.0.expand.weight is"),
    "heads": ({"transformer_heads": 3}, "its transformer has 2 attention heads, this network's 3"),
    "strides": ({"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}, r"its strides are \[\[1, 1, 1\], \[2, 2, 2\]"),
    "fewer stages": (
        {"n_stages": 2, "features_per_stage": [4, 6], "strides": [[1, 1, 1], [2, 2, 2]],
         "kernel_sizes": [[3, 3, 3]] * 2, "n_blocks_per_stage": [1, 2], "expansion_per_stage": [2, 3],
         "transformer_heads": 2, "n_blocks_per_stage_decoder": [1]},
        "no place for encoder.cnn.stages.2.0",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_architecture(saved, make_network, case):
    """Refused with the reason and the network untouched; on request what fits is loaded, by whole layers, and said."""
    changes, reason = DIFFERENT[case]
    source, path = saved()
    network = make_network(2, **changes)
    before = snapshot(network)
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained_encoder(network, path)
    assert "finetuning.allow_partial=true" in str(error.value) and "\n" not in str(error.value)
    assert same(network, before)

    report = load_pretrained_encoder(network, path, allow_partial=True)
    assert any(note.startswith("partial load: ") for note in report.notes)
    assert report.of("loaded")
    accounted = {entry.name for action in ("loaded", "adapted", "fresh") for entry in report.of(action)}
    assert accounted == set(before)
    taken = {entry.name for entry in report.of("loaded")}
    for name, tensor in network.state_dict().items():
        if name in taken:
            assert torch.equal(tensor, source.state_dict()[name]), name
        elif "identity" not in next(e.reason for e in report.entries if e.name == name and e.action == "fresh"):
            assert torch.equal(tensor, before[name]), name
    layers = {name.rpartition(".")[0] for name in taken}
    assert all(name in taken for name in before if name.rpartition(".")[0] in layers), "half a layer was loaded"


@pytest.mark.parametrize("case", ["deeper stage", "deeper transformer"])
def test_additional_blocks_change_nothing(saved, make_network, image, case):
    source, path = saved()
    network = make_network(2, **DIFFERENT[case][0])
    load_pretrained_encoder(network, path, allow_partial=True)
    assert_same_features(network, image, source, rtol=0, atol=0)


def test_no_transformer_is_a_choice_of_the_plan(saved, make_network, image):
    source, path = saved()
    network = make_network(2, transformer_depth=0)
    load_pretrained_encoder(network, path)
    for ours, theirs in zip(features(network, image)[:-1], features(source, image)[:-1]):
        assert torch.equal(ours, theirs)


def test_trained_decoder_is_taken(saved, make_network, image):
    """From a fine-tuning checkpoint comes all but the segmentation layers, as with nnU-Net's own loader."""
    source, path = saved("finetuning")
    network = make_network(2, classes=5)
    report = load_pretrained_encoder(network, path)
    fresh = {entry.name for entry in report.of("fresh")}
    assert fresh and all(".seg_layers." in name for name in fresh)
    for name, tensor in network.state_dict().items():
        assert name in fresh or torch.equal(tensor, source.state_dict()[name])


@pytest.mark.parametrize("wanted", [True, False])
def test_a_decoder_trained_in_pretraining(saved, make_network, wanted):
    """It is taken unless it is not asked for, all but the segmentation layers."""
    source, path = saved()
    checkpoint = torch.load(path)
    weights = checkpoint["network_weights"]
    weights |= {f"reconstruction.{n}": t for n, t in weights.items() if n.startswith("decoder.") and ".seg" not in n}
    torch.save(checkpoint, path)
    network = make_network(2)
    before = snapshot(network)
    load_pretrained_encoder(network, path, with_decoder=wanted)
    for name, tensor in network.state_dict().items():
        taken = name.startswith("encoder.") or (wanted and ".seg_layers." not in name)
        assert torch.equal(tensor, (source.state_dict() if taken else before)[name]), name


def test_a_decoder_that_fits_in_part_is_noted(saved, make_network):
    _, path = saved("finetuning")
    whole = load_pretrained_encoder(make_network(2), path)
    assert not [note for note in whole.notes if "stay fresh" in note]
    other = load_pretrained_encoder(make_network(2, expansion_decoder=3), path)
    (note,) = [note for note in other.notes if "stay fresh" in note]
    fresh = [e for e in other.of("fresh") if e.name.startswith("decoder.") and ".seg_layers." not in e.name]
    wanted = [e for e in other.entries if e.name.startswith("decoder.") and e.target_shape and ".seg" not in e.name]
    assert note == f"{len(wanted) - len(fresh)} of {len(wanted)} tensors of decoder fit; the others stay fresh"


def test_nothing_fits(saved, make_network):
    _, path = saved()
    network = make_network(2, features_per_stage=[5, 7, 18], transformer_heads=3)
    before = snapshot(network)
    with pytest.raises(ValueError, match="no encoder weight that fits"):
        load_pretrained_encoder(network, path, allow_partial=True)
    assert same(network, before)


def test_another_network_altogether(make_network):
    with pytest.raises(ValueError, match="no encoder weights .its first ones: conv.weight"):
        load_encoder(make_network(), {"conv.weight": torch.zeros(3)}, "file.pth")
    with pytest.raises(ValueError, match="missing encoder.cnn.stem"):
        load_encoder(make_network(), {"encoder.stages.0.conv.weight": torch.zeros(3)}, "file.pth")


def test_nan_is_refused(saved, make_network):
    source, path = saved()
    weights = snapshot(source)
    weights["encoder.transformer.norm.bias"][3] = torch.nan
    network = make_network(2)
    before = snapshot(network)
    with pytest.raises(ValueError, match="NaN or infinite weights in encoder.transformer.norm.bias"):
        load_encoder(network, weights, "file.pth")
    assert same(network, before)


def test_half_precision_and_prefixes(tmp_path, make_network, image):
    """Weights of DDP, of torch.compile and in half precision."""
    source, network = make_network(1), make_network(2)
    weights = {f"module._orig_mod.{name}": tensor.half() for name, tensor in source.state_dict().items()}
    torch.save({"network_weights": weights}, tmp_path / "half.pth")
    load_pretrained_encoder(network, tmp_path / "half.pth")
    assert_same_features(network, image, source, rtol=1e-2, atol=1e-2)
    assert network.encoder.cnn.stem.weight.dtype == torch.float32


def test_integers_are_no_weights(make_network):
    source, network = make_network(1), make_network(2)
    weights = {name: tensor.int() for name, tensor in source.state_dict().items()}
    with pytest.raises(ValueError, match="is torch.int32 in the file, torch.float32 in the network"):
        load_encoder(network, weights, "file.pth")


def test_going_on_with_pretraining(tmp_path, make_network):
    """Encoder and reconstruction decoder; another decoder stays fresh and is reported."""
    encoder = make_network(1).encoder
    ours = torch.nn.ModuleDict({"encoder": encoder, "reconstruction": torch.nn.Linear(3, 2)})
    weights = {name: tensor + 1 for name, tensor in ours.state_dict().items()}
    torch.save({"network_weights": weights}, tmp_path / "a.pth")
    report = load_pretraining(ours, tmp_path / "a.pth")
    assert same(ours, weights) and not report.of("fresh")
    weights["reconstruction.weight"] = torch.zeros(2, 4)
    torch.save({"network_weights": weights}, tmp_path / "b.pth")
    report = load_pretraining(ours, tmp_path / "b.pth")
    assert {entry.name for entry in report.of("fresh")} == {"reconstruction.weight", "reconstruction.bias"}


@pytest.mark.parametrize("before", ["reconstruction", "segmentation"])
@pytest.mark.parametrize("now", ["reconstruction", "segmentation"])
def test_going_on_with_the_other_decoder(tmp_path, architecture, before, now):
    """A decoder of the same kind is loaded, of another one nothing, though some shapes are the same."""
    def make(decoder: str, seed: int):
        torch.manual_seed(seed)
        return build_hyspark(1, architecture(), HySparKConfig(decoder=decoder, decoder_width=16))

    source, network = make(before, 1), make(now, 2)
    assert source.reconstruction.head.weight.shape == network.reconstruction.head.weight.shape
    torch.save({"network_weights": source.state_dict()}, tmp_path / "a.pth")
    report = load_pretraining(network, tmp_path / "a.pth")
    loaded = {entry.name for entry in report.of("loaded")}
    expected = {n for n in network.state_dict() if before == now or not n.startswith("reconstruction.")}
    assert loaded == expected
    note = f"the file was pre-trained with decoder={before}, this run has decoder={now}, which starts fresh"
    assert [n.startswith(note) for n in report.notes if "decoder" in n] == ([] if before == now else [True])
    reasons = {entry.reason for entry in (*report.of("fresh"), *report.of("skipped"))}
    assert reasons == set() if before == now else {
        "another kind of decoder than the file's", "another kind of decoder than this pre-training's"
    }


@pytest.mark.parametrize("now", ["reconstruction", "segmentation"])
def test_going_on_with_pretraining_from_a_fine_tuned_network(saved, architecture, now):
    """Its decoder segments; the one that reconstructs starts fresh, and the report says so."""
    source, path = saved("finetuning")
    torch.manual_seed(3)
    network = build_hyspark(1, architecture(), HySparKConfig(decoder=now, decoder_width=16))
    report = load_pretraining(network, path)
    assert {entry.name for entry in report.of("loaded")} == {n for n in source.state_dict() if n.startswith("encoder.")}
    assert [n for n in report.notes if "the file has no decoder that reconstructed" in n]
    assert {e.reason for e in report.of("skipped")} == {"segmentation layer", "not a decoder that reconstructed"}


FOUR = {
    "n_stages": 4, "features_per_stage": [4, 6, 6, 12], "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3,
    "kernel_sizes": [[3, 3, 3]] * 4, "n_blocks_per_stage": [1, 2, 1, 1], "expansion_per_stage": [2, 3, 2, 2],
    "n_blocks_per_stage_decoder": [1, 1, 1],
}
THREE = {"features_per_stage": [4, 6, 12]}


@pytest.mark.parametrize("before, now", [(FOUR, THREE), (THREE, FOUR)], ids=["fewer", "more"])
def test_decoders_of_other_depth_meet_scale_by_scale(saved, make_network, before, now):
    """Their modules are numbered from the coarsest; what is taken is the file's at the same resolution."""
    source, path = saved("finetuning", **before)
    network = make_network(2, **now)
    report = load_pretrained_encoder(network, path, allow_partial=True)
    ours, theirs = len(network.decoder.up), len(source.decoder.up)
    state, found = network.state_dict(), source.state_dict()
    loaded = {entry.name for entry in report.of("loaded") if entry.name.startswith("decoder.")}
    for name in loaded:
        kind, step, rest = name.removeprefix("decoder.").split(".", 2)
        there = f"decoder.{kind}.{int(step) - ours + theirs}.{rest}"
        assert torch.equal(state[name], found[there]), name
    for scale in (0, 1):  # both networks have them, with equal widths
        assert {n for n in state if n.startswith(f"decoder.stages.{ours - 1 - scale}.")} <= loaded


def test_pretraining_is_not_told_of_a_setting_of_fine_tuning(saved, make_network):
    _, path = saved()
    network = make_network(2, **DIFFERENT["deeper stage"][0])
    before = snapshot(network)
    with pytest.raises(ValueError, match="missing encoder.cnn.stages.1.2 .*; plan the data set for the net") as error:
        load_pretraining(network, path)
    assert "allow_partial" not in str(error.value)
    assert same(network, before)


def test_summary_of_names():
    names = [f"encoder.cnn.stages.2.1.{n}" for n in ("norm.weight", "norm.bias")] + ["encoder.cnn.stem.weight"]
    assert summarise(names) == "encoder.cnn.stages.2.1 (2 tensors), encoder.cnn.stem (1 tensor)"
    assert summarise([f"encoder.cnn.widen.{i}.bias" for i in range(12)]).endswith("and 4 more")
