"""Files from anywhere: read as plain data, or refused in one sentence without executing anything."""
import io
import os
import pickle
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_hyspark.transfer.archive import check_archive, printable
from nnunetv2_hyspark.transfer.description import FORMAT_VERSION
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder
from nnunetv2_hyspark.transfer.reading import find_weights, network_weights, read_checkpoint, read_plain


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewrite(source: Path, target: Path, edit, compression=zipfile.ZIP_STORED) -> Path:
    """Another archive with edited contents and right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, edit(entry.filename, old.read(entry.filename)))
    return target


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "good.pth"
    torch.save({"network_weights": {"encoder.a": torch.arange(1000.0), "encoder.b": torch.ones(2, 3)}}, path)
    return path


def test_plain_file(saved):
    weights = network_weights(read_checkpoint(saved), saved)
    assert torch.equal(weights["encoder.a"], torch.arange(1000.0))


@pytest.mark.parametrize("where", ["network_weights", "module", "state_dict", "model", None])
def test_wrappers(where):
    inner = {"module.encoder.a": torch.ones(1), "config": {"mask_ratio": 0.6}}
    weights, others = find_weights(inner if where is None else {where: inner, "epoch": 3}, "f")
    assert list(weights) == ["encoder.a"] and others["config"] == {"mask_ratio": 0.6}


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "no.pth")


def test_empty_file(tmp_path, make_network):
    path = tmp_path / "empty.pth"
    path.write_bytes(b"")
    for read in (read_checkpoint, lambda file: load_pretrained_encoder(make_network(), file)):
        with pytest.raises(ValueError, match="empty.pth is empty; .* use another checkpoint"):
            read(path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_is_refused_and_not_executed(tmp_path, archive):
    trace = tmp_path / "executed"
    path = tmp_path / "evil.pth"
    content = {"network_weights": {"encoder.a": torch.ones(1)}, "logging": Exploit(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="convert (it|such a file) where it was made") as error:
        read_checkpoint(path)
    assert not trace.exists()
    if archive:
        assert "posix.system" in str(error.value) or "nt.system" in str(error.value)
    assert "\n" not in str(error.value)


def test_bare_pickle(tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Exploit(trace)))
    with pytest.raises(ValueError, match="reading them can execute code"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({"epoch": 3}, "has no weights .found: epoch."),
        ({"network_weights": {}}, "has no weights"),
        ({"network_weights": {"a": torch.ones(1), "b": "text"}}, "holds b: str among its weights"),
        ({"network_weights": {3: torch.ones(1)}}, "tensor under int"),
        ({"network_weights": {"a": torch.ones(2).to_sparse()}}, "no ordinary tensor"),
        ({"network_weights": {"a": torch.ones(2, dtype=torch.complex64)}}, "no ordinary tensor"),
        ({"network_weights": {"a": torch.ones(2, device="meta")}}, "no ordinary tensor"),
        ({"network_weights": {"a": torch.ones(1).expand(10**6, 10**6, 10**3)}}, "more values than the file holds"),
        ({"network_weights": {"a.x": torch.ones(1), "module.a.x": torch.ones(1)}}, "twice"),
    ],
)
def test_other_contents(tmp_path, content, reason):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=reason):
        network_weights(read_checkpoint(path), path)


def test_flipped_bit_in_a_weight(saved):
    """torch.load itself would not notice."""
    data = bytearray(saved.read_bytes())
    data[data.find(np.arange(500, 504, dtype=np.float32).tobytes())] ^= 1
    saved.write_bytes(data)
    assert not torch.equal(torch.load(saved, weights_only=True)["network_weights"]["encoder.a"], torch.arange(1000.0))
    with pytest.raises(ValueError, match="the checksum of .* is wrong.; use another copy"):
        read_checkpoint(saved)


def test_file_without_checksums(saved):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    content = torch.load(saved, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, saved)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(network_weights(read_checkpoint(saved), saved)["encoder.b"], torch.ones(2, 3))


def test_archives_that_would_grow(saved, tmp_path):
    packed = rewrite(saved, tmp_path / "packed.pth", lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        check_archive(packed)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(archive.namelist()[0], b"again")
    with pytest.raises(ValueError, match="two entries of one name"):
        check_archive(saved)


def test_storage_larger_than_its_record(saved, tmp_path):
    """The pickle claims a million times what the archive holds."""
    huge = re.sub(rb"M\xe8\x03", b"J\x00\xca\x9a\x3b", (zipfile.ZipFile(saved).read("good/data.pkl")))
    path = rewrite(saved, tmp_path / "huge.pth", lambda name, data: huge if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        read_checkpoint(path)


def test_deep_nesting(tmp_path, make_network):
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    stream = io.BytesIO()
    torch.save({}, stream)
    (tmp_path / "empty.pth").write_bytes(stream.getvalue())
    bomb = b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b"."
    path = rewrite(tmp_path / "empty.pth", tmp_path / "deep.pth", lambda n, d: bomb if n.endswith("data.pkl") else d)
    with pytest.raises(ValueError, match="holds a list|damaged"):
        load_pretrained_encoder(make_network(), path)


def test_numpy_numbers_become_python_numbers(tmp_path):
    """As in checkpoints of nnU-Net's own trainers."""
    numbers = {"a": np.float64(0.5), "b": [np.int64(-3), np.float32(2)], "c": np.bool_(True), "d": np.uint8(255)}
    torch.save({"network_weights": {"a": torch.ones(1)}, "logging": numbers}, tmp_path / "f.pth")
    logging = read_checkpoint(tmp_path / "f.pth")["logging"]
    assert logging == {"a": 0.5, "b": [-3, 2.0], "c": True, "d": 255}
    assert [type(v) for v in (logging["a"], logging["b"][0], logging["c"])] == [float, int, bool]


@pytest.mark.parametrize("value", [np.array([1.0]), np.datetime64("2024-01-01"), np.str_("x"), np.complex64(1)])
def test_other_numpy_values_are_refused(tmp_path, value):
    torch.save({"network_weights": {"a": torch.ones(1)}, "logging": value}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match="f.pth (cannot be read as plain data|is damaged or no checkpoint)"):
        read_checkpoint(tmp_path / "f.pth")


def test_format_versions(tmp_path, make_network, make_checkpoint):
    path = tmp_path / "f.pth"
    checkpoint = make_checkpoint(make_network(1))
    for older in (FORMAT_VERSION, None):
        checkpoint["hyspark"]["format_version"] = older
        torch.save(checkpoint, path)
        load_pretrained_encoder(make_network(2), path)
    checkpoint["hyspark"]["format_version"] = FORMAT_VERSION + 1
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=f"has checkpoint format {FORMAT_VERSION + 1}.* install a newer one"):
        read_checkpoint(path)
    assert read_plain(path)


def test_printable():
    assert printable("a\x1b[31m\nb") == "a?[31m?b"
    assert printable("x" * 300, 10) == "x" * 10 + "..."


def test_unreadable_file_is_an_oserror(saved):
    saved.chmod(0)
    if os.access(saved, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(OSError):
        read_checkpoint(saved)


def test_named_pipe_is_no_file(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    subprocess.run(["mkfifo", str(tmp_path / "pipe")], check=True)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "pipe")
