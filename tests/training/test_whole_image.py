"""``hyspark reconstruct``: from an image file to a picture and a volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from skimage import io

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.training.checkpoints import FINAL


@pytest.fixture
def checkpoint(make_trainer) -> Path:
    trainer = make_trainer("pretraining.epochs=1,iterations_per_epoch=1,val_iterations_per_epoch=1")
    trainer.run_training()
    return trainer.folder / FINAL


@pytest.fixture
def image(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    volume = sitk.GetImageFromArray((100 + 20 * rng.standard_normal((30, 21, 17))).astype(np.float32))
    volume.SetSpacing((1.0, 2.0, 0.8))
    volume.SetOrigin((5.0, -3.0, 7.0))
    volume.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, 1))
    path = tmp_path / "image.nii.gz"
    sitk.WriteImage(volume, str(path))
    return path


def test_picture_and_volume_on_the_images_grid(checkpoint: Path, image: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["reconstruct", str(checkpoint), str(image), "-o", str(out / "a.png"), str(out / "a.nii.gz")]) == 0
    assert "75% masked" in capsys.readouterr().out
    assert (out / "a.png").stat().st_size > 10_000
    before, after = sitk.ReadImage(str(image)), sitk.ReadImage(str(out / "a.nii.gz"))
    assert after.GetSize() == before.GetSize()
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(after, geometry)(), getattr(before, geometry)(), atol=1e-5)
    values = sitk.GetArrayFromImage(after)
    assert np.isfinite(values).all() and 90 < values.mean() < 110, "in the image's own intensities"


def test_masks_follow_seed_and_ratio(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    def volume(name: str, *more: str) -> bytes:
        path = tmp_path / f"{name}.nii.gz"
        assert main(["reconstruct", str(checkpoint), str(image), "-o", str(path), *more]) == 0
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).tobytes()

    first = volume("a")
    assert volume("b") == first
    assert volume("c", "--seed", "1") != first
    assert volume("d", "--mask-ratio", "0.3") != first


def test_a_gray_png(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    io.imsave(tmp_path / "gray.png", rng.integers(0, 255, (20, 33), dtype=np.uint8), check_contrast=False)
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(checkpoint), str(tmp_path / "gray.png"), "-o", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no image", "there is no image"),
        ("no checkpoint", "there is no checkpoint"),
        ("no plans", "does not describe its network (there is no 'plans')"),
        ("no intensities", "the plan in the checkpoint cannot prepare"),
        ("damaged image", "cannot be read"),
        ("colour", "3 channel"),
        ("ratio", "mask_ratio is 1.5"),
        ("ending", "no ending this command writes"),
        ("seed", "--seed is -1"),
    ],
)
def test_mistakes_end_in_a_sentence(
    checkpoint: Path, image: Path, tmp_path: Path, capsys, case: str, message: str
) -> None:
    weights, source, out, more = checkpoint, image, tmp_path / "out.png", []
    if case == "no image":
        source = tmp_path / "none.nii.gz"
    elif case == "no checkpoint":
        weights = tmp_path / "none.pth"
    elif case in ("no plans", "no intensities"):
        weights = tmp_path / "odd.pth"
        content = torch.load(checkpoint, weights_only=True)
        if case == "no plans":
            del content["init_args"]["plans"]
        else:
            plan = content["init_args"]["plans"]["configurations"]["3d_fullres"]
            plan["normalization_schemes"] = ["CTNormalization"]
        torch.save(content, weights)
    elif case == "damaged image":
        source = tmp_path / "bad.nii.gz"
        source.write_bytes(b"nothing")
    elif case == "colour":
        source = tmp_path / "colour.png"
        io.imsave(source, np.zeros((8, 8, 3), dtype=np.uint8), check_contrast=False)
    elif case == "ratio":
        more = ["--mask-ratio", "1.5"]
    elif case == "ending":
        out = tmp_path / "out.jpg"
    else:
        more = ["--seed", "-1"]
    assert main(["reconstruct", str(weights), str(source), "-o", str(out), *more]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert len(captured) == 1 and message in captured[0]
    assert not out.exists()
