"""Real CT: the plain plans of an existing user, regions, an ignore label, and mistakes a user makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = pytest.mark.slow

DATASET, PLANS = "Dataset010_HeadNeck", "nnUNetPlans"
LABELS = {"background": 0, "organs": [1, 2, 3], "parotids": [3], "ignore": 4}
CROP = (48, 56, 48)
SETTINGS = "base_width=4,head_width=4,seed=0,pretraining.epochs=3,finetuning.epochs=1,iterations_per_epoch=10,"
SETTINGS += "val_iterations_per_epoch=2,pretraining.learning_rate=2e-3,pretraining.batch_size=2,finetuning.batch_size=2"


@pytest.fixture(scope="module")
def planned(workspace, shared_data: Path):
    """Six CTs, the cord's lower third unlabelled (ignored), planned and preprocessed as ever."""
    workspace.settings = SETTINGS
    source = shared_data / "data" / "openkbp"
    splits = json.loads((source / "splits.json").read_text())
    folder = workspace.add_dataset(
        source,
        10,
        "HeadNeck",
        splits["train_labelled"][:6],
        splits["val"][:1],
        "CT",
        LABELS,
        crop=CROP,
        regions_class_order=[1, 2],
    )
    for file in (folder / "labelsTr").glob("*.nii.gz"):
        label = sitk.ReadImage(str(file))
        values = sitk.GetArrayFromImage(label)
        values[: values.shape[0] // 3] = 4
        changed = sitk.GetImageFromArray(values)
        changed.CopyInformation(label)
        sitk.WriteImage(changed, str(file))
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 10, "-c", "3d_fullres", "-np", 2, "-npfp", 2)
    return workspace


@pytest.fixture(scope="module")
def pretrained(planned) -> Path:
    """The final checkpoint of a short pre-training."""
    planned.run("nnUNetv2_train", 10, "3d_fullres", 0, "-tr", "HySparKPretrainTrainer", "-device", "cpu")
    return planned.output(DATASET, "HySparKPretrainTrainer", PLANS, 0) / "checkpoint_final.pth"


def test_plain_plans_regions_and_ignore_label(planned, pretrained: Path, tmp_path: Path):
    log = torch.load(pretrained, weights_only=True)["logging"]
    assert log["val_losses"][-1] < log["val_losses"][0]  # the same crops and masks every epoch
    tuned = planned.run(
        "nnUNetv2_train",
        10,
        "3d_fullres",
        0,
        "-tr",
        "HySparKFinetuneTrainer",
        "-device",
        "cpu",
        "-pretrained_weights",
        pretrained,
    )
    assert "Mean Validation Dice" in tuned
    images = planned.raw / DATASET / "imagesTs"
    planned.run(
        "nnUNetv2_predict",
        "-d",
        10,
        "-tr",
        "HySparKFinetuneTrainer",
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-i",
        images,
        "-o",
        tmp_path,
        "-device",
        "cpu",
        settings="",
    )
    (prediction,) = tmp_path.glob("*.nii.gz")
    image = sitk.ReadImage(str(images / prediction.name.replace(".nii.gz", "_0000.nii.gz")))
    predicted = sitk.ReadImage(str(prediction))
    assert predicted.GetSize() == image.GetSize() and predicted.GetSpacing() == image.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1, 2}


MISTAKES = [
    ("mask_ratio=1.5", "mask_ratio is 1.5 in the variable nnUNet_hyspark"),
    ("mask_ratio=0.999", "leaves no visible cell"),
    ("mask_ration=0.5", "did you mean 'mask_ratio'?"),
    ("features_per_stage=[4,8]", "features_per_stage has 2 values [4, 8]; this plan's encoder has"),
]


@pytest.mark.parametrize(("setting", "sentence"), MISTAKES)
def test_wrong_settings_are_answered_by_a_sentence(planned, setting: str, sentence: str):
    command = ("nnUNetv2_train", 10, "3d_fullres", 3, "-tr", "HySparKPretrainTrainer", "-device", "cpu")
    last = planned.run(*command, settings=f"{SETTINGS},{setting}", expect=-1).strip().splitlines()[-1]
    assert last.startswith("nnunetv2_hyspark: error: ") and sentence in last, last


def test_a_2d_configuration_is_refused_and_nothing_is_written(planned):
    planned.run("nnUNetv2_plan_experiment", "-d", 10)
    out = planned.run(
        "nnUNetv2_train", 10, "2d", 0, "-tr", "HySparKPretrainTrainer", "-device", "cpu", expect=-1
    ).strip()
    assert "3D" in out.splitlines()[-1] and "3d_fullres" in out.splitlines()[-1]
    assert not list(planned.results.rglob("*__2d"))


def edited_plans(workspace, name: str, architecture: dict | None = None, **changes) -> str:
    """A copy of the plans with other entries in 3d_fullres, and in its network's arguments."""
    folder = workspace.preprocessed / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = name
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(changes)
    configuration["architecture"]["arch_kwargs"].update(architecture or {})
    (folder / f"{name}.json").write_text(json.dumps(plans))
    return name


