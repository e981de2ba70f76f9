"""Preprocessed images in nnU-Net's formats, whole and damaged."""

from __future__ import annotations

import enum
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnunetv2_hyspark.data.cases import find_image, image_shape, random_corner, read_crop

SHAPE = (2, 9, 8, 7)


def write(folder: Path, ending: str, array: np.ndarray) -> Path:
    path = folder / f"case{ending}"
    if ending == ".b2nd":
        blosc2.asarray(array, urlpath=str(path))
    elif ending == ".npy":
        np.save(path, array)
    else:
        np.savez(path, data=array, seg=array[:1])
    return path


@pytest.fixture(params=[".b2nd", ".npy", ".npz"])
def image(request, tmp_path: Path) -> tuple[Path, np.ndarray]:
    array = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    return write(tmp_path, request.param, array), array


def test_a_crop_is_the_image_with_zeros_outside(image) -> None:
    path, array = image
    assert find_image(path.parent, "case") == path
    assert image_shape(path) == SHAPE[1:]
    assert np.array_equal(read_crop(path, (1, 2, 3), (4, 4, 4)), array[:, 1:5, 2:6, 3:7])
    wide = read_crop(path, (-2, 0, 3), (4, 10, 4))
    assert wide.shape == (2, 4, 10, 4) and wide.dtype == np.float32
    assert np.array_equal(wide[:, 2:, :8], array[:, :2, :, 3:7])
    assert not wide[:, :2].any() and not wide[:, :, 8:].any()


def test_a_damaged_file_is_named(image) -> None:
    path, _ = image
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"case\.\w+ is (not readable|damaged).*nnUNetv2_preprocess"):
        image_shape(path)
        read_crop(path, (0, 0, 0), (4, 4, 4))


def test_only_the_crop_is_read(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((1, 32, 32, 32)).astype(np.float32)
    path = tmp_path / "case.b2nd"
    stored = blosc2.asarray(array, urlpath=str(path), chunks=(1, 8, 32, 32), blocks=(1, 4, 16, 16))
    assert stored.schunk.nchunks == 4
    sizes = [len(stored.schunk.get_chunk(number)) for number in range(4)]
    last = stored.schunk.get_chunk(3)
    del stored
    data = bytearray(path.read_bytes())
    # chunks lie one after another; the last one loses its header and all that follows
    begin = data.index(last)
    assert begin >= sum(sizes[:3])
    data[begin : begin + len(last)] = b"\xff" * len(last)
    path.write_bytes(bytes(data))
    assert np.array_equal(read_crop(path, (0, 0, 0), (24, 32, 32)), array[:, :24])
    with pytest.raises(ValueError, match=r"case\.b2nd is damaged"):
        read_crop(path, (20, 0, 0), (8, 32, 32))


# of 300 damaged files, how many may differ from the original in more than one voxel: npz has checksums, a value in npy
# is one voxel, and b2nd compresses without checksums
FAR_OFF = {".npz": 0, ".npy": 5, ".b2nd": 60}


class Outcome(enum.IntEnum):
    """What reading a damaged file came to."""

    SAME, REFUSED, ONE_VOXEL, FAR_OFF, WRONG_WORDS = range(5)


def outcome(path: Path, array: np.ndarray) -> Outcome:
    try:
        crop = read_crop(path, (0, 0, 0), image_shape(path))
    except ValueError as error:
        return Outcome.REFUSED if str(path) in str(error) else Outcome.WRONG_WORDS
    differing = int((crop != array).sum()) if crop.shape == array.shape else array.size
    return Outcome.SAME if differing == 0 else Outcome.ONE_VOXEL if differing == 1 else Outcome.FAR_OFF


def outcome_in_a_child(path: Path, array: np.ndarray) -> Outcome | None:
    """None if the process died: older versions of blosc2 (4.3) crash on some damaged files, as a data worker would."""
    child = os.fork()
    if child == 0:
        status = Outcome.WRONG_WORDS
        try:
            status = outcome(path, array)
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return Outcome(os.WEXITSTATUS(status)) if os.WIFEXITED(status) else None


def test_flipped_bits_are_noticed_or_change_little(image) -> None:
    path, array = image
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    read = outcome_in_a_child if path.suffix == ".b2nd" else outcome
    outcomes = []
    for _ in range(300):
        data = bytearray(original)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        outcomes.append(read(path, array))
    assert Outcome.WRONG_WORDS not in outcomes
    assert outcomes.count(Outcome.REFUSED) >= 10
    assert outcomes.count(Outcome.FAR_OFF) <= FAR_OFF[path.suffix]
    assert outcomes.count(None) <= 30
    if path.suffix == ".npz":
        assert {Outcome.ONE_VOXEL, Outcome.FAR_OFF}.isdisjoint(outcomes), "the checksum shows it"


@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 1, 9, 8, 7), ()])
def test_images_without_four_axes_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write(tmp_path, ".npy", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=r"case\.npy is not readable .*4 axes.*nnUNetv2_preprocess"):
        image_shape(path)


def test_a_vanished_file() -> None:
    with pytest.raises(FileNotFoundError):
        image_shape(Path("nowhere.b2nd"))
    with pytest.raises(FileNotFoundError, match=r"expected case\.b2nd or \.npz"):
        find_image("nowhere", "case")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    array = np.zeros(SHAPE, dtype=np.float32)
    array[0, 0, 0, :3] = value
    path = write(tmp_path, ".npy", array)
    with pytest.raises(ValueError, match="case case holds 3 NaN or infinite voxels"):
        read_crop(path, (0, 0, 0), (4, 4, 4))
    assert np.isfinite(read_crop(path, (1, 0, 0), (4, 4, 4))).all()


def test_corners_cover_all_places() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([random_corner((10, 4, 6), (8, 4, 9), rng) for _ in range(200)])
    assert set(corners[:, 0]) == {0, 1, 2} and set(corners[:, 1]) == {0} and set(corners[:, 2]) == {-3, -2, -1, 0}
