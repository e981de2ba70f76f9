"""A thousand damaged files: a sentence each, never another error, never a network that is half loaded."""
import json
import os
import random
import zipfile

import pytest
import torch

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


def test_damage_behind_the_checksums(tmp_path, make_network, make_checkpoint):
    """The pickle inside is changed and the checksum made right again, as somebody with intent would.

    What still loads is what the file then says, all of the encoder; what can still be described can be printed.
    """
    good = tmp_path / "good.pth"
    torch.save(make_checkpoint(make_network(1)), good)
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickle_name,) = [name for name in entries if name.endswith("data.pkl")]
    network = make_network(2)
    fresh = snapshot(network)
    source = random.Random(1)
    path, before = tmp_path / "bad.pth", set(os.listdir(tmp_path))
    refused = {"load": 0, "inspect": 0}
    for number in range(600):
        data = bytearray(entries[pickle_name])
        MUTATIONS[number % len(MUTATIONS)](data, source)
        with zipfile.ZipFile(path, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, bytes(data) if name == pickle_name else value)
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
