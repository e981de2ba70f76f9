"""Batches are functions of (seed, step, position), whoever makes them; broken files and dead workers end in words."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_hyspark.data.cases import corner_around, foreground_voxels
from nnunetv2_hyspark.data.loader import Batches, CropBatches
from nnunetv2_hyspark.masking import random_visible

PATCH = (8, 8, 8)


class Deadly(CropBatches):
    """Kills its own process at one step."""

    def __getitem__(self, step: int) -> dict:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


class Stuck(CropBatches):
    """Never delivers one step."""

    def __getitem__(self, step: int) -> dict:
        if step == 1:
            time.sleep(3600)
        return super().__getitem__(step)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"case_{number}.npy" for number in range(5)]
    for path in paths:
        np.save(path, rng.standard_normal((1, 12, 9, 7)).astype(np.float32))
    return paths


def dataset(files: list[Path], positions=range(4), kind: type[CropBatches] = CropBatches, **more) -> CropBatches:
    mask = functools.partial(random_visible, 1, (2, 2, 2), 0.5)
    more = {"flip_axes": (0, 1, 2), "global_batch": 4, **more}
    return kind(files, [p.stem for p in files], PATCH, positions, mask, (0, 0), **more)


def equal(a: dict, b: dict) -> bool:
    return torch.equal(a["data"], b["data"]) and torch.equal(a["visible"], b["visible"]) and a["keys"] == b["keys"]


def test_the_same_with_any_number_of_workers_and_from_any_step(files) -> None:
    alone = [dataset(files)[step] for step in range(6)]
    for workers in (0, 1, 2):
        batches = Batches(dataset(files), range(6), workers, False)
        assert all(equal(a, b) for a, b in zip(alone, batches))
        batches.close()
    assert equal(next(Batches(dataset(files), range(4, 6), 0, False)), alone[4])


@pytest.mark.parametrize("in_order", [True, False])
def test_a_global_batch_does_not_depend_on_how_it_is_split(files, in_order: bool) -> None:
    whole = dataset(files, in_order=in_order)[2]
    parts = [dataset(files, share, in_order=in_order)[2] for share in (range(0, 1), range(1, 4))]
    assert torch.equal(torch.cat([p["data"] for p in parts]), whole["data"])
    assert torch.equal(torch.cat([p["visible"] for p in parts]), whole["visible"])
    assert parts[0]["keys"] + parts[1]["keys"] == whole["keys"]
    assert dataset(files, in_order=in_order).cases(2) == whole["keys"]


def test_in_order_takes_every_case(files) -> None:
    batches = Batches(dataset(files, in_order=True), range(5), 0, False, repeat=True)
    first = [next(batches) for _ in range(5)]
    assert sorted({key for batch in first for key in batch["keys"]}) == [f.stem for f in files]
    assert equal(next(batches), first[0]), "over again"


def test_a_sample_can_be_made_again_from_what_a_batch_says(files) -> None:
    batch = dataset(files)[7]
    for index, key in enumerate(batch["keys"]):
        image = np.load(next(f for f in files if f.stem == key))
        padded = np.pad(image, [(0, 0), *[(8, 8)] * 3])
        box = tuple(slice(c + 8, c + 16) for c in batch["corners"][index])
        crop = np.flip(padded[(slice(None), *box)], tuple(axis + 1 for axis in batch["flips"][index]))
        assert np.array_equal(crop, batch["data"][index].numpy())
        generator = torch.Generator().manual_seed(batch["mask_seeds"][index])
        assert torch.equal(random_visible(1, (2, 2, 2), 0.5, generator)[0], batch["visible"][index])


def test_loading_leaves_the_global_random_state_alone(files) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches = Batches(dataset(files), range(2), 0, False, repeat=True)
    for _ in range(5):
        next(batches)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_background_only_crops_are_counted(files) -> None:
    for path in files:
        np.save(path, np.full((1, 12, 12, 12), -3.0, dtype=np.float32))
    assert dataset(files)[0]["background"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_case_is_named_in_one_sentence(files, workers: int) -> None:
    for path in files:
        path.write_bytes(b"nothing")
    batches = Batches(dataset(files), range(6), workers, False)
    with pytest.raises(ValueError, match=r"case_\d\.npy is not readable.*on_broken_case=skip") as caught:
        next(batches)
    assert "Traceback" not in str(caught.value)
    batches.close()


@pytest.mark.parametrize("in_order", [True, False])
def test_broken_cases_are_skipped_and_named(files, in_order: bool) -> None:
    files[0].write_bytes(b"")
    files[1].unlink()
    batches = [dataset(files, on_broken_case="skip", in_order=in_order)[step] for step in range(8)]
    assert {key for batch in batches for key in batch["keys"]} == {"case_2", "case_3", "case_4"}
    named = {sentence.partition(":")[0] for batch in batches for sentence in batch["skipped"]}
    assert named == {"case_0", "case_1"}
    assert any("vanished" in sentence for batch in batches for sentence in batch["skipped"])


def test_skipping_does_not_touch_samples_of_whole_cases(files) -> None:
    before = dataset(files)[3]
    broken = next(f for f in files if f.stem == before["keys"][0])
    broken.unlink()
    after = dataset(files, on_broken_case="skip")[3]
    same = [i for i, key in enumerate(before["keys"]) if key != broken.stem]
    assert same and all(torch.equal(before["data"][i], after["data"][i]) for i in same)


def test_when_nothing_can_be_read_skipping_ends_too(files) -> None:
    for path in files:
        path.unlink()
    with pytest.raises(ValueError, match="20 cases in a row could not be read"):
        next(Batches(dataset(files, on_broken_case="skip"), range(2), 0, False))


def sampled_foreground(path: Path, voxels: np.ndarray) -> None:
    """What nnU-Net's preprocessing leaves beside a case."""
    with path.with_suffix(".pkl").open("wb") as file:
        pickle.dump({"class_locations": {1: np.insert(voxels, 0, 0, axis=1)}}, file)


