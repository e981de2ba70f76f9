"""The experiments' scores, comparisons and data sets; that they run is for the studies themselves."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hyspark.planning.remembered import file_digest
from nnunetv2_hyspark.training.settings import resolve_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield importlib.import_module
    for file in (ROOT / "experiments").glob("*.py"):
        sys.modules.pop(file.stem, None)


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
    (tmp_path / "training_log_10.txt").write_text(
        "x: Epoch 2 \nx: Epoch time: 9 s\nx: Epoch 3 \nx: Epoch time: 2.5 s \n"
    )
    (tmp_path / "training_log_9.txt").write_text("x: Epoch 2 \nx: Epoch time: 4 s, about 00:00 h to go\n")
    assert script("scores").training_seconds(tmp_path) == 11.5, "log 10 is later than log 9"


def test_probes_are_read_from_the_log(script, tmp_path):
    (tmp_path / "training_log_1.txt").write_text(
        "x: Epoch 0 \nx: linear probe: Dice 0.1250\nx: other\nx: Epoch 1 \nx: linear probe: Dice 0.5\n"
    )
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
        resolve_settings({"hyspark": {stage: settings, "architecture": study.architecture}}, file.name, stage, {})
    for plan in study.other_plans.values():
        architecture = {**study.architecture, **plan.get("architecture", {})}
        resolve_settings({"hyspark": {"architecture": architecture}}, file.name, "pretraining", {})
    assert all("decoder" in settings for settings in study.pretraining.values()), "whatever the default becomes"
    assert {arm["weights"] for arm in study.arms.values() if "weights" in arm} <= set(study.pretraining)
    assert {name for arm in study.arms.values() for name in arm.get("baselines", [])} <= set(study.arms)
    assert set(study.headline) <= set(study.arms)
    assert {arm["plans"] for arm in study.arms.values() if "plans" in arm} <= set(study.other_plans)
    assert set(study.pretraining_trainers) | set(study.pretraining_plans) <= set(study.pretraining)
    of_the_pile = {name for name, plan in study.other_plans.items() if plan.get("of") == "pile"}
    assert set(study.pretraining_plans.values()) <= of_the_pile
    assert not of_the_pile & {arm.get("plans") for arm in study.arms.values()}


def test_a_training_is_told_to_stop_when_the_time_is_up(script, tmp_path):
    """It may save first; nothing else is interrupted, and failures are told from it."""
    waiting = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved') or 143)); time.sleep(60)"
    run = script("commands").run
    log = tmp_path / "logs" / "log.txt"
    begin = time.monotonic()
    assert not run(log, "python", "-u", "-c", waiting, until=begin + 10)
    assert time.monotonic() - begin < 30 and "saved" in log.read_text()
    assert run(log, "python", "-c", "import time; time.sleep(0.1)"), "planning is never interrupted"
    failing = "raise SystemExit('no such case')"
    with pytest.raises(RuntimeError, match="no such case"):
        run(log, "python", "-c", failing, until=begin + 300)


def test_ending_a_study_ends_its_training(tmp_path):
    """A training left alone would hold its folder against the study that goes on."""
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    study = json.loads((ROOT / "experiments" / "studies" / "hippocampus_cpu.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**study, "name": "ended"}))
    pretraining = tmp_path / "nnUNet_preprocessed" / f"Dataset{study['pile']:03d}_Pile"
    labelled = tmp_path / "nnUNet_preprocessed" / f"Dataset{study['labelled']:03d}_Labelled"
    for folder in (pretraining, labelled):
        folder.mkdir(parents=True)
        raw = tmp_path / "nnUNet_raw" / folder.name
        raw.mkdir(parents=True)
        (raw / "dataset.json").write_text("{}")
        for name in ("nnUNetHySparKPlans", *study["other_plans"]):
            (folder / f"{name}.json").write_text("{}")
            plan = study["other_plans"].get(name) or {key: study.get(key, {}) for key in ("plan", "plan_edit")}
            architecture = {**study["architecture"], **plan.get("architecture", {})}
            request = {**plan, "architecture": architecture, "dataset.json": file_digest(raw / "dataset.json")}
            (folder / f"{name}.study").write_text(json.dumps({"request": request, "is_complete": True}))
        (folder / "splits_final.json").write_text(json.dumps([{"train": [], "val": []}] * 5))
    fake = tmp_path / "bin" / "nnUNetv2_train"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 300\n")
    fake.chmod(0o755)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r}); import study; "
        f"sys.executable = {str(fake.parent / 'python')!r}; study.main()"
    )
    arguments = [str(tmp_path / "study.json"), "--work", str(tmp_path / "work")]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env={**os.environ, **folders})
    try:
        until = time.monotonic() + 60
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_page_is_what_the_script_writes(script, tmp_path, monkeypatch):
    """Its p values aside, whose last digit may depend on SciPy."""
    evidence = script("evidence")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "evidence.md"
    page.unlink()
    results = sorted(map(str, (ROOT / "experiments" / "results").glob("*.json")))
    monkeypatch.setattr(sys, "argv", ["evidence.py", *results, "--docs", str(tmp_path / "docs")])
    evidence.main()
    written, committed = (
        re.sub(r"\(p [-+.e0-9]+\)", "(p)", text) for text in (page.read_text(), (ROOT / "docs/evidence.md").read_text())
    )
    assert written == committed, "run python experiments/evidence.py experiments/results/*.json"


def test_comparison_pairs_cases_and_common_seeds(script):
    compare = script("comparisons").compare
    theirs = [piece(0, [0.5] * 8), piece(1, [0.7] * 8), piece(2, [0.1] * 8)]
    ours = [piece(0, [0.6] * 8), piece(1, [0.8] * 8)]
    first, second, p = compare(ours, theirs)
    assert (first, second) == pytest.approx((70, 60)) and p < 0.01
    assert compare(theirs, theirs)[2] == 1.0


def test_a_comparison_in_words_is_over_common_seeds(script):
    comparison = script("comparisons").comparison
    theirs = [{**piece(0, [0.5] * 8), "curve": [0.1, 0.2, 0.4]}, {**piece(9, [0.1] * 8), "curve": [0.9, 0.9, 0.9]}]
    ours = [{**piece(0, [0.6] * 8), "curve": [0.2, 0.4, 0.6]}]
    end = "itself after 150 of 150"
    means = ": 60.0, 50.0"
    assert comparison("scratch", ours, theirs, 50) == f"scratch: +10.0 (p 0.0078{means}), level after 100, {end}"
    assert comparison("scratch", ours, theirs[:1], 50) == f"scratch: +10.0 (p 0.0078), level after 100, {end}"
    assert comparison("scratch", theirs[:1], ours, 50) == f"scratch: -10.0 (p 0.0078), level never, {end}"
    assert comparison("scratch", ours, theirs[1:], 50) == ""


def test_level_is_told_over_several_epochs(script):
    """A last epoch that happens to be low, or a single high one, does not decide."""
    comparison = script("comparisons").comparison
    theirs = [{**piece(0, [0.5] * 8), "curve": [0.1] * 10 + [0.5] * 9 + [0.1]}]
    ours = [{**piece(0, [0.5] * 8), "curve": [0.1] * 6 + [0.9] + [0.1] * 5 + [0.6] * 8}]
    assert comparison("scratch", ours, theirs, 1).endswith("level after 16, itself after 14 of 20")


def test_structures_are_in_the_order_of_their_numbers_and_none_moves_up(script):
    comparisons = script("comparisons")
    dice = {"10": 0.1, "2": None, "1": 0.5}
    case = {"dice": dice, "hd95": {"10": 4.0, "2": None, "1": 2.0}}
    assert comparisons.by_structure([{"cases": {"a": case}}]) == "50.0, -, 10.0"
    assert comparisons.distances([{"cases": {"a": case}}]) == "2.0, -, 4.0"


def test_a_structure_that_only_the_prediction_has_is_left_out_for_every_arm(script):
    mean_dice = script("comparisons").mean_dice
    found = {"dice": {"1": 0.5, "2": 0.0}, "voxels": {"1": 9, "2": 0}}
    assert mean_dice({"cases": {"a": found}}) == {"a": 50.0}
    absent = {"dice": {"1": 0.5, "2": float("nan")}, "voxels": {"1": 9, "2": 0}}
    assert mean_dice({"cases": {"a": absent}}) == {"a": 50.0}
    assert mean_dice({"cases": {"a": {"dice": {"1": float("nan")}, "voxels": {"1": 0}}}}) == {}
    assert mean_dice({"cases": {"a": {"dice": {"1": 0.5, "2": 0.0}, "voxels": {"1": 9, "2": 4}}}}) == {"a": 25.0}


def test_a_missed_structure_is_farther_than_any_other(script):
    distances = script("comparisons").distances
    cases = {
        name: {"dice": {"1": 0.0 if value is None else 0.5}, "hd95": {"1": value}, "voxels": {"1": 5}}
        for name, value in (("a", 1.0), ("b", None), ("c", 3.0))
    }
    assert distances([{"cases": cases}]) == "3.0; 1 missed"
    absent = {"dice": {"1": float("nan")}, "hd95": {"1": None}, "voxels": {"1": 0}}
    assert distances([{"cases": {"a": cases["a"], "b": absent}}]) == "1.0"


def test_losses_are_read_from_the_logs_and_a_repeated_epoch_counts_once(script, tmp_path):
    epochs = "2026-01-01 00:00:00.1: Epoch {} \n2026-01-01 00:00:00.1: train_loss 0.9 \n2026-01-01: val_loss {} \n"
    (tmp_path / "training_log_1.txt").write_text(epochs.format(0, 0.75) + epochs.format(1, 0.5))
    (tmp_path / "training_log_2.txt").write_text(epochs.format(1, 0.25))
    assert script("scores").validation_losses(tmp_path) == [0.75, 0.25]


def test_trainers_are_compared_by_their_losses(script):
    compare = script("study_tables").losses_of_trainers
    study = {"pretraining": {"a": {}, "b": {}, "c": {}}, "pretraining_trainers": {"b": "Other"}}
    finished = {"a": {"losses": [0.75, 0.5]}, "b": {"losses": [0.75, 0.625]}, "c": {"losses": [0.5, 0.5]}}
    line = (
        "Trained `b` by `Other`. Validation losses, epoch by epoch: `a` 0.7500, 0.5000; `b` 0.7500, 0.6250; "
        "`c` 0.5000, 0.5000. From `a`: `b` at most 0.1250, `c` at most 0.2500."
    )
    assert compare(study, finished) == [line, ""]
    assert compare(study, {"a": {}}) == compare({"pretraining": {"a": {}}}, finished) == []


def test_a_glance_has_the_headline_s_arms_alone_and_says_where_seeds_are_missing(script):
    dice = {
        ("scratch", 0): [[0.5] * 8, [0.7] * 8], ("ours", 0): [[0.6] * 8, [0.9] * 8], ("wide", 0): [[0.5] * 7 + [0.58]],
        ("scratch", 1): [[0.8] * 8, [0.8] * 8], ("ours", 1): [[0.8] * 8, [0.8] * 8], ("other", 1): [[0.1] * 8],
    }
    pieces = [
        {**piece(seed, values), "arm": arm, "fold": fold, "labelled_cases": (20, 5)[fold], "seconds": 1.0}
        for (arm, fold), seeds in dice.items()
        for seed, values in enumerate(seeds)
    ]
    study = {
        "name": "a_study", "table": "What it is.", "arms": {arm: {} for arm in ("scratch", "ours", "wide", "other")},
        "seeds": [0, 1], "headline": {"scratch": "baseline", "wide": "wider", "ours": "pre-trained"},
        "finetuning": {},
    }
    outcome = script("outcomes").Outcome.of({"study": study, "machine": {}, "pretraining": {}, "pieces": pieces})
    assert script("study_tables").at_a_glance(outcome) == [
        "**`a_study`**: What it is.", "",
        "| Dice with this many labelled cases | 5 | 20 |",
        "|---|---|---|",
        "| baseline | 80.0 | 60.0 |",
        "| wider |  | 51.0 (+1.0, 1 seed) |",
        "| pre-trained | 80.0 (+0.0) | 75.0 (**+15.0**) |",
        "",
    ]
    del study["headline"]
    assert script("study_tables").at_a_glance(outcome) == []


def test_variants_of_a_training_are_compared_in_their_own_precision(script):
    lines = script("evidence").rounding_section({
        "rounding": {"cases": 3, "batch": 2, "patch": [8, 8, 8]},
        "losses": {"segmentation": {
            "float64, blocks": [1.0, 0.5], "float64, dense maps": [1.0, 0.5000000005], "float32, blocks": [1.0, 0.4],
            "float32, dense maps": [1.0, 0.44],
        }},
    })
    assert "| segmentation | float64, dense maps | 0e+00 | 1e-09 |" in lines
    assert "| segmentation | float32, dense maps | 0e+00 | 1e-01 |" in lines


def test_pretrainings_are_compared_by_what_differs(script):
    run = {"seconds": 90.0, "summary": {"loss": 0.7}}
    lines = script("study_tables").pretraining_table({
        "a": {**run, "settings": {"epochs": 3, "mask_ratio": 0.5}, "probe": [0.25, 0.5]},
        "b": {**run, "settings": {"epochs": 3, "mask_ratio": 0.75}},
    })
    assert lines[0] == "Pre-training: epochs=3."
    assert "| `a` | mask_ratio=0.5 | 2 | 0.700 | 25.0 → 50.0 |" in lines
    assert "| `b` | mask_ratio=0.75 | 2 | 0.700 | not asked for |" in lines
    assert script("study_tables").pretraining_table({}) == []


def test_folds_are_the_subsets_smallest_first(script):
    splits = {
        "train_labelled": [f"a{n}" for n in range(9)], "val": ["v"],
        "few_label_subsets": {"four": ["a0", "a1", "a2", "a3"], "2": ["a0", "a1"]},
    }
    subsets = script("make_datasets").subsets_of(splits)
    assert [len(ids) for ids in subsets] == [2, 4, 9]
    splits["few_label_subsets"] |= {"two others": ["a7", "a8"], "all": splits["train_labelled"][::-1]}
    splits["few_label_subsets"] |= {"the first two again": ["a1", "a0"]}
    assert script("make_datasets").subsets_of(splits) == [["a0", "a1"], ["a7", "a8"], *subsets[1:]]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"val": ["a"]}, "names cases in val and in train_labelled, a among"),
        ({"val": ["p"]}, "names cases in val and in pretrain, p among"),
        ({"few_label_subsets": {"1": ["b"]}}, "has subsets that are not part of train_labelled, b among"),
    ],
)
def test_splits_that_leak_are_refused(script, tmp_path, changed, message):
    splits = {"pretrain": ["a", "p"], "train_labelled": ["a"], "val": ["v"], "few_label_subsets": {"1": ["a"]}}
    read_folder = script("make_datasets").read_folder
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert read_folder(tmp_path, "Name", "CT", ["organ"]).splits == splits
    (tmp_path / "splits.json").write_text(json.dumps({**splits, **changed}))
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path, "Name", "CT", ["organ"])


def test_a_folder_may_be_named_from_where_one_stands(script, tmp_path, monkeypatch):
    (tmp_path / "scans").mkdir()
    splits = {"pretrain": ["p"], "train_labelled": ["a"], "val": ["v"]}
    (tmp_path / "scans" / "splits.json").write_text(json.dumps(splits))
    monkeypatch.chdir(tmp_path)
    source = script("make_datasets").read_folder(Path("scans"), "Name", "CT", ["organ"])
    monkeypatch.chdir("/")
    assert source.images["p"] == [str(tmp_path / "scans" / "images" / "p.nii.gz")]
    assert source.labels["v"] == str(tmp_path / "scans" / "labels" / "v.nii.gz"), "nnU-Net reads it from elsewhere"


def test_splits_are_drawn_where_none_are_given(script):
    cases = [f"case_{number:02d}" for number in range(50)]
    splits = script("make_datasets").draw_splits(cases)
    assert splits == script("make_datasets").draw_splits(cases), "the same every time"
    assert len(splits["val"]) == 10 and sorted([*splits["val"], *splits["train_labelled"]]) == cases
    assert splits["pretrain"] == splits["train_labelled"], "what is validated is never seen"
    subsets = splits["few_label_subsets"]
    assert [len(ids) for ids in subsets.values()] == [2, 4, 8] and set(subsets["5 %"]) < set(subsets["20 %"])
    assert set(subsets["20 %"]) < set(splits["train_labelled"])


def test_any_data_set_of_nnunet_is_a_source(script, tmp_path, monkeypatch, point_nnunet_to):
    folder = tmp_path / "Dataset009_Spleen"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number in range(5):
        for channel in range(2):
            (folder / "imagesTr" / f"spleen_{number}_{channel:04d}.nii.gz").touch()
        (folder / "labelsTr" / f"spleen_{number}.nii.gz").touch()
    description = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "spleen": 1},
                   "numTraining": 5, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    point_nnunet_to("nnUNet_raw", tmp_path)
    make_datasets = script("make_datasets")
    source = make_datasets.read_nnunet(9, None, "")
    assert source.name == "Spleen" and source.modality == "CT,PET" and len(source.splits["val"]) == 1
    make_datasets.write_labelled(tmp_path / "Dataset971_Spleen", source)
    made = json.loads((tmp_path / "Dataset971_Spleen" / "dataset.json").read_text())
    assert made["numTraining"] == 5 and made["labels"] == description["labels"]
    assert [Path(file).name for file in made["dataset"]["spleen_3"]["images"]] == [
        "spleen_3_0000.nii.gz", "spleen_3_0001.nii.gz"]
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"pretrain": ["spleen_1"], "train_labelled": ["spleen_9"], "val": []}))
    overlapping = {"pretrain": [], "train_labelled": ["spleen_1"], "val": ["spleen_1"]}
    (tmp_path / "overlapping.json").write_text(json.dumps(overlapping))
    with pytest.raises(ValueError, match="names cases in val and in train_labelled, spleen_1 among"):
        make_datasets.read_nnunet(9, tmp_path / "overlapping.json", "")
    with pytest.raises(ValueError, match="names 1 case.s. that Dataset009_Spleen does not have, spleen_9 among them"):
        make_datasets.read_nnunet(9, splits, "")


def test_plans_are_edited_where_a_name_belongs(script, tmp_path):
    file = tmp_path / "plans.json"
    configuration = {"patch_size": [8, 8, 8], "architecture": {"arch_kwargs": {"features_per_stage": [32, 64]}}}
    file.write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    script("preparation").edit_plans(file, {"patch_size": [4, 4, 4], "features_per_stage": [8, 16]})
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
