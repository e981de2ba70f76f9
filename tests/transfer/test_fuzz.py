"""A thousand damaged files: a sentence each, never another error, never a network that is half loaded."""
import copy
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.networks.topology import NETWORK_CLASS
from nnunetv2_hyspark.planning.source import read_source
from nnunetv2_hyspark.pretext.build import build_hyspark
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig
from nnunetv2_hyspark.training.whole_image import load_pretrained_model
from nnunetv2_hyspark.transfer.description import FORMAT_VERSION
from nnunetv2_hyspark.transfer.importing import import_official
from nnunetv2_hyspark.transfer.inspection import inspect_checkpoint
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder
from nnunetv2_hyspark.transfer.official import official_name
from nnunetv2_hyspark.transfer.reading import network_weights, read_checkpoint


def flip_bits(data: bytearray, source: random.Random) -> None:
    for _ in range(source.choice([1, 1, 2, 8, 64])):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def truncate(data: bytearray, source: random.Random) -> None:
    del data[source.randrange(len(data)) :]


def remove(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    del data[start : start + source.choice([1, 7, 64, 1000])]


def insert(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    data[start:start] = source.randbytes(source.choice([1, 7, 64, 1000]))


def overwrite(data: bytearray, source: random.Random) -> None:
    start, length = source.randrange(len(data)), source.choice([1, 4, 16, 512])
    data[start : start + length] = source.choice([bytes(length), b"\xff" * length, source.randbytes(length)])


def swap(data: bytearray, source: random.Random) -> None:
    a, b = (source.randrange(len(data) - 64) for _ in range(2))
    data[a : a + 64], data[b : b + 64] = data[b : b + 64], data[a : a + 64]


MUTATIONS = [flip_bits, truncate, remove, insert, overwrite, swap]


def snapshot(network) -> dict:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_one_sentence(error: Exception) -> bool:
    text = str(error)
    return type(error) is ValueError and 0 < len(text) < 1500 and "\n" not in text and "Traceback" not in text


def test_random_damage(tmp_path, make_network, make_checkpoint):
    """What still loads is the original, bit by bit: damage to weights is always noticed."""
    good = tmp_path / "good.pth"
    torch.save(make_checkpoint(make_network(1)), good)
    network = make_network(2)
    fresh = snapshot(network)
    load_pretrained_encoder(network, good)
    loaded = snapshot(network)
    content = good.read_bytes()
    source = random.Random(0)
    path = tmp_path / "bad.pth"
    refused = 0
    for number in range(1000):
        data = bytearray(content)
        MUTATIONS[number % len(MUTATIONS)](data, source)
        path.write_bytes(data)
        network.load_state_dict(fresh)
        try:
            load_pretrained_encoder(network, path)
        except Exception as error:
            assert is_one_sentence(error), (number, repr(error))
            assert equal(snapshot(network), fresh), number
            refused += 1
        else:
            assert equal(snapshot(network), loaded), number
    assert refused > 900


def damage_behind_the_checksums(good: Path, bad: Path, times: int) -> Iterator[int]:
    """Writes ``bad`` again and again: ``good`` with a changed pickle inside and the checksum made right."""
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickle_name,) = [name for name in entries if name.endswith("data.pkl")]
    source = random.Random(1)
    for number in range(times):
        data = bytearray(entries[pickle_name])
        MUTATIONS[number % len(MUTATIONS)](data, source)
        with zipfile.ZipFile(bad, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, bytes(data) if name == pickle_name else value)
        yield number


def test_damage_behind_the_checksums(tmp_path, make_network, make_checkpoint):
    """The pickle inside is changed and the checksum made right again, as somebody with intent would.

    What still loads is what the file then says, all of the encoder; what can still be described can be printed.
    """
    good = tmp_path / "good.pth"
    torch.save(make_checkpoint(make_network(1)), good)
    network = make_network(2)
    fresh = snapshot(network)
    path, before = tmp_path / "bad.pth", set(os.listdir(tmp_path))
    refused = {"load": 0, "inspect": 0}
    for number in damage_behind_the_checksums(good, path, 600):
        network.load_state_dict(fresh)
        try:
            report = load_pretrained_encoder(network, path)
        except Exception as error:
            assert is_one_sentence(error), (number, repr(error))
            assert equal(snapshot(network), fresh), number
            refused["load"] += 1
        else:
            said, taken = network_weights(read_checkpoint(path), path), {entry.name for entry in report.of("loaded")}
            encoder = {name for name in fresh if name.startswith("encoder.")}
            assert encoder <= taken | {entry.name for entry in report.of("adapted")}, number
            now = snapshot(network)
            assert all(torch.equal(now[name], said[name]) for name in taken), number
        try:
            facts = inspect_checkpoint(path)
        except Exception as error:
            assert is_one_sentence(error), (number, repr(error))
            refused["inspect"] += 1
        else:
            assert json.loads(json.dumps(facts))["file"] == str(path), number
    assert min(refused.values()) > 500, refused
    assert set(os.listdir(tmp_path)) == before | {"bad.pth"}


@pytest.fixture(scope="module")
def pretraining(architecture) -> dict:
    """A checkpoint with the entries of HySparKPretrainTrainer that other commands read."""
    torch.manual_seed(0)
    kwargs = architecture()
    settings = {"mask_ratio": 0.75, "decoder": "reconstruction", "decoder_width": 16, "flip_axes": [0, 1, 2]}
    stated = {"network_class_name": NETWORK_CLASS, "arch_kwargs": kwargs, "_kw_requires_import": []}
    excerpt = {
        "patch_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    configuration = {
        **excerpt, "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "architecture": stated, "hyspark": {"pretraining": settings},
    }
    plans = {
        "plans_name": "nnUNetPlans", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager", "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
    dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    weights = build_hyspark(1, kwargs, HySparKConfig(decoder="reconstruction", decoder_width=16)).state_dict()
    return {
        "network_weights": dict(weights),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset},
        "hyspark": {
            "format_version": FORMAT_VERSION, "kind": "pretraining", "architecture": stated, "configuration": excerpt,
            "channel_names": dataset["channel_names"], "transpose_forward": [0, 1, 2],
        },
    }


READERS = {
    "hyspark reconstruct": lambda path: load_pretrained_model(path, torch.device("cpu")),
    "hyspark plan-finetune": read_source,
}


@pytest.mark.parametrize("reader", READERS)
def test_commands_that_rebuild_the_network(tmp_path, pretraining, reader):
    """What they rebuild has the weights of the file, all of them; else a sentence."""
    good, path = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save(pretraining, good)
    READERS[reader](good)
    refused = 0
    for number in damage_behind_the_checksums(good, path, 600):
        try:
            made = READERS[reader](path)
        except Exception as error:
            assert is_one_sentence(error), (number, repr(error))
            refused += 1
        else:
            if reader == "hyspark reconstruct":
                assert equal(made.network.state_dict(), network_weights(read_checkpoint(path), path)), number
    assert refused > 450


PLACES = [
    ("init_args", "plans"), ("init_args", "configuration"), ("init_args", "dataset_json"),
    ("init_args", "plans", "configurations"), ("init_args", "plans", "transpose_forward"),
    *(("init_args", "plans", "configurations", "3d_fullres", key) for key in (
        "hyspark", "architecture", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm")),
    *(("init_args", "plans", "configurations", "3d_fullres", "architecture", "arch_kwargs", key) for key in (
        "features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage", "transformer_depth")),
    *(("hyspark", "architecture", "arch_kwargs", key) for key in (
        "features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage", "transformer_depth", "mlp_ratio")),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_entries_that_are_gone_or_make_no_sense(tmp_path, pretraining, place):
    """Each entry that a network is rebuilt from: taken away, or something else in its place."""
    reader = READERS["hyspark reconstruct" if place[0] == "init_args" else "hyspark plan-finetune"]
    path = tmp_path / "odd.pth"
    for value in (None, 7, "text", [10**9] * 3, {}):
        checkpoint = copy.deepcopy(pretraining)
        inner = checkpoint
        for key in place[:-1]:
            inner = inner[key]
        del inner[place[-1]]
        if value is not None:
            inner[place[-1]] = value
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match="odd.pth (does not describe its network|has no encoder that a)") as error:
            reader(path)
        assert is_one_sentence(error.value), value


@pytest.mark.parametrize("seed", range(4))
def test_damaged_official_files(tmp_path, make_network, seed):
    """Missing, misshapen, renamed and misplaced tensors of an official file: refused, whichever it is."""
    weights = make_network(1).encoder.state_dict()
    official = {official_name(f"encoder.{n}").removeprefix("sparse_encoder."): t for n, t in weights.items()}
    for name in official:
        if name.endswith(("conv2.weight", "conv3.weight")):
            official[name] = official[name].reshape(*official[name].shape, 1, 1, 1)
    official["mae.pos_embed"] = torch.zeros(1, 1, 12)
    path = tmp_path / "official.pth"
    torch.save(official, path)
    whole = import_official(path)
    assert whole.architecture.arch_kwargs["features_per_stage"] == [4, 6, 12]
    source = random.Random(seed)
    odd = [torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, 2, 2, 2), torch.zeros(1, 10**6), "text",
           {"a": torch.ones(1)}, torch.full((4,), torch.nan), torch.zeros(4, 1, 0, 3, 3), torch.zeros(4, 1, 2, 2, 2)]
    refused = 0
    for number in range(50):
        changed = dict(official)
        for _ in range(source.choice([1, 2, 5])):
            name = source.choice(list(changed))
            value = changed.pop(name)
            action = source.randrange(4)
            if action == 1:
                changed[name] = source.choice(odd)
            elif action == 2:
                changed[name + source.choice([".x", "0", ".weight"])] = value
            elif action == 3:
                changed[name.replace("0", "7").replace("1", "999999999999999999999")] = value
        torch.save(changed, path)
        harmed = [name for name in official if changed.get(name) is not official[name]]
        try:
            imported = import_official(path)
        except Exception as error:
            assert harmed, (number, repr(error))
            assert is_one_sentence(error), (number, repr(error))
            refused += 1
        else:
            assert not harmed, (number, harmed)
            assert equal(imported.checkpoint["network_weights"], whole.checkpoint["network_weights"]), number
    assert refused > 40