def test_a_plain_plan_of_six_anisotropic_stages(planned, tmp_path: Path):
    """As nnU-Net plans prostate MR: the encoder keeps five stages, to a total stride of 8 x 16 x 16."""
    plans = edited_plans(
        planned,
        "AnisotropicPlans",
        {
            "n_stages": 6,
            "features_per_stage": [32, 64, 128, 256, 320, 320],
            "kernel_sizes": [[1, 3, 3], [1, 3, 3], *[[3, 3, 3]] * 4],
            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
            "n_conv_per_stage": [2] * 6,
            "n_conv_per_stage_decoder": [2] * 5,
        },
        patch_size=[16, 64, 64],
        batch_size=2,
    )
    short = SETTINGS.replace("pretraining.epochs=3", "pretraining.epochs=1").replace("epoch=10", "epoch=2")
    train, common = ("nnUNetv2_train", 10, "3d_fullres", 0), ("-p", plans, "-device", "cpu")
    log = planned.run(*train, "-tr", "HySparKPretrainTrainer", *common, settings=short)
    assert "masking: 2x4x4 cells of 8x16x16 voxels" in log
    weights = planned.output(DATASET, "HySparKPretrainTrainer", plans, 0) / "checkpoint_final.pth"
    planned.run(
        *train, "-tr", "HySparKFinetuneTrainer", *common, "-pretrained_weights", weights, settings=short
    )
    images = planned.raw / DATASET / "imagesTs"
    planned.run(
        "nnUNetv2_predict", "-d", 10, "-tr", "HySparKFinetuneTrainer", "-p", plans, "-c", "3d_fullres", "-f", 0,
        "-i", images, "-o", tmp_path, "-device", "cpu", "--disable_tta", settings="",
    )
    assert len(list(tmp_path.glob("*.nii.gz"))) == 1


def test_a_patch_that_the_strides_do_not_divide_and_a_patch_larger_than_the_volume(planned):
    command = ("nnUNetv2_train", 10, "3d_fullres", 0, "-tr", "HySparKPretrainTrainer", "-device", "cpu", "-p")
    out = planned.run(*command, edited_plans(planned, "OddPlans", patch_size=[50, 66, 50]), expect=-1)
    assert "patch size [50, 66, 50] is not divisible by the network's strides" in out.strip().splitlines()[-1]
    short = SETTINGS.replace("pretraining.epochs=3", "pretraining.epochs=1").replace("epoch=10", "epoch=1")
    out = planned.run(*command, edited_plans(planned, "LargePlans", patch_size=[144, 144, 144]), settings=short)
    assert "Mean reconstruction loss" in out


def test_checkpoints_that_do_not_fit_or_are_none(planned, pretrained: Path, tmp_path: Path):
    def finetune(weights: Path, settings: str = SETTINGS) -> str:
        out = planned.run(
            "nnUNetv2_train",
            10,
            "3d_fullres",
            4,
            "-tr",
            "HySparKFinetuneTrainer",
            "-device",
            "cpu",
            "-pretrained_weights",
            weights,
            settings=settings,
            expect=-1,
        )
        return out.strip().splitlines()[-1]

    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(pretrained.read_bytes()[: pretrained.stat().st_size // 2])
    assert "damaged" in finetune(truncated)
    text = tmp_path / "notes.pth"
    text.write_text("not a checkpoint")
    assert str(text) in finetune(text)
    assert "there is no checkpoint" in finetune(tmp_path / "absent.pth")
    headless = tmp_path / "headless.pth"
    torch.save({"network_weights": {"decoder.x": torch.zeros(1)}}, headless)
    assert "no encoder" in finetune(headless)
    assert "plan the data set like the pre-training one" in finetune(
        pretrained, SETTINGS.replace("base_width=4", "base_width=8")
    )


def test_a_nan_in_a_preprocessed_image_is_named(planned, tmp_path: Path):
    import blosc2

    folder = planned.preprocessed / DATASET / "nnUNetPlans_3d_fullres"
    victim = sorted(p for p in folder.glob("*.b2nd") if not p.stem.endswith("_seg"))[0]
    backup = tmp_path / victim.name
    shutil.copy(victim, backup)
    try:
        values = blosc2.open(str(victim), mode="r")[:]
        victim.unlink()
        values[:] = np.nan
        blosc2.asarray(np.ascontiguousarray(values), urlpath=str(victim))
        out = planned.run(
            "nnUNetv2_train", 10, "3d_fullres", "all", "-tr", "HySparKPretrainTrainer", "-device", "cpu", expect=-1
        )
        assert victim.stem in out and "NaN" in out
    finally:
        shutil.move(backup, victim)


def test_fewer_cases_than_folds(planned, shared_data: Path):
    source = shared_data / "data" / "openkbp"
    ids = json.loads((source / "splits.json").read_text())["train_labelled"][:3]
    planned.add_dataset(
        source, 11, "Three", ids, [], "CT", {"background": 0, "stem": 1, "cord": 2, "parotids": 3}, crop=CROP
    )
    planned.run("nnUNetv2_plan_and_preprocess", "-d", 11, "-c", "3d_fullres", "-np", 2, "-npfp", 2)
    out = planned.run(
        "nnUNetv2_train", 11, "3d_fullres", 0, "-tr", "HySparKPretrainTrainer", "-device", "cpu", expect=-1
    )
    assert "has 3 case(s) for five-fold cross-validation; use fold 'all'" in out
