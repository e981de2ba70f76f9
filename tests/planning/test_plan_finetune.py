"""Plans that match a checkpoint, through `hyspark plan-finetune` in-process."""
import hashlib
import json
import re

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.planning.remembered import RememberedCheckpoint
from nnunetv2_hyspark.training.settings import resolve_settings
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder

NAME = "nnUNetHySparKFinetunePlans"
CT = (10, "Target", (60, 70, 64), (3.0, 1.0, 1.0), ["CT"])


def plan(*arguments):
    """Exit status of hyspark plan-finetune."""
    return main(["plan-finetune", *map(str, arguments)])


def test_the_plan_matches_the_checkpoint(make_dataset, make_checkpoint, folders, capsys):
    dataset, checkpoint = make_dataset(*CT), make_checkpoint()
    assert plan("-d", 10, "--from", checkpoint) == 0
    out = capsys.readouterr().out
    assert f"nnUNetv2_preprocess -d 10 -plans_name {NAME} -c 3d_fullres\n" in out
    assert f"nnUNetv2_train 10 3d_fullres 0 -tr HySparKFinetuneTrainer -p {NAME}\n" in out
    plans = folders.plans(dataset, NAME)
    assert list(plans["configurations"]) == ["3d_fullres"]
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    assert configuration.spacing == [1.5, 1.5, 1.5] and configuration.patch_size == [48, 48, 48]
    assert configuration.normalization_schemes == ["CTNormalization"]
    assert manager.foreground_intensity_properties_per_channel["0"]["std"] == 333.0
    assert configuration.data_identifier == f"{NAME}_3d_fullres"
    block = configuration.configuration["hyspark"]
    assert block["checkpoint"] == {
        "path": str(checkpoint.resolve()), "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    }
    settings = resolve_settings(configuration.configuration, "3d_fullres", "finetuning", environment={})
    assert settings.checkpoint is not None
    settings.checkpoint.check()
    network = get_network_from_plans(
        configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=True,
    )
    report = load_pretrained_encoder(network, checkpoint)
    assert not [e for e in report.entries if e.name.startswith("encoder.") and e.action != "loaded"]


def test_settings_of_the_pretraining_before_it_are_no_matter(make_dataset, make_checkpoint, monkeypatch):
    """The variable may still be set as a pre-training by a plan with the paper's decoder took it."""
    make_dataset(*CT)
    monkeypatch.setenv("nnUNet_hyspark", "decoder_norm=batch")
    assert plan("-d", 10, "--from", make_checkpoint()) == 0


@pytest.mark.parametrize("cnn", ["residual", "plain"])
def test_checkpoints_with_nnunets_own_encoders(make_dataset, make_checkpoint, folders, capsys, cnn):
    dataset, checkpoint = make_dataset(*CT), make_checkpoint(cnn=cnn, channels=2)
    assert plan("-d", 10, "--from", checkpoint) == 0
    assert "2 input channel(s)" in capsys.readouterr().out
    architecture = folders.plans(dataset, NAME)["configurations"]["3d_fullres"]["architecture"]
    assert architecture["arch_kwargs"]["cnn"] == cnn
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 2, 3,
        deep_supervision=True,
    )
    report = load_pretrained_encoder(network, checkpoint)
    assert not [e for e in report.entries if e.name.startswith("encoder.") and e.action != "loaded"]


def test_spacing_of_the_target_or_ones_own(make_dataset, make_checkpoint, folders):
    dataset, checkpoint = make_dataset(*CT), make_checkpoint()
    assert plan("-d", dataset, "--from", checkpoint, "--spacing", "default", "-p", "Native") == 0
    assert folders.plans(dataset, "Native")["configurations"]["3d_fullres"]["spacing"] == [3.0, 1.0, 1.0]
    assert plan("-d", 10, "--from", checkpoint, "--spacing", 2, 2.5, 3, "-p", "Own") == 0
    own = folders.plans(dataset, "Own")
    assert own["transpose_forward"] == [2, 0, 1]
    assert own["configurations"]["3d_fullres"]["spacing"] == [3.0, 2.0, 2.5]


def test_a_checkpoint_of_slices_meets_the_targets_slices(make_dataset, make_checkpoint, folders, capsys):
    dataset = make_dataset(11, "Sagittal", (256, 256, 40), (0.7, 0.7, 4.0), ["CT"])
    checkpoint = make_checkpoint(spacing=[3.0, 0.6, 0.6], patch_size=[8, 64, 64])
    assert plan("-d", 11, "--from", checkpoint) == 0
    plans = folders.plans(dataset, NAME)
    assert plans["transpose_forward"] == [2, 0, 1]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 0.6, 0.6]
    assert "slices lie along axis 2, those of pre-training along axis 0" in capsys.readouterr().out


def test_small_images_get_small_patches(make_dataset, make_checkpoint, folders, capsys):
    dataset = make_dataset(12, "Small", (20, 40, 40), (1.5, 1.5, 1.5), ["CT"])
    assert plan("-d", 12, "--from", make_checkpoint()) == 0
    assert folders.plans(dataset, NAME)["configurations"]["3d_fullres"]["patch_size"] == [24, 40, 40]
    assert "24x40x40 voxels instead of 48x48x48" in capsys.readouterr().out


