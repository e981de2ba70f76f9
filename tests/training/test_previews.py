"""Pictures of the same cases every time, and a contact sheet over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nnunetv2_hyspark.training import previews
from nnunetv2_hyspark.training.pictures import read_gray, save_gray, three_planes
from nnunetv2_hyspark.training.previews import Previews, spread_evenly


def test_spread_evenly() -> None:
    assert spread_evenly([f"{i:02d}" for i in range(9)][::-1], 3) == ["00", "04", "08"]
    assert spread_evenly(["b", "a"], 5) == ["a", "b"]
    assert spread_evenly(["a"], 1) == ["a"]


def test_gray_pictures_come_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 20), dtype=np.uint8)
    save_gray(tmp_path / "a.png", pixels)
    assert np.array_equal(read_gray(tmp_path / "a.png"), pixels)


def test_planes_of_any_shape() -> None:
    planes = three_planes(np.random.default_rng(0).standard_normal((4, 6, 9)), -1.0, 1.0)
    assert planes.dtype == np.uint8 and planes.shape == (6, 9 + 9 + 6 + 3 * 2)
    assert three_planes(np.full((2, 2, 2), np.nan), 0.0, 0.0).shape == (2, 12)


def test_the_same_crops_and_masks_and_rows_in_order(make_trainer, small_dataset: Path, monkeypatch) -> None:
    trainer = make_trainer()
    trainer.initialize()
    said: list[str] = []
    folder = small_dataset / "nnUNetPlans_3d_fullres"
    cases = [("case_00", folder / "case_00.b2nd"), ("gone", folder / "gone.b2nd")]
    drawer = Previews(trainer.folder / "p", cases, (16, 16, 16), (1.0, 1.0, 1.0), 0.75, 0, said.append)
    sheets: list[list[str]] = []
    monkeypatch.setattr(previews, "save_contact_sheet", lambda path, rows, title: sheets.append([r[0] for r in rows]))
    trainer.network.eval()
    state = torch.get_rng_state()
    for epoch in (1, 20, 3, 100):
        drawer.draw(trainer.model, epoch, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert sheets[-1] == ["original", "masked", "epoch 1", "epoch 3", "epoch 20", "epoch 100"]
    assert sheets[2] == ["original", "masked", "epoch 1", "epoch 3"], "a run that went back does not show its future"
    strips = [path.read_bytes() for path in (trainer.folder / "p" / "case_00" / "strips").iterdir()]
    assert len(strips) == 4 and len(set(strips)) == 1, "the network did not change, so neither do the pictures"
    assert len(said) == 4 and "gone" in said[0]
