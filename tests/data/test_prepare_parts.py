"""The parts of `hyspark prepare` that are not seen from outside: judging values, masks, workers, reading."""

import errno
import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nnunetv2_hyspark.data.foreground import foreground_mask
from nnunetv2_hyspark.data.journal import JOURNAL_NAME, Journal
from nnunetv2_hyspark.data.modality import case_modalities
from nnunetv2_hyspark.data.phantoms import make_phantom
from nnunetv2_hyspark.data.pool import WorkerDied, run_parallel
from nnunetv2_hyspark.data.report import write_json, write_report
from nnunetv2_hyspark.data.screening import content_key, looks_like_hounsfield, sample
from nnunetv2_hyspark.data.volumes import check_nifti_is_whole, read_channel, write_nifti


def to_image(array: np.ndarray, spacing: tuple[float, ...] = (3.0, 3.0, 3.0)) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    return image


def test_hounsfield_range() -> None:
    ct = make_phantom(0)[0]
    assert looks_like_hounsfield(ct)
    assert not looks_like_hounsfield(ct + 1024)
    assert not looks_like_hounsfield(ct.astype(np.float32) / 1000)
    assert not looks_like_hounsfield(np.random.default_rng(0).normal(0, 1, (20, 20, 20)))


@pytest.mark.parametrize("seed", range(4))
def test_body_of_a_ct(seed: int) -> None:
    image, label = make_phantom(seed)
    mask = sitk.GetArrayFromImage(foreground_mask(to_image(image), hounsfield=True)).astype(bool)
    assert mask[label > 0].mean() > 0.98
    assert not mask[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert mask[:, -1, :].mean() < 0.05
    lungs = (image < -600) & mask
    assert lungs.sum() > 2000


def test_mask_lies_on_the_grid_of_the_image() -> None:
    image = to_image(make_phantom(1, (96, 70, 101), (1.5, 2.0, 1.9))[0], (1.9, 2.0, 1.5))
    image.SetOrigin((-100.123, 3.0, 7.7))
    image.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1))
    mask = foreground_mask(image, hounsfield=True)
    assert mask.GetSize() == image.GetSize() and mask.GetOrigin() == image.GetOrigin()
    assert mask.GetPixelID() == sitk.sitkUInt8
    direct = sitk.GetArrayFromImage(foreground_mask(to_image(sitk.GetArrayFromImage(image)), hounsfield=True))
    both = sitk.GetArrayFromImage(mask).astype(bool), direct.astype(bool)
    assert (both[0] & both[1]).sum() / (both[0] | both[1]).sum() > 0.9


@pytest.mark.parametrize("noise", [5.0, 40.0])
def test_bright_body_of_other_modalities(noise: float) -> None:
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[-1:1:40j, -1:1:40j, -1:1:40j]
    body = x**2 + y**2 + z**2 < 0.6
    signal_ = np.where(body, 400.0, 0.0)
    signal_[15:25, 15:25, 15:25] = 0
    image = np.hypot(signal_ + rng.normal(0, noise, body.shape), rng.normal(0, noise, body.shape))
    mask = sitk.GetArrayFromImage(foreground_mask(to_image(image.astype(np.float32)), hounsfield=False)).astype(bool)
    assert (mask & body).sum() / (mask | body).sum() > 0.9


@pytest.mark.parametrize("array", [np.zeros((10, 10, 10)), np.full((10, 10, 10), -1000.0)])
@pytest.mark.parametrize("hounsfield", [True, False])
def test_mask_is_never_empty(array: np.ndarray, hounsfield: bool) -> None:
    array = array.copy()
    array[4, 4, 4] += 1
    assert sitk.GetArrayFromImage(foreground_mask(to_image(array.astype(np.float32)), hounsfield)).any()


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    axes=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    kind=st.sampled_from([sitk.sitkInt16, sitk.sitkFloat32, sitk.sitkFloat64]),
)
def test_content_does_not_depend_on_storage(axes: list[int], flips: tuple[bool, ...], kind: int) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (8, 9, 10)).astype(np.int16)
    image = to_image(array)
    stored = sitk.Cast(sitk.Flip(sitk.PermuteAxes(image, axes), flips), kind)
    assert content_key([stored]) == content_key([image])
    array[3, 3, 3] += 1
    assert content_key([to_image(array)]) != content_key([image])


@given(st.tuples(*[st.integers(1, 90)] * 3))
@hypothesis_settings(max_examples=20, deadline=None)
def test_sample_is_small(shape: tuple[int, int, int]) -> None:
    values = np.zeros(shape, np.uint8)
    assert 0 < sample(values).size <= 400_000


def test_source_counts_more_than_values() -> None:
    assert case_modalities("", ("T1", "T2"), [False, True])[1][0] == "T2"
    assert case_modalities("pt", (), [False])[0][0] == "PET"
    assert case_modalities("", (), [True])[0][0] == "CT"


