"""Real MR: plan, pre-train, fine-tune, predict, share and ensemble with nnU-Net's own commands and our plans."""

from __future__ import annotations

import json
from pathlib import Path

import nnunetv2.paths
import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = pytest.mark.slow

DATASET, PLANS, LABELS = "Dataset004_Hippo", "nnUNetHySparKPlans", {"background": 0, "Anterior": 1, "Posterior": 2}
TRAINERS = Path(__file__).resolve().parents[2] / "experiments" / "trainers"


@pytest.fixture(scope="module")
def trained(workspace, shared_data: Path):
    """A pre-trained and a fine-tuned network on six cases."""
    source = shared_data / "data" / "hippocampus"
    splits = json.loads((source / "splits.json").read_text())
    workspace.add_dataset(source, 4, "Hippo", splits["train_labelled"][:6], splits["val"][:2], "MRI", LABELS)
    workspace.run(
        "nnUNetv2_plan_and_preprocess", "-d", 4, "-pl", "HySparKPlanner", "-c", "3d_fullres", "-np", 2, "-npfp", 2
    )
    train = ("nnUNetv2_train", 4, "3d_fullres")
    workspace.run(*train, "all", "-tr", "HySparKPretrainTrainer", "-p", PLANS, "-device", "cpu")
    weights = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all") / "checkpoint_final.pth"
    log = workspace.run(
        *train, 0, "-tr", "HySparKFinetuneTrainer", "-p", PLANS, "-device", "cpu", "-pretrained_weights", weights
    )
    return workspace, log


def test_pretraining_learns_and_leaves_what_a_user_looks_for(trained):
    workspace, _ = trained
    output = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all")
    log = torch.load(output / "checkpoint_final.pth", weights_only=True)["logging"]
    assert len(log["train_losses"]) == 3
    assert log["train_losses"][-1] < log["train_losses"][0] - 0.02
    assert log["val_losses"][-1] < log["val_losses"][0]
    assert (output / "checkpoint_best.pth").is_file() and (output / "progress.png").is_file()
    summary = json.loads((output / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 6
    assert all(0 < case["loss"] < 2 for case in summary["metric_per_case"])
    assert all((output / "validation" / case["picture"]).is_file() for case in summary["metric_per_case"])


def test_fine_tuning_reports_the_load_and_starts_from_the_encoder(trained):
    _, log = trained
    rows = [line.split() for line in log.splitlines() if line.startswith("encoder.")]
    assert {row[0] for row in rows} == {
        "encoder.cnn.stem",
        "encoder.cnn.stages",
        "encoder.cnn.widen",
        "encoder.transformer",
    }
    assert {row[1] for row in rows} == {"loaded"}
    assert "Mean Validation Dice" in log


def test_a_truncated_checkpoint_is_refused_by_a_sentence(trained, tmp_path: Path):
    workspace, _ = trained
    whole = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all") / "checkpoint_final.pth"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(whole.read_bytes()[:-1000])
    said = workspace.run(
        "nnUNetv2_train", 4, "3d_fullres", 1, "-tr", "HySparKFinetuneTrainer", "-p", PLANS, "-device", "cpu",
        "-pretrained_weights", broken, expect=1,
    )
    assert f"nnunetv2_hyspark: error: {broken}" in said
    assert "Traceback" not in said


def predict(workspace, output: Path, *extra, trainer: str = "HySparKFinetuneTrainer", fold: int = 0) -> list[Path]:
    images = workspace.raw / DATASET / "imagesTs"
    command = ("nnUNetv2_predict", "-d", 4, "-tr", trainer, "-p", PLANS, "-c", "3d_fullres", "-f", fold)
    workspace.run(*command, "-i", images, "-o", output, "-device", "cpu", *extra)
    return sorted(output.glob("*.nii.gz"))


def test_predictions_have_the_images_geometry_and_survive_sharing_and_ensembling(trained, tmp_path: Path):
    workspace, _ = trained
    first = predict(workspace, tmp_path / "first", "--save_probabilities")
    assert len(first) == 2
    for file in first:
        image = sitk.ReadImage(str(workspace.raw / DATASET / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz")))
        prediction = sitk.ReadImage(str(file))
        assert prediction.GetSize() == image.GetSize()
        assert np.allclose(prediction.GetSpacing(), image.GetSpacing())
        assert np.allclose(prediction.GetOrigin(), image.GetOrigin())
        assert np.allclose(prediction.GetDirection(), image.GetDirection())

    archive = tmp_path / "model.zip"
    workspace.run(
        "nnUNetv2_export_model_to_zip",
        "-d",
        4,
        "-tr",
        "HySparKFinetuneTrainer",
        "-p",
        PLANS,
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-o",
        archive,
    )
    elsewhere = type(workspace)(tmp_path / "elsewhere", settings="")
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    elsewhere.run(
        "nnUNetv2_predict",
        "-d",
        DATASET,
        "-tr",
        "HySparKFinetuneTrainer",
        "-p",
        PLANS,
        "-c",
        "3d_fullres",
        "-f",
        0,
        "-i",
        workspace.raw / DATASET / "imagesTs",
        "-o",
        tmp_path / "second",
        "-device",
        "cpu",
        "--save_probabilities",
    )
    workspace.run("nnUNetv2_ensemble", "-i", tmp_path / "first", tmp_path / "second", "-o", tmp_path / "both", "-np", 2)
    for file in first:
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for folder in ("second", "both"):
            np.testing.assert_array_equal(
                sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / folder / file.name))), expected
            )


def test_continue_validate_and_no_checkpoints(trained):
    """--c goes on after a longer run is asked for, --val runs validation alone, --disable_checkpointing writes none."""
    workspace, _ = trained
    command = ("nnUNetv2_train", 4, "3d_fullres", 1, "-tr", "HySparKPretrainTrainer", "-p", PLANS, "-device", "cpu")
    output = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, 1)
    short = workspace.settings.replace("pretraining.epochs=3", "pretraining.epochs=1")
    workspace.run(*command, "--disable_checkpointing", settings=short)
    assert not list(output.glob("*.pth"))
    workspace.run(*command, settings=short)
    longer = workspace.run(*command, "--c", settings=workspace.settings.replace("epochs=3", "epochs=2"))
    assert "Epoch 1" in longer and "Epoch 0\n" not in longer
    (output / "validation" / "summary.json").unlink()
    validated = workspace.run(*command, "--val", settings=short)
    assert "Epoch " not in validated.replace("Epoch time", "")
    assert (output / "validation" / "summary.json").is_file()


