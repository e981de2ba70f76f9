"""nnU-Net's own commands with our plans: preprocessing in worker processes, training from a remembered checkpoint."""
import json
import os
import shutil
import subprocess

import blosc2
import numpy as np
import pytest

from nnunetv2_hyspark.cli.console import find_command
from nnunetv2_hyspark.data.phantoms import write_phantom_dataset

pytestmark = pytest.mark.slow

PLANS = "nnUNetHySparKFinetunePlans"
TRAINING = "finetuning.epochs=1,iterations_per_epoch=2,val_iterations_per_epoch=1,save_every=1"
NETWORK = "base_width=6,junction_width=24,head_width=12,max_stride=8,transformer_depth=1"
REMEMBERED = "The plans name the pre-trained checkpoint"


def run(*command, expect=0, settings=""):
    """Output of a command, after checking its status."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0" if command[0] == "nnUNetv2_train" else "1",
        "nnUNet_def_n_proc": "2", "nnUNet_compile": "f", "nnUNet_hyspark": settings,
    }
    done = subprocess.run(
        [find_command(command[0]), *map(str, command[1:])], env=environment, capture_output=True, text=True, timeout=600
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), text[-5000:]
    return text


def test_the_papers_preprocessing_of_real_ct(folders, shared_data):
    source, raw = shared_data / "data" / "openkbp", folders.raw / "Dataset020_Kbp"
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (source / "labels").glob("*.nii.gz"))[:2]
    if not cases:
        pytest.skip("the shared data folder has no openkbp")
    for kind, suffix in (("images", "_0000"), ("labels", "")):
        (raw / f"{kind}Tr").mkdir(parents=True)
        for case in cases:
            shutil.copy(source / kind / f"{case}.nii.gz", raw / f"{kind}Tr" / f"{case}{suffix}.nii.gz")
    labels = {"background": 0, "brainstem": 1, "cord": 2, "parotids": 3}
    (raw / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    ))
    run("nnUNetv2_plan_and_preprocess", "-d", 20, "-pl", "HySparKPaperPlanner", "-c", "3d_fullres", "-np", 2)
    folder = folders.preprocessed / raw.name / "nnUNetHySparKPaperPlans_3d_fullres"
    images = sorted(p for p in folder.glob("*.b2nd") if not p.stem.endswith("_seg"))
    assert len(images) == 2
    for path in images:
        values = blosc2.open(str(path))[:]
        # cubic resampling may leave [0, 1] a little at edges
        assert values.min() > -0.3 and values.max() < 1.3 and np.median(np.clip(values, 0, 1)) < 0.9
        assert ((values < -0.05) | (values > 1.05)).mean() < 0.05


def test_fine_tuning_finds_what_the_plans_remember(folders, make_checkpoint, tmp_path):
    write_phantom_dataset(folders.raw, 10, "Target", 5, shape=(32, 32, 40))
    checkpoint = make_checkpoint(spacing=[3.0, 3.0, 3.0], patch_size=[24, 24, 32])
    other = make_checkpoint("other.pth", spacing=[3.0, 3.0, 3.0], patch_size=[24, 24, 32])
    run("nnUNetv2_extract_fingerprint", "-d", 10, "-np", 2)
    out = run("hyspark", "plan-finetune", "-d", 10, "--from", checkpoint)
    commands = [line.split() for line in out.splitlines() if line.startswith("  nnUNetv2_")]
    run(*commands[0], "-np", 2)
    train = [*commands[1], "-device", "cpu"]
    folder = folders.results / "Dataset010_Target" / f"HySparKFinetuneTrainer__{PLANS}__3d_fullres" / "fold_0"

    assert REMEMBERED in run(*train, settings=TRAINING)
    report = json.loads((folder / "load_report.json").read_text())
    assert report["source"] == str(checkpoint.resolve())
    longer = TRAINING.replace("finetuning.epochs=1", "finetuning.epochs=2")
    assert REMEMBERED not in run(*train, "--c", settings=longer)
    assert REMEMBERED not in run(*train, "--val", settings=longer)
    assert REMEMBERED not in run(*train, "-pretrained_weights", other, settings=TRAINING)
    assert json.loads((folder / "load_report.json").read_text())["source"] == str(other)
    scratch = [word.replace("HySparKFinetuneTrainer", "HySparKScratchTrainer") for word in train]
    assert REMEMBERED not in run(*scratch, settings=TRAINING)
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    assert "has changed since these plans were made" in run(*train, expect=1, settings=TRAINING)

    write_phantom_dataset(folders.raw, 11, "Moved", 5, shape=(32, 32, 40), first_seed=50)
    run("nnUNetv2_extract_fingerprint", "-d", 11, "-np", 2)
    run("nnUNetv2_plan_experiment", "-d", 11, "-pl", "HySparKPlanner", settings=NETWORK)  # copies dataset.json
    run("nnUNetv2_move_plans_between_datasets", "-s", 10, "-t", 11, "-sp", PLANS, "-tp", "Moved")
    moved, original = folders.plans("Dataset011_Moved", "Moved"), folders.plans("Dataset010_Target", PLANS)
    for key in ("architecture", "hyspark", "spacing"):
        assert moved["configurations"]["3d_fullres"][key] == original["configurations"]["3d_fullres"][key]
    run("nnUNetv2_preprocess", "-d", 11, "-plans_name", "Moved", "-c", "3d_fullres", "-np", 2)
    words = ["11" if word == "10" else word.replace(PLANS, "Moved") for word in train]
    assert "Training done" in run(*words, "-pretrained_weights", other, settings=TRAINING)