def test_whole_nifti(tmp_path: Path) -> None:
    image = to_image(np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16))
    target = tmp_path / "new" / "x.nii.gz"
    write_nifti(image, target)
    check_nifti_is_whole(target)
    assert os.listdir(target.parent) == ["x.nii.gz"]
    content = target.read_bytes()
    unpacked = gzip.decompress(content)
    # two members, as block-wise compressors write
    target.write_bytes(gzip.compress(unpacked[:5000]) + gzip.compress(unpacked[5000:]))
    check_nifti_is_whole(target)
    for damaged in (content[:-5], content[: len(content) // 3], gzip.compress(unpacked[:-4]), b"", b"no"):
        target.write_bytes(damaged)
        with pytest.raises(ValueError):
            check_nifti_is_whole(target)


@pytest.mark.parametrize("stored", [True, False])
def test_damage_inside_a_compressed_nifti(tmp_path: Path, stored: bool) -> None:
    """SimpleITK reads such a file without a word; where voxels are stored as they are, nothing but the sum is wrong."""
    image = to_image(np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16))
    target = tmp_path / "x.nii.gz"
    write_nifti(image, target)
    content = bytearray(gzip.compress(gzip.decompress(target.read_bytes()), compresslevel=0 if stored else 6))
    target.write_bytes(content)
    check_nifti_is_whole(target, checksum=True)
    content[len(content) // 2] ^= 0xFF
    target.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable NIfTI file"):
        check_nifti_is_whole(target, checksum=True)
    with pytest.raises(ValueError, match="not a readable NIfTI file"):
        read_channel((str(target),))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_nifti_headers_are_told_in_words(tmp_path: Path, seed: int) -> None:
    image = to_image(np.random.default_rng(0).integers(0, 99, (9, 12, 10)).astype(np.int16))
    path = tmp_path / "x.nii"
    sitk.WriteImage(image, str(path))
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(352))] = int(rng.choice([0, 127, 128, 255, rng.integers(256)]))
        path.write_bytes(data)
        try:
            read_channel((str(path),))
        except ValueError as error:
            refused += bool(str(error))
    assert refused >= 15


NO_ROOM = """
import resource, sys
from nnunetv2_hyspark.data.volumes import is_out_of_memory, read_channel

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20),) * 2)
for file in sys.argv[2:]:
    try:
        read_channel((file,))
        print(file, "was read")
    except Exception as error:
        if not is_out_of_memory(error):
            print(file, repr(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("room", [50, 100])
def test_want_of_memory_is_known_for_what_it_is(tmp_path: Path, room: int) -> None:
    """The image has 69 MiB; with room for 100, only the second copy that ITK makes of a NIfTI does not fit."""
    image = sitk.Image(300, 300, 400, sitk.sitkInt16)
    files = [str(tmp_path / name) for name in ("a.nii", "a.nii.gz", *(["a.mha", "a.nrrd"] if room < 69 else []))]
    for file in files:
        sitk.WriteImage(image, file, True)
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(room), *files],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sitk.WriteImage

    def half(image: sitk.Image, name: str, *rest: object) -> None:
        original(image, name, *rest)
        Path(name).write_bytes(Path(name).read_bytes()[:200])

    monkeypatch.setattr(sitk, "WriteImage", half)
    with pytest.raises(OSError, match="cannot write it"):
        write_nifti(to_image(np.arange(8000, dtype=np.int16).reshape(20, 20, 20)), tmp_path / "x.nii.gz")
    assert os.listdir(tmp_path) == []


def _square_or_die(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


FULL = Path("/dev/full")  # writes fail as on a full disk
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@needs_full_device
@pytest.mark.parametrize("name", ["prepare_report.json", "prepare_report.csv", "dataset.json"])
def test_a_full_disk_while_a_report_is_written_is_told_in_words(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_text("as before")
    (tmp_path / f"{name}.unfinished").symlink_to(FULL)
    sentence = r"cannot write it \(No space left on device; \d+ MiB free\); make room and run the same command again"
    with pytest.raises(OSError, match=sentence) as caught:
        if name == "dataset.json":
            write_json(target, {"labels": 1})
        else:
            write_report(tmp_path, {}, [{"id": "a"}])
    assert caught.value.filename == str(target)
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "as before"
    assert not list(tmp_path.glob("*.unfinished"))


@needs_full_device
def test_a_full_disk_while_the_journal_is_written_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).symlink_to(FULL)
    journal = Journal(tmp_path)
    record = {"place": "a.nii", "key": "k", "id": "a"}
    for write in (lambda: journal.set_sources(["a"]), lambda: journal.add(record)):
        with pytest.raises(OSError, match="make room and run the same command again") as caught:
            write()
        assert caught.value.filename == str(tmp_path / JOURNAL_NAME)
    assert journal.records == {}


def test_a_folder_that_cannot_be_written_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "gone" / "dataset.json", {})


def test_a_dying_worker_costs_one_item() -> None:
    results = dict(run_parallel(_square_or_die, list(range(9)), processes=2))
    assert isinstance(results.pop(5), WorkerDied)
    assert results == {number: number**2 for number in range(9) if number != 5}