def test_crops_prefer_the_foreground(files) -> None:
    """Every crop holds one of the foreground's voxels; without preference, or without a mask, most do not."""
    corner_voxels = np.array([[11, 8, 6], [10, 8, 6]])
    patch = (4, 4, 4)
    for path in files[:4]:
        sampled_foreground(path, corner_voxels)

    def share(fraction: float, cases: list[Path]) -> float:
        mask = functools.partial(random_visible, 1, (2, 2, 2), 0.5)
        made = CropBatches(
            cases, [p.stem for p in cases], patch, range(4), mask, (0, 0), foreground_fraction=fraction
        )
        corners = [c for step in range(50) for c in made[step]["corners"]]
        held = [all(low <= v < low + 4 for low, v in zip(corner, corner_voxels[0])) for corner in corners]
        return float(np.mean(held))

    assert share(1.0, files[:4]) == 1.0
    assert 0.4 < share(0.5, files[:4]) < 0.7
    assert share(0.0, files[:4]) < 0.2
    assert share(1.0, files[4:]) < 0.2


DAMAGED_PROPERTIES = {
    "empty": b"",
    "text": b"no pickle",
    "cut short": pickle.dumps({"class_locations": {1: np.zeros((5, 4), int)}})[:-30],
    "a list": pickle.dumps([1, 2]),
    "a list of locations": pickle.dumps({"class_locations": [1, 2]}),
    "a number": pickle.dumps({"class_locations": {1: 7}}),
    "too few axes": pickle.dumps({"class_locations": {1: np.zeros((5, 3), int)}}),
}


@pytest.mark.parametrize("damage", DAMAGED_PROPERTIES)
def test_damaged_properties_break_only_their_case(files, damage: str) -> None:
    for path in files:
        sampled_foreground(path, np.array([[4, 4, 4]]))
    files[1].with_suffix(".pkl").write_bytes(DAMAGED_PROPERTIES[damage])
    with pytest.raises(ValueError, match=r"case_1\.pkl is not readable .*nnUNetv2_preprocess") as caught:
        foreground_voxels(files[1])
    assert "\n" not in str(caught.value)
    made = dataset(files, on_broken_case="skip", in_order=True, foreground_fraction=1.0)
    batches = [made[step] for step in range(5)]
    assert {key for batch in batches for key in batch["keys"]} == {"case_0", "case_2", "case_3", "case_4"}
    assert {sentence.partition(":")[0] for batch in batches for sentence in batch["skipped"]} == {"case_1"}
    stopped = [dataset(files, in_order=True, foreground_fraction=1.0)[step] for step in range(5)]
    assert any("on_broken_case=skip" in batch.get("error", "") for batch in stopped)


def test_few_of_the_sampled_voxels_are_kept(tmp_path) -> None:
    sampled_foreground(tmp_path / "a.b2nd", np.arange(3000).reshape(-1, 3))
    kept = foreground_voxels(tmp_path / "a.b2nd", at_most=256)
    assert kept.shape[1] == 3 and 200 <= len(kept) <= 256
    assert kept[0].tolist() == [0, 1, 2]
    sampled_foreground(tmp_path / "a.b2nd", np.empty((0, 3), int))
    assert foreground_voxels(tmp_path / "a.b2nd").shape == (0, 3)


@given(
    axes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.999)), min_size=3, max_size=3)
)
def test_a_box_around_a_voxel_holds_it_and_stays_inside(axes) -> None:
    shape, size = [a[0] for a in axes], [a[1] for a in axes]
    center = [int(a[2] * a[0]) for a in axes]
    for low, edge, extent, voxel in zip(corner_around(center, shape, size), size, shape, center):
        assert low <= voxel < low + edge
        assert (low >= 0 and low + edge <= extent) if edge <= extent else (low <= 0 and low + edge >= extent)


def test_no_cases() -> None:
    with pytest.raises(ValueError, match="at least one preprocessed image"):
        dataset([])


def test_a_dead_worker_is_noticed_with_its_reason(files) -> None:
    batches = Batches(dataset(files, kind=Deadly), range(20), 1, False)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)killed.*on its way to .*case_\d.*nnUNet_n_proc_DA"):
        for _ in range(20):
            next(batches)
    assert time.monotonic() - started < 60
    batches.close()


def test_a_worker_that_hangs_is_noticed(files) -> None:
    batches = Batches(dataset(files, kind=Stuck), range(20), 1, False, timeout=2.0)
    next(batches)
    with pytest.raises(RuntimeError, match="timed out"):
        next(batches)
    batches.close()
