"""nnU-Net's folders in a temporary place, and its commands as subprocesses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import SimpleITK as sitk

from nnunetv2_hyspark.cli.console import find_command

SMALL = (
    "base_width=8,head_width=8,max_stride=8,seed=0,pretraining.epochs=3,finetuning.epochs=2,iterations_per_epoch=12,"
)
SMALL += "val_iterations_per_epoch=2,pretraining.learning_rate=1e-3,finetuning.learning_rate=1e-3"


class Workspace:
    """nnUNet_raw, nnUNet_preprocessed and nnUNet_results below one folder."""

    def __init__(self, folder: Path, settings: str = SMALL):
        self.folder = folder
        self.raw, self.preprocessed, self.results = (
            folder / f"nnUNet_{name}" for name in ("raw", "preprocessed", "results")
        )
        for place in (self.raw, self.preprocessed, self.results):
            place.mkdir(parents=True)
        self.settings = settings

    def run(
        self,
        *command: str | Path,
        settings: str | None = None,
        expect: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Runs a command, checks its exit status (``expect`` -1: any but 0) and returns what it printed."""
        environment = {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_n_proc_DA": "0" if command[0] == "nnUNetv2_train" else "1",  # nnU-Net's planning needs one
            "nnUNet_def_n_proc": "2",
            "nnUNet_hyspark": self.settings if settings is None else settings,
            **(variables or {}),
        }
        done = subprocess.run(
            [find_command(str(command[0])), *map(str, command[1:])],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        fine = done.returncode != 0 if expect == -1 else done.returncode == expect
        assert fine, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def add_dataset(
        self,
        source: Path,
        dataset_id: int,
        name: str,
        train: list[str],
        test: list[str],
        channel: str,
        labels: dict,
        crop: tuple[int, int, int] | None = None,
        **extra,
    ) -> Path:
        """Copies cases of ``source`` (folders images and labels) into a raw nnU-Net data set, or their middle."""
        folder = self.raw / f"Dataset{dataset_id:03d}_{name}"
        for part, cases in (("Tr", train), ("Ts", test)):
            for kind, ending in (("images", "_0000"), ("labels", "")):
                (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
                for case in cases:
                    original = source / kind / f"{case}.nii.gz"
                    copy = folder / f"{kind}{part}" / f"{case}{ending}.nii.gz"
                    if crop is None:
                        shutil.copy(original, copy)
                    else:
                        sitk.WriteImage(middle(sitk.ReadImage(str(original)), crop), str(copy))
        content = {
            "channel_names": {"0": channel},
            "labels": labels,
            "numTraining": len(train),
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps({**content, **extra}))
        return folder

    def output(
        self, dataset: str, trainer: str, plans: str, fold: str | int, configuration: str = "3d_fullres"
    ) -> Path:
        """Where a training writes."""
        return self.results / dataset / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"


def middle(image: sitk.Image, size: tuple[int, int, int]) -> sitk.Image:
    """The middle of an image, at most ``size`` voxels along x, y and z."""
    fitting = [min(want, have) for want, have in zip(size, image.GetSize())]
    corner = [(have - want) // 2 for have, want in zip(image.GetSize(), fitting)]
    return sitk.RegionOfInterest(image, fitting, corner)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One set of folders per test module."""
    return Workspace(tmp_path_factory.mktemp("nnunet"))
