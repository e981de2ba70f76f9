"""Whether the mapped folders are importable from a checkout, and nothing else is taken for one."""
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_hyspark import _checkout_root

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mapped_folders_are_importable_from_a_checkout(tmp_path, elsewhere):
    script = "from nnunetv2_hyspark import planners, trainers; print(trainers.__file__); print(planners.__file__)"
    finished = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path if elsewhere else REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)} if elsewhere else {},
    )
    assert finished.stdout.splitlines() == [str(REPOSITORY / name / "__init__.py") for name in ("trainers", "planners")]


def make_package(root: Path, setup_cfg: str | None, *folders: str) -> str:
    for folder in ("nnunetv2_hyspark", *folders):
        (root / folder).mkdir(parents=True)
    if setup_cfg is not None:
        (root / "setup.cfg").write_text(setup_cfg)
    return str(root / "nnunetv2_hyspark")


def test_only_a_checkout_of_ours_is_one(tmp_path):
    ours = "[metadata]\nname = nnunetv2-hyspark\n"
    cases = {
        "checkout": (ours, "trainers"),
        "installed": (ours, "trainers", "nnunetv2_hyspark/trainers"),
        "stranger": ("[metadata]\nname = nnunetv2-hyspark-fork\n", "trainers"),
        "site-packages": (None, "trainers"),
        "incomplete": (ours,),
    }
    roots = {name: _checkout_root(make_package(tmp_path / name, *case)) for name, case in cases.items()}
    assert roots == {**dict.fromkeys(cases), "checkout": str(tmp_path / "checkout")}


def test_every_folder_with_modules_is_a_package():
    folders = {
        file.parent
        for top in ("nnunetv2_hyspark", "trainers", "planners")
        for file in (REPOSITORY / top).rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_external_folder_holds_the_stub_alone():
    files = sorted(file.name for file in (REPOSITORY / "nnunetv2_hyspark" / "external_trainers").glob("*.py"))
    assert files == ["__init__.py", "hyspark_trainers.py"]