def test_other_channels_are_remarked(make_dataset, make_checkpoint, folders, capsys):
    dataset = make_dataset(13, "Two", (60, 60, 60), (1.5, 1.5, 1.5), ["CT", "CT"])
    assert plan("-d", 13, "--from", make_checkpoint()) == 0
    plans = folders.plans(dataset, NAME)
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"] * 2
    assert plans["foreground_intensity_properties_per_channel"]["1"]["std"] == 333.0
    assert "1 input channel(s) (CT), the target 2 (CT, CT)" in capsys.readouterr().out


def test_hounsfield_normalization_of_mr_is_refused(make_dataset, make_checkpoint, folders, capsys):
    dataset = make_dataset(14, "Mr", (60, 60, 60), (1.5, 1.5, 1.5), ["T2"])
    checkpoint = make_checkpoint()
    assert plan("-d", 14, "--from", checkpoint) == 2
    assert "channel(s) T2 are not CT; use --normalization default" in capsys.readouterr().err
    assert plan("-d", 14, "--from", checkpoint, "--normalization", "default") == 0
    assert "ZScoreNormalization, in pre-training by CTNormalization" in capsys.readouterr().out
    schemes = folders.plans(dataset, NAME)["configurations"]["3d_fullres"]["normalization_schemes"]
    assert schemes == ["ZScoreNormalization"]


def test_other_intensities_of_ct_are_remarked(make_dataset, make_checkpoint, capsys):
    make_dataset(*CT)
    said = "channel CT: CT intensities were clipped to -999 to 888 HU, mean -7, scale 333 in pre-training, and are"
    assert plan("-d", 10, "--from", make_checkpoint()) == 0
    assert said not in capsys.readouterr().out
    assert plan("-d", 10, "--from", make_checkpoint(), "--normalization", "default") == 0
    assert said in capsys.readouterr().out


def test_z_scores_of_ct_are_remarked(make_dataset, make_checkpoint, capsys):
    make_dataset(*CT)
    assert plan("-d", 10, "--from", make_checkpoint(normalization_schemes=["ZScoreNormalization"])) == 0
    assert "channel CT is CT but is normalised by ZScoreNormalization" in capsys.readouterr().out


def test_what_is_missing_is_said(make_dataset, make_checkpoint, folders, tmp_path, capsys):
    dataset = make_dataset(*CT)
    silent = make_checkpoint("silent.pth", spacing=None)
    foreign = tmp_path / "foreign.pth"
    torch.save({"network_weights": {"conv.weight": torch.zeros(3)}}, foreign)
    (folders.preprocessed / dataset / "nnUNetPlans.json").write_text(
        json.dumps({"experiment_planner_used": "ExperimentPlanner"})
    )
    for arguments, sentence in (
        (("-d", 99, "--from", silent), "data set 99 was not found"),
        (("-d", 10, "--from", tmp_path / "none.pth"), "none.pth"),
        (("-d", 10, "--from", foreign), "does not describe a HySparK network"),
        (("-d", 10, "--from", silent), "does not tell the spacing"),
        (("-d", 10, "--from", silent, "--spacing", "1", "1"), "expected pretrained, default, or three positive"),
        (("-d", 10, "--from", silent, "-p", "nnUNetPlans"), "holds plans of ExperimentPlanner"),
        (("-d", 10, "--from", make_checkpoint(), "-gpu_memory_target", 0.1), "-gpu_memory_target"),
    ):
        assert plan(*arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    (folders.preprocessed / dataset / "dataset_fingerprint.json").unlink()
    assert plan("-d", 10, "--from", silent) == 2
    assert "run nnUNetv2_extract_fingerprint -d 10 first" in capsys.readouterr().err


def test_advice_for_a_target_too_small_leaves_the_network_alone(make_dataset, make_checkpoint, capsys):
    make_dataset(*CT)
    assert plan("-d", 10, "--from", make_checkpoint(), "-gpu_memory_target", 0.1) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"needs about (\d+\.\d) GB, but the memory target is 0\.1 GB; plan with -gpu_memory_target \1 or more, or "
        r"pre-train a smaller network\.\n$",
        error,
    )
    assert "base_width" not in error


def test_a_remembered_file_that_is_gone_or_changed_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"weights")
    remembered = RememberedCheckpoint.of(path)
    remembered.check()
    path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="has changed since these plans were made"):
        remembered.check()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="-pretrained_weights"):
        remembered.check()


def test_a_damaged_entry_is_named():
    configuration = {"hyspark": {"checkpoint": "a.pth"}, "architecture": {}}
    with pytest.raises(ValueError, match='"checkpoint" in the "hyspark" block of configuration 3d_fullres'):
        resolve_settings(configuration, "3d_fullres", "finetuning", environment={})


def test_the_planner_alone_says_where_it_belongs(make_dataset):
    from nnunetv2_hyspark.planners.hyspark_checkpoint_planner import HySparKCheckpointPlanner

    make_dataset(*CT)
    with pytest.raises(ValueError, match="use hyspark plan-finetune"):
        HySparKCheckpointPlanner(10)
