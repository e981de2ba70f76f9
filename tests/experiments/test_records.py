"""What a study remembers: nothing is mixed, nothing is stored twice, and what was changed since is said."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunetv2_hyspark.planning.remembered import file_digest

ROOT = Path(__file__).parents[2]
MODULES = ("study", "study_file", "records", "commands", "preparation", "scores")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def study(script):
    return script("study_file").Study(
        name="small", pile=1, labelled=2, plan=[], architecture={}, folds=[0], seeds=[0],
        pretraining={"short": {"epochs": 1}}, finetuning={"epochs": 2},
        arms={"scratch": {"trainer": "Scratch"}, "finetuned": {"trainer": "Finetune", "weights": "short"}},
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no JSON"),
        ('{"name": "a", "arm": {}}', r"lacks the key.s. architecture, arms, .* has the unknown key.s. arm;"),
    ],
)
def test_a_study_s_file_that_is_wrong_is_answered_in_a_sentence(script, tmp_path, text, message):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        script("study_file").Study.read(tmp_path / "study.json")


PIECE = {"arm": "scratch", "fold": 0, "seed": 0, "labelled_cases": 3, "cases": {}, "curve": [], "seconds": 1.0}


def test_a_piece_is_stored_once(script, study, tmp_path):
    results = script("records").Results(tmp_path / "small.json", study)
    assert not results.has("scratch", 0, 0)
    results.add_piece(PIECE)
    results.add_piece({**PIECE, "labelled_cases": 4})
    assert results.has("scratch", 0, 0) and [p["labelled_cases"] for p in results.read()["pieces"]] == [3]
    assert results.read()["machine"]["processors"] >= 1


def test_a_pretraining_that_was_redone_is_another_one(script, study, tmp_path):
    results = script("records").Results(tmp_path / "small.json", study)
    assert results.add_pretraining("short", "a", {"seconds": 1}) == "short"
    assert results.add_pretraining("short", "a", {"seconds": 9}) == "short"
    assert results.add_pretraining("short", "b", {"seconds": 2}) == "short, run 2"
    assert results.add_pretraining("short", "b", {"seconds": 9}) == "short, run 2"
    assert [run["seconds"] for run in results.read()["pretraining"].values()] == [1, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"finetuning": {"epochs": 3}}, 'finetuning was {"epochs": 2}, is {"epochs": 3}'),
        ({"architecture": {"base_width": 8}}, "architecture was"),
        ({"arms": {"scratch": {"trainer": "B"}}}, 'arm scratch was {"trainer": "Scratch"}, is {"trainer": "B"}'),
        ({"pretraining": {"short": {"epochs": 2}}}, "pretraining short was"),
        ({"pretraining_trainers": {"short": "Other"}}, "pretraining_trainers short was null"),
    ],
)
def test_results_of_another_study_of_this_name_are_refused(script, study, tmp_path, change, message):
    records = script("records")
    results = records.Results(tmp_path / "small.json", study)
    results.add_piece(PIECE)
    results.add_pretraining("short", "a", {})
    with pytest.raises(ValueError, match="was another one") as raised:
        records.Results(tmp_path / "small.json", replace(study, **change))
    assert message in str(raised.value)


def test_a_study_may_grow(script, study, tmp_path):
    records = script("records")
    records.Results(tmp_path / "small.json", study).add_piece(PIECE)
    arms = {**study.arms, "scratch": {"trainer": "Scratch", "baselines": ["new"]}, "new": {"trainer": "Scratch"}}
    grown = replace(study, arms=arms, seeds=[0, 1], folds=[0, 1], table="Text", pretraining={"long": {}})
    assert records.Results(tmp_path / "small.json", grown).has("scratch", 0, 0)


def test_what_others_have_added_meanwhile_stays(script, study, tmp_path):
    """A process that began before an arm was added stores a piece after one that knows the arm."""
    records = script("records")
    old = records.Results(tmp_path / "small.json", study)
    grown = replace(study, arms={**study.arms, "new": {"trainer": "Scratch"}})
    records.Results(tmp_path / "small.json", grown).add_piece({**PIECE, "arm": "new"})
    old.add_piece(PIECE)
    again = records.Results(tmp_path / "small.json", grown)
    assert again.has("new", 0, 0) and again.has("scratch", 0, 0)


def test_a_study_that_differs_is_refused_before_anything_is_finished(script, study, tmp_path):
    records = script("records")
    records.Results(tmp_path / "small.json", study)
    with pytest.raises(ValueError, match="finetuning was"):
        records.Results(tmp_path / "small.json", replace(study, finetuning={"epochs": 99}))


def test_pieces_of_other_splits_are_not_mixed(script, study, tmp_path):
    results = script("records").Results(tmp_path / "small.json", study)
    results.expect_splits("a")
    results.expect_splits("b")
    results.add_piece(PIECE)
    results.expect_splits("b")
    with pytest.raises(ValueError, match=r"other splits than splits_final\.json has now"):
        results.expect_splits("a")


def test_commits_of_all_goes_are_noted(script, tmp_path):
    commits_of = script("records").commits_of
    for now in ("a", "b+", "a"):
        commits_of(tmp_path / "commits_0.json", now)
    assert commits_of(tmp_path / "commits_0.json") == ["a", "b+"]


def test_a_folder_of_another_training_is_not_gone_on_with(script, tmp_path):
    claim = script("records").claim
    file = tmp_path / "arm" / "request_0.json"
    claim(file, {"settings": {"epochs": 2}}, is_begun=False)
    claim(file, {"settings": {"epochs": 3}}, is_begun=False)
    claim(file, {"settings": {"epochs": 3}}, is_begun=True)
    with pytest.raises(ValueError, match=r'settings was {"epochs": 3}, is {"epochs": 4}.*another folder as --work'):
        claim(file, {"settings": {"epochs": 4}}, is_begun=True)


def test_who_does_not_wait_is_told_that_another_process_works_on_it(script, tmp_path):
    exclusive = script("records").exclusive
    holder = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r}); from pathlib import Path; "
        f"from records import exclusive\n"
        f"with exclusive(Path({str(tmp_path / 'lock')!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        begin = time.monotonic()
        with exclusive(tmp_path / "lock", until=begin + 1) as is_ours:
            assert not is_ours and 1 <= time.monotonic() - begin < 5
        process.communicate("")
        with exclusive(tmp_path / "lock", until=0.0) as is_ours:
            assert is_ours
    finally:
        process.kill()


def test_plans_are_made_once_for_one_request(script, tmp_path):
    make_plans = script("preparation").make_plans
    file, made = tmp_path / "Dataset001_A" / "Plans.json", []

    def make():
        file.write_text("{}")
        made.append(len(made))
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_plans(file, {"spacing": (5, 5)}, make)
    for _ in range(2):
        make_plans(file, {"spacing": (5, 5)}, make)
    assert made == [0, 1], "an interrupted go is repeated, a finished one is not"
    with pytest.raises(ValueError, match=r"for another study \(spacing was \[5, 5\], is \[4, 4\]\)"):
        make_plans(file, {"spacing": (4, 4)}, make)
    file.with_suffix(".study").unlink()
    with pytest.raises(ValueError, match="was not made by a study"):
        make_plans(file, {"spacing": (5, 5)}, make)
    assert file.exists()


def test_images_can_be_normalised_like_the_other_data_set_s(script, tmp_path):
    key = "foreground_intensity_properties_per_channel"
    for name, std in (("A", 300), ("B", 60)):
        plans = {key: {"0": {"std": std}}, "configurations": {"3d_fullres": {"data_identifier": "shared"}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(plans))
    script("preparation").take_intensities(tmp_path / "A.json", tmp_path / "B.json")
    changed = json.loads((tmp_path / "A.json").read_text())
    assert changed[key] == {"0": {"std": 60}}
    assert changed["configurations"]["3d_fullres"]["data_identifier"] == "A_3d_fullres"


def test_further_plans_may_have_another_network(script, tmp_path, monkeypatch):
    """Their settings are added to the study's, and are part of what the plans are remembered by."""
    preparation, runs = script("preparation"), []
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(tmp_path / name))
        for number in (1, 2):
            folder = tmp_path / name / f"Dataset{number:03d}_A"
            folder.mkdir(parents=True)
            (folder / "dataset.json").write_text("{}")
            (folder / "splits_final.json").write_text("[{}]")

    def plan(log, *command, settings, until=0.0):
        name = command[command.index("-overwrite_plans_name") + 1]
        runs.append((name, command[2], settings))
        content = {"configurations": {"3d_fullres": {"architecture": {"arch_kwargs": {}}}}}
        (tmp_path / "nnUNet_preprocessed" / f"Dataset00{command[2]}_A" / f"{name}.json").write_text(json.dumps(content))

    monkeypatch.setattr(preparation.commands, "run", plan)
    residual = {"arguments": [], "architecture": {"cnn": "residual"}, "edit": {"patch_size": [4, 4, 4]}}
    study = script("study_file").Study(
        name="small", pile=1, labelled=2, plan=[], architecture={"base_width": 8}, pretraining={}, finetuning={},
        arms={}, folds=[0], seeds=[0], plans="Plans",
        other_plans={
            "Residual": residual, "ResidualPile": {**residual, "of": "pile"}, "Other": {**residual, "architecture": {}},
        },
    )
    for _ in range(2):
        preparation.prepare(study, tmp_path / "logs")
    both = {"base_width": 8, "cnn": "residual"}
    assert runs == [
        ("Plans", "1", {"base_width": 8}), ("Plans", "2", {"base_width": 8}),
        ("Residual", "2", both), ("ResidualPile", "1", both), ("Other", "2", {"base_width": 8}),
    ]
    study.other_plans["Residual"]["architecture"] = {"cnn": "mednext"}
    with pytest.raises(ValueError, match="was made for another study"):
        preparation.prepare(study, tmp_path / "logs")


