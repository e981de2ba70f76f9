"""The experiments' scores, comparisons and data sets; that they run is for the studies themselves."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hyspark.configuration import Source, resolve
from nnunetv2_hyspark.networks.topology import ArchitectureConfig
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig
from nnunetv2_hyspark.training.finetuning import FinetuningConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield importlib.import_module
    for name in ("scores", "study", "evidence", "make_datasets"):
        sys.modules.pop(name, None)


def test_hausdorff_of_a_shifted_cube_is_the_shift(script):
    hausdorff95 = script("scores").hausdorff95
    first, second = np.zeros((2, 20, 20, 20), bool)
    first[5:10, 5:10, 5:10] = True
    second[8:13, 5:10, 5:10] = True
    assert hausdorff95(first, first, (1, 1, 1)) == 0
    assert hausdorff95(first, second, (1, 1, 1)) == 3
    assert hausdorff95(first, second, (2.5, 1, 1)) == 7.5
    assert hausdorff95(first, np.zeros_like(first), (1, 1, 1)) is None


def test_learning_curve_is_read_from_the_log_and_a_repeated_epoch_counts_once(script, tmp_path):
    (tmp_path / "training_log_1.txt").write_text(
        "2026-01-01 00:00:00.1: Epoch 0 \n2026-01-01 00:00:00.2: Pseudo dice [np.float64(0.1), np.float64(0.3)] \n"
        "2026-01-01 00:00:00.3: Epoch 1 \n2026-01-01 00:00:00.4: Pseudo dice [np.float64(0.5), nan] \n"
    )
    (tmp_path / "training_log_2.txt").write_text(
        "2026-01-01 00:01:00.3: Epoch 1 \n2026-01-01 00:01:00.4: Pseudo dice [np.float64(0.6), np.float64(0.8)] \n"
    )
    assert script("scores").learning_curve(tmp_path) == pytest.approx([0.2, 0.7])
    (tmp_path / "training_log_3.txt").write_text("x: Epoch time: 2.5 s \nx: Epoch time: 3 s, about 00:00 h to go\n")
    assert script("scores").training_seconds(tmp_path) == 5.5


def test_probes_are_read_from_the_log(script, tmp_path):
    (tmp_path / "training_log_1.txt").write_text("x: linear probe: Dice 0.1250\nx: other\nx: linear probe: Dice 0.5\n")
    assert script("scores").probe_dice(tmp_path) == [0.125, 0.5]
    assert script("scores").probe_dice(tmp_path / "nothing") == []


def test_scores_of_a_validation(script, tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    (tmp_path / "validation").mkdir()
    for name, array in (("reference", labels), ("case_1", np.roll(labels, 1, 0))):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 2.0))
        sitk.WriteImage(image, str(tmp_path / "validation" / f"{name}.nii.gz"))
    summary = {"metric_per_case": [{
        "reference_file": str(tmp_path / "validation" / "reference.nii.gz"),
        "prediction_file": str(tmp_path / "validation" / "case_1.nii.gz"),
        "metrics": {"1": {"Dice": 0.75}, "2": {"Dice": float("nan")}},
    }]}
    (tmp_path / "validation" / "summary.json").write_text(json.dumps(summary))
    scores = script("scores").score_validation(tmp_path)["cases"]["case_1"]
    assert scores["dice"]["1"] == 0.75 and np.isnan(scores["dice"]["2"])
    assert scores["hd95"] == {"1": 2.0, "2": None}


def piece(seed: int, dice: list[float]) -> dict:
    return {"seed": seed, "cases": {f"c{n}": {"dice": {"1": d}, "hd95": {"1": 1.0}} for n, d in enumerate(dice)}}


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "studies").glob("*.json")), ids=lambda file: file.stem)
def test_every_study_has_settings_that_exist_and_weights_that_are_made(script, file):
    study = script("study").Study(**json.loads(file.read_text()))
    assert study.name == file.stem
    sections = [("pretraining", settings) for settings in study.pretraining.values()]
    sections += [("finetuning", {**study.finetuning, **arm.get("settings", {})}) for arm in study.arms.values()]
    for stage, settings in sections:
        defaults = {"pretraining": HySparKConfig(), "finetuning": FinetuningConfig()}
        resolve(defaults, stage, (), [Source(file.name, {stage: settings})])
    resolve({"architecture": ArchitectureConfig()}, "architecture", (), [Source(file.name, study.architecture)])
    assert {arm["weights"] for arm in study.arms.values() if "weights" in arm} <= set(study.pretraining)
    assert {name for arm in study.arms.values() for name in arm.get("baselines", [])} <= set(study.arms)
    assert {arm["plans"] for arm in study.arms.values() if "plans" in arm} <= set(study.other_plans)


def test_comparison_pairs_cases_and_common_seeds(script):
    compare = script("evidence").compare
    theirs = [piece(0, [0.5] * 8), piece(1, [0.7] * 8), piece(2, [0.1] * 8)]
    ours = [piece(0, [0.6] * 8), piece(1, [0.8] * 8)]
    points, p = compare(ours, theirs)
    assert points == pytest.approx(10) and p < 0.01
    assert compare(theirs, theirs) == (0.0, 1.0)


def test_a_comparison_in_words_is_over_common_seeds(script):
    comparison = script("evidence").comparison
    theirs = [{**piece(0, [0.5] * 8), "curve": [0.1, 0.2, 0.4]}, {**piece(9, [0.1] * 8), "curve": [0.9, 0.9, 0.9]}]
    ours = [{**piece(0, [0.6] * 8), "curve": [0.2, 0.3, 0.5]}]
    assert comparison("scratch", ours, theirs, 50) == "scratch: +10.0 (p 0.0078), level after 150 steps of 150"
    assert comparison("scratch", theirs[:1], ours, 50) == "scratch: -10.0 (p 0.0078), level never in 150"
    assert comparison("scratch", ours, theirs[1:], 50) == ""


def test_pretrainings_are_compared_by_what_differs(script):
    run = {"seconds": 90.0, "summary": {"loss": 0.7}}
    lines = script("evidence").pretraining_table({
        "a": {**run, "settings": {"epochs": 3, "mask_ratio": 0.5}, "probe": [0.25, 0.5]},
        "b": {**run, "settings": {"epochs": 3, "mask_ratio": 0.75}},
    })
    assert lines[0] == "Pre-training: epochs=3."
    assert "| `a` | mask_ratio=0.5 | 2 | 0.700 | 25.0 → 50.0 |" in lines
    assert "| `b` | mask_ratio=0.75 | 2 | 0.700 | not asked for |" in lines
    assert script("evidence").pretraining_table({}) == []


def test_folds_are_the_subsets_smallest_first(script):
    splits = {
        "train_labelled": [f"a{n}" for n in range(9)], "val": ["v"],
        "few_label_subsets": {"four": ["a0", "a1", "a2", "a3"], "2": ["a0", "a1"]},
    }
    subsets = script("make_datasets").subsets_of(splits)
    assert [(name, len(ids)) for name, ids in subsets.items()] == [("2", 2), ("4", 4), ("9", 9)]


def test_plans_are_edited_where_a_name_belongs(script, tmp_path):
    file = tmp_path / "plans.json"
    configuration = {"patch_size": [8, 8, 8], "architecture": {"arch_kwargs": {"features_per_stage": [32, 64]}}}
    file.write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    script("study").edit_plans(file, {"patch_size": [4, 4, 4], "features_per_stage": [8, 16]})
    edited = json.loads(file.read_text())["configurations"]["3d_fullres"]
    assert edited["patch_size"] == [4, 4, 4]
    assert edited["architecture"]["arch_kwargs"] == {"features_per_stage": [8, 16]}


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "studies").glob("*.json")), ids=lambda f: f.stem)
def test_study_files_are_complete(script, file):
    study = script("study").Study(**json.loads(file.read_text()))
    assert study.name == file.stem
    for arm in study.arms.values():
        assert arm.get("weights") in (None, *study.pretraining)
        assert arm.get("plans") in (None, *study.other_plans)
