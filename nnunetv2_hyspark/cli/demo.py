"""`hyspark demo`: pre-train, fine-tune, predict and evaluate on synthetic phantoms, with nnU-Net's own commands."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

PILE_ID, LABELLED_ID = 900, 901
PLANS = "nnUNetHySparKPlans"
FINETUNE_PLANS = "nnUNetHySparKFinetunePlans"
CONFIGURATION = "3d_fullres"
MARKER = ".hyspark_demo"
NETWORK = "base_width=8,head_width=8,max_stride=8"


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    unlabelled: int
    labelled: int
    test: int
    pretraining_epochs: int
    finetuning_epochs: int
    iterations: int


FULL = Size(unlabelled=32, labelled=10, test=6, pretraining_epochs=6, finetuning_epochs=14, iterations=30)
SHORT = Size(unlabelled=8, labelled=5, test=2, pretraining_epochs=2, finetuning_epochs=2, iterations=5)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="pre-train, fine-tune and predict on synthetic phantoms in a few minutes",
        description="Runs the whole way from unlabelled scans to a segmentation on small synthetic CT phantoms, with "
        "nnU-Net's own commands, and shows each of them. Nothing outside its folder is touched.",
    )
    parser.add_argument("--folder", default="hyspark_demo", help="where everything goes (default: ./hyspark_demo)")
    parser.add_argument("--short", action="store_true", help="fewer steps: shows that it runs, not that it learns")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.set_defaults(run=run)


def _own_folder(name: str) -> Path:
    folder = Path(name).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise FileExistsError(f"{folder} holds files that are not the demo's; give another one with --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def _environment(folder: Path, size: Size) -> dict[str, str]:
    processors = os.cpu_count() or 1
    return {
        "nnUNet_raw": str(folder / "nnUNet_raw"),
        "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / "nnUNet_results"),
        "nnUNet_n_proc_DA": str(max(1, min(8, processors // 2))),
        "nnUNet_def_n_proc": str(max(1, min(8, processors))),
        "nnUNet_compile": "f",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "nnUNet_hyspark": f"{NETWORK},pretraining.epochs={size.pretraining_epochs},"
        f"finetuning.epochs={size.finetuning_epochs},iterations_per_epoch={size.iterations},"
        "val_iterations_per_epoch=5,pretraining.learning_rate=1e-3,finetuning.learning_rate=5e-3,seed=0",
    }


def run(options: argparse.Namespace) -> None:
    """Run the demo and say what to type for one's own data."""
    import shutil
    from time import perf_counter

    from nnunetv2_hyspark.cli.console import run_and_show
    from nnunetv2_hyspark.cli.device import pick_device
    from nnunetv2_hyspark.data.phantoms import LABELS, write_phantom_dataset

    size = SHORT if options.short else FULL
    device = pick_device(options.device)
    folder = _own_folder(options.folder)
    environment = _environment(folder, size)
    raw, results, logs = folder / "nnUNet_raw", folder / "nnUNet_results", folder / "logs"
    for place in (raw, folder / "nnUNet_preprocessed", results, folder / "pile", folder / "predictions"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    logs.mkdir(exist_ok=True)
    start = perf_counter()
    print(
        f"HySparK demo in {folder}\nData: synthetic CT phantoms, made here; no patient's data. Device: {device}.\n"
        f"{size.unlabelled} phantoms without labels to pre-train on, {size.labelled} with labels to fine-tune on, "
        f"{size.test} to test."
    )
    write_phantom_dataset(folder / "pile", 0, "scans", size.unlabelled, labelled=False, first_seed=1000)
    write_phantom_dataset(raw, LABELLED_ID, "Phantoms", size.labelled, size.test, first_seed=1)

    def step(number: int, title: str) -> Path:
        print(f"\n[{number}/8] {title}", end="", flush=True)
        return logs / f"{number}.txt"

    def nnunet(log: Path, *command: str, epochs: int = 0) -> None:
        run_and_show(command, environment, log, epochs)

    pretrained = (
        results / f"Dataset{PILE_ID:03d}_Pile" / f"HySparKPretrainTrainer__{PLANS}__{CONFIGURATION}" / "fold_all"
    )
    tuned = results / f"Dataset{LABELLED_ID:03d}_Phantoms" / f"HySparKFinetuneTrainer__{PLANS}__{CONFIGURATION}"
    test = raw / f"Dataset{LABELLED_ID:03d}_Phantoms"
    predictions = folder / "predictions"
    pile, labelled, fold = str(PILE_ID), str(LABELLED_ID), "0"
    nnunet(
        step(1, "Make an nnU-Net data set from the pile of scans"),
        "hyspark",
        "prepare",
        "-d",
        pile,
        "-n",
        "Pile",
        "--from",
        str(folder / "pile" / "scans"),
    )
    nnunet(
        step(2, "Plan and preprocess the pile"),
        "nnUNetv2_plan_and_preprocess",
        "-d",
        pile,
        "-pl",
        "HySparKPlanner",
        "-c",
        CONFIGURATION,
    )
    nnunet(
        step(3, "Pre-train: hide three quarters of each scan, reconstruct them"),
        "nnUNetv2_train",
        pile,
        CONFIGURATION,
        "all",
        "-tr",
        "HySparKPretrainTrainer",
        "-p",
        PLANS,
        "-device",
        device,
        epochs=size.pretraining_epochs,
    )
    nnunet(
        step(4, "Plan and preprocess the labelled data set"),
        "nnUNetv2_plan_and_preprocess",
        "-d",
        labelled,
        "-pl",
        "HySparKPlanner",
        "-c",
        CONFIGURATION,
    )
    nnunet(
        step(5, "Fine-tune the pre-trained network"),
        "nnUNetv2_train",
        labelled,
        CONFIGURATION,
        fold,
        "-tr",
        "HySparKFinetuneTrainer",
        "-p",
        PLANS,
        "-pretrained_weights",
        str(pretrained / "checkpoint_final.pth"),
        "-device",
        device,
        epochs=size.finetuning_epochs,
    )
    nnunet(
        step(6, "Predict the test scans"),
        "nnUNetv2_predict",
        "-d",
        labelled,
        "-tr",
        "HySparKFinetuneTrainer",
        "-p",
        PLANS,
        "-c",
        CONFIGURATION,
        "-f",
        fold,
        "-i",
        str(test / "imagesTs"),
        "-o",
        str(predictions),
        "-device",
        device,
    )
    nnunet(
        step(7, "Evaluate"),
        "nnUNetv2_evaluate_folder",
        str(test / "labelsTs"),
        str(predictions),
        "-djfile",
        str(tuned / "dataset.json"),
        "-pfile",
        str(tuned / "plans.json"),
    )

    summary = json.loads((predictions / "summary.json").read_text(encoding="utf-8"))
    print(f"\n[8/8] Results after {perf_counter() - start:.0f} s")
    for name, label in LABELS.items():
        if label:
            print(f"  Dice {name:<8} {summary['mean'][str(label)]['Dice']:.3f}")
    print(f"  Dice mean     {summary['foreground_mean']['Dice']:.3f}  (test phantoms, {predictions / 'summary.json'})")
    picture = min((pretrained / "validation").glob("*.png"))
    print(f"  reconstruction: {picture}\n  progress:       {pretrained / 'progress.png'}")
    print(f"\n{own_data_commands()}")


def own_data_commands() -> str:
    """What to run instead of the demo's commands on one's own images."""
    checkpoint = (
        f"$nnUNet_results/Dataset900_MyPile/HySparKPretrainTrainer__{PLANS}__{CONFIGURATION}/fold_all/"
        f"checkpoint_final.pth"
    )
    tuned = f"-tr HySparKFinetuneTrainer -p {FINETUNE_PLANS}"
    return (
        "For your own data (nnUNet_raw, nnUNet_preprocessed and nnUNet_results set as always):\n"
        "  hyspark prepare -d 900 -n MyPile --from /path/to/scans\n"
        f"  nnUNetv2_plan_and_preprocess -d 900 -pl HySparKPlanner -c {CONFIGURATION}\n"
        f"  nnUNetv2_train 900 {CONFIGURATION} all -tr HySparKPretrainTrainer -p {PLANS}\n"
        "  nnUNetv2_extract_fingerprint -d LABELLED\n"
        f"  hyspark plan-finetune -d LABELLED --from {checkpoint}\n"
        f"  nnUNetv2_preprocess -d LABELLED -plans_name {FINETUNE_PLANS} -c {CONFIGURATION}\n"
        f"  nnUNetv2_train LABELLED {CONFIGURATION} 0 {tuned}\n"
        f"  nnUNetv2_predict -d LABELLED {tuned} -c {CONFIGURATION} -f 0 -i IN -o OUT"
    )
