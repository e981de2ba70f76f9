"""Synthetic phantoms: reproducible, plausible, quick, and readable by nnU-Net."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hyspark.data.phantoms import LABELS, make_phantom, write_phantom_dataset


def test_same_seed_same_phantom() -> None:
    first, second, other = make_phantom(3), make_phantom(3), make_phantom(4)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(48, 48, 64), (32, 40, 40), (8, 8, 8)])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (5.0, 2.0, 2.0)])
def test_types(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    image, label = make_phantom(0, shape, spacing)
    assert image.shape == label.shape == shape
    assert image.dtype == np.int16 and label.dtype == np.uint8
    assert image.min() >= -1024 and image.max() <= 3071


def test_every_phantom_has_every_organ_where_it_belongs() -> None:
    for seed in range(30):
        image, label = make_phantom(seed)
        volumes = {name: (label == value).sum() for name, value in LABELS.items()}
        assert volumes["kidneys"] > 150 and volumes["spine"] > 1500 and volumes["liver"] > 2000, (seed, volumes)
        center = {name: np.argwhere(label == value).mean(0) for name, value in LABELS.items() if value}
        assert center["liver"][2] < center["spine"][2] and center["spine"][1] > center["liver"][1]
        assert abs(center["kidneys"][2] - center["spine"][2]) < 10
        assert np.median(image[:, 0, :]) < -900
        assert -150 < np.median(image[label == LABELS["liver"]]) < 200


def test_brightness_alone_does_not_find_the_organs() -> None:
    """The best threshold window per organ, chosen with the labels in hand, stays far from a good segmentation."""
    for name in ("kidneys", "liver"):
        best = []
        for seed in range(6):
            image, label = make_phantom(seed)
            truth = label == LABELS[name]
            low, high = np.percentile(image[truth], (10, 90))
            found = (image >= low) & (image <= high)
            best.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
        assert np.mean(best) < 0.6, (name, best)


@pytest.mark.parametrize(("shape", "spacing"), [((4, 48, 48), (3.0, 3.0, 3.0)), ((48, 48, 48), (3.0, 0.0, 3.0))])
def test_wrong_sizes(shape, spacing) -> None:
    with pytest.raises(ValueError, match="is \\("):
        make_phantom(0, shape, spacing)


def test_quick() -> None:
    make_phantom(0)
    started = time.process_time()
    for seed in range(5):
        make_phantom(seed)
    assert (time.process_time() - started) / 5 < 0.2


def test_labelled_data_set(tmp_path: Path) -> None:
    folder = write_phantom_dataset(tmp_path, 7, "Demo", 2, 1, labelled=True, shape=(16, 16, 24))
    assert folder == tmp_path / "Dataset007_Demo"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == 2 and "ynthetic" in content["description"]
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == [
        "synthetic_00000_0000.nii.gz",
        "synthetic_00001_0000.nii.gz",
    ]
    assert [path.name for path in (folder / "labelsTs").iterdir()] == ["synthetic_00002.nii.gz"]
    image = sitk.ReadImage(str(folder / "imagesTs" / "synthetic_00002_0000.nii.gz"))
    assert image.GetSize() == (24, 16, 16)
    assert np.array_equal(sitk.GetArrayFromImage(image), make_phantom(2, (16, 16, 24))[0])


def test_bare_folder(tmp_path: Path) -> None:
    folder = write_phantom_dataset(tmp_path, 0, "synthetic_pile", 3, labelled=False, first_seed=50, shape=(16, 16, 24))
    assert sorted(path.name for path in folder.iterdir()) == [f"synthetic_{seed:05d}.nii.gz" for seed in (50, 51, 52)]