FAKE = """#!{python}
import json, os, sys, time
from pathlib import Path
number, fold = sys.argv[1], sys.argv[3]
trainer = sys.argv[sys.argv.index("-tr") + 1]
folder = Path(os.environ["nnUNet_results"]) / f"Dataset{{int(number):03d}}_A" / trainer / f"fold_{{fold}}"
(folder / "validation").mkdir(parents=True, exist_ok=True)
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(0.3)
(folder / "checkpoint_final.pth").write_text(os.environ["nnUNet_hyspark"])
summary = {{"mean": {{"loss": 0.5}}, "metric_per_case": []}}
(folder / "validation" / "summary.json").write_text(json.dumps(summary))
"""


def run_study(file: Path, work: Path, fake: Path) -> None:
    sys.path.insert(0, str(ROOT / "experiments"))
    import study

    sys.executable = str(fake.parent / "python")
    sys.argv = ["study.py", str(file), "--work", str(work)]
    study.main()


def test_two_processes_share_a_study(study, tmp_path, monkeypatch):
    """Every training is run once, the pre-training too, and results are in the work folder, not in the repository."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    for number in (1, 2):
        folder = folders["nnUNet_preprocessed"] / f"Dataset{number:03d}_A"
        folder.mkdir()
        (folder / f"{study.plans}.json").write_text("{}")
        raw = folders["nnUNet_raw"] / folder.name
        raw.mkdir()
        (raw / "dataset.json").write_text("{}")
        request = {
            "plan": study.plan, "architecture": study.architecture, "plan_edit": study.plan_edit,
            "dataset.json": file_digest(raw / "dataset.json"),
        }
        (folder / f"{study.plans}.study").write_text(json.dumps({"request": request, "is_complete": True}))
        (folder / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]))
    fake = tmp_path / "bin" / "nnUNetv2_train"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable, log=str(tmp_path / "log")))
    fake.chmod(0o755)
    file = tmp_path / "small.json"
    file.write_text(json.dumps({**study.__dict__, "seeds": [0, 1]}))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_study, args=(file, tmp_path / "work", fake)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    runs = (tmp_path / "log").read_text().splitlines()
    trained = sorted(run.partition("-tr ")[2].split()[0] for run in runs)
    assert trained == ["Finetune", "Finetune", "HySparKPretrainTrainer", "Scratch", "Scratch"]
    results = json.loads((tmp_path / "work" / "results" / "small.json").read_text())
    pieces = sorted((p["arm"], p["seed"], p["labelled_cases"], p.get("pretraining")) for p in results["pieces"])
    assert pieces == [
        ("finetuned", 0, 2, "short"), ("finetuned", 1, 2, "short"), ("scratch", 0, 2, None), ("scratch", 1, 2, None)
    ]
    assert all(piece["commits"] for piece in results["pieces"])

    def refusal(**changes) -> str:
        file.write_text(json.dumps({**study.__dict__, "seeds": [0, 1, 2], **changes}))
        again = subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "study.py"), str(file), "--work", str(tmp_path / "work"),
             "--arms", "finetuned"], capture_output=True, text=True,
        )
        assert again.returncode == 1 and "Traceback" not in again.stderr
        return again.stderr

    assert "has fold(s) 1" in refusal(folds=[0, 1])
    assert 'name was "small", is "other"' in refusal(name="other")
    plans = folders["nnUNet_preprocessed"] / "Dataset001_A" / f"{study.plans}.json"
    plans.write_text('{"changed": true}')
    assert "holds what was begun otherwise (plans was" in refusal()
    (folders["nnUNet_raw"] / "Dataset001_A" / "dataset.json").write_text('{"other": "cases"}')
    assert "was made for another study (dataset.json was" in refusal()