def test_the_baseline_trains_from_scratch_and_refuses_weights(trained, tmp_path: Path):
    """Without mirroring, so that validation and prediction without test-time augmentation are seen as well."""
    workspace, _ = trained
    command = ("nnUNetv2_train", 4, "3d_fullres", 1, "-tr", "HySparKScratchTrainer", "-p", PLANS, "-device", "cpu")
    short = workspace.settings.replace("finetuning.epochs=2", "finetuning.epochs=1,mirror_axes=[]")
    log = workspace.run(*command, settings=short)
    assert "Mean Validation Dice" in log
    assert len(predict(workspace, tmp_path / "predicted", trainer="HySparKScratchTrainer", fold=1)) == 2
    weights = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all") / "checkpoint_final.pth"
    log = workspace.run(*command, "-pretrained_weights", weights, settings=short, expect=-1)
    assert "use -tr HySparKFinetuneTrainer" in log


def test_pre_training_goes_on_from_another_checkpoint(trained):
    workspace, _ = trained
    weights = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all") / "checkpoint_final.pth"
    log = workspace.run(
        "nnUNetv2_train", 4, "3d_fullres", 2, "-tr", "HySparKPretrainTrainer", "-p", PLANS, "-device", "cpu",
        "-pretrained_weights", weights,
        settings=workspace.settings.replace("pretraining.epochs=3", "pretraining.epochs=1"),
    )  # fmt: skip
    rows = {line.split()[0]: line.split()[1] for line in log.splitlines() if line.startswith(("encoder.", "reconstr"))}
    assert set(rows.values()) == {"loaded"} and len(rows) > 4


def test_the_stock_trainer_takes_the_weights_without_anything_of_ours_in_between(trained):
    """nnU-Net's own trainer on our plans, its own loader, and the start-up hook switched off."""
    if not hasattr(nnunetv2.paths, "nnUNet_extTrainer"):
        pytest.skip("this nnU-Net knows no trainers outside its own folders")
    workspace, _ = trained
    weights = workspace.output(DATASET, "HySparKPretrainTrainer", PLANS, "all") / "checkpoint_final.pth"
    log = workspace.run(
        "nnUNetv2_train", 4, "3d_fullres", 3, "-tr", "nnUNetTrainerOfLength", "-p", PLANS, "-device", "cpu",
        "-pretrained_weights", weights, settings="",
        variables={
            "nnUNet_hyspark_disable": "1", "nnUNet_extTrainer": str(TRAINERS), "nnUNet_compile": "f",
            "EPOCHS": "1", "ITERATIONS": "2", "VAL_ITERATIONS": "1", "PYTHONUNBUFFERED": "1",
        },
    )  # fmt: skip
    assert f"Loading pretrained weights from file  {weights}" in log
    pretrained = torch.load(weights, weights_only=True)["network_weights"]
    blocks = log.partition("list of overlapping blocks")[2].partition("### Done ###")[0]
    taken = {line.split()[0] for line in blocks.splitlines() if " shape torch.Size(" in line}
    assert taken >= {name for name in pretrained if name.startswith("encoder.")}
    assert "HySparK settings" not in log and "Mean Validation Dice" in log
    final = workspace.output(DATASET, "nnUNetTrainerOfLength", PLANS, 3) / "checkpoint_final.pth"
    content = torch.load(final, weights_only=False)  # made a moment ago by nnU-Net
    assert content["trainer_name"] == "nnUNetTrainerOfLength"
    assert content["network_weights"].keys() >= taken
