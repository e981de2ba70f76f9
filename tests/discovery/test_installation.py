"""Whether an installed package is found by nnU-Net: wheel, all editable modes, versions of nnU-Net, uninstall."""
import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MODES = {
    "wheel": [],
    "editable": ["--editable"],
    "editable strict": ["--config-settings", "editable_mode=strict", "--editable"],
    "editable compat": ["--config-settings", "editable_mode=compat", "--editable"],
}
OURS = {
    "ProbeTrainer": "nnunetv2_hyspark.trainers.probe_trainer",
    "planner": "nnunetv2_hyspark.planners.probe_planner",
    "normalization": "nnunetv2_hyspark.normalization.probe_normalization",
}
STOCK = {"nnUNetTrainer": "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "NoSuchTrainer": None}


def ask(environment, cwd: Path, *extra_names: str, spawn: bool = False, **variables: str) -> dict:
    """Ask nnU-Net in that environment for our classes and for some of its own."""
    names = ",".join(["ProbeTrainer", "nnUNetTrainer", "NoSuchTrainer", *extra_names])
    finished = environment.run("-m", "questions", names, "spawn" if spawn else "", cwd=cwd, **variables)
    assert finished.returncode == 0, finished.stderr
    assert "nnunetv2_hyspark: warning" not in finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def real_trainers(tree: Path) -> list[str]:
    """The pre-training trainer, of whose existence this test does not depend."""
    name = "HySparKPretrainTrainer"
    return [name] if any(f"class {name}(" in file.read_text() for file in (tree / "trainers").glob("*.py")) else []


@pytest.mark.parametrize("mode", MODES)
def test_found_from_everywhere_and_gone_after_uninstall(mode, source_tree, make_environment, tmp_path):
    environment = make_environment()
    environment.install(*MODES[mode], str(source_tree))
    expected = {**OURS, **STOCK, "pickles": True}

    names = real_trainers(source_tree)
    from_root = ask(environment, source_tree, *names)
    elsewhere = ask(environment, tmp_path, spawn=True)

    for name in names:
        assert from_root.pop(name).startswith("nnunetv2_hyspark.trainers.")
    assert from_root == expected
    assert elsewhere == {**expected, "worker": OURS["ProbeTrainer"]}

    environment.pip("uninstall", "--yes", "--quiet", "nnunetv2-hyspark")
    assert environment.leftovers() == []
    assert ask(environment, tmp_path) == {**dict.fromkeys(OURS), **STOCK, "pickles": False}


@pytest.mark.parametrize("version", ["2.7.0", "2.8.1"])
def test_found_by_other_versions_of_nnunet(version, source_tree, make_environment, tmp_path):
    if metadata.version("nnunetv2") == version:
        pytest.skip(f"nnunetv2 {version} is what this environment has, so the other tests ran with it")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", f"nnunetv2=={version}"]
    finished = subprocess.run(download, capture_output=True, text=True, check=False, cwd=tmp_path)
    if finished.returncode:
        pytest.skip(f"nnunetv2 {version} could not be downloaded: {finished.stderr.strip().splitlines()[-1]}")
    [archive] = tmp_path.glob(f"nnunetv2-{version}*")
    environment = make_environment()
    environment.install(str(archive))
    environment.install(str(source_tree))
    located = environment.run("-c", "import nnunetv2; print(nnunetv2.__path__[0])", cwd=tmp_path).stdout.strip()
    assert Path(located).parent == environment.site_packages

    answers = ask(environment, tmp_path, spawn=True)

    assert answers == {**OURS, **STOCK, "pickles": True, "worker": OURS["ProbeTrainer"]}


def test_fallback_folder_without_the_hook(source_tree, make_environment, tmp_path):
    environment = make_environment()
    environment.install(str(source_tree))
    printed = environment.run("-m", "nnunetv2_hyspark.cli.main", "path", cwd=tmp_path)
    folder = printed.stdout.strip()
    assert Path(folder) == environment.site_packages / "nnunetv2_hyspark" / "external_trainers"

    off = {"nnUNet_hyspark_disable": "1"}
    without = ask(environment, tmp_path, **off)
    with_folder = ask(environment, tmp_path, nnUNet_extTrainer=folder, **off)

    assert without == {**dict.fromkeys(OURS), **STOCK, "pickles": False}
    if "nnUNet_extTrainer" not in Path(metadata.distribution("nnunetv2").locate_file("nnunetv2/paths.py")).read_text():
        pytest.skip("this nnU-Net knows no nnUNet_extTrainer")
    assert with_folder == {**without, "ProbeTrainer": OURS["ProbeTrainer"], "pickles": True}


def test_contents_of_a_wheel_built_through_an_sdist(source_tree, tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source_tree)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    expected = {f"nnunetv2_hyspark/{file.name}" for file in (source_tree / "nnunetv2_hyspark").glob("*.py")}
    for folder in ("trainers", "planners", "nnunetv2_hyspark"):
        prefix = "" if folder == "nnunetv2_hyspark" else "nnunetv2_hyspark/"
        expected |= {prefix + file.relative_to(source_tree).as_posix() for file in (source_tree / folder).rglob("*.py")}
    expected |= {"nnunetv2_hyspark.pth", "nnunetv2_hyspark.start"}
    assert {name for name in names if ".dist-info/" not in name} == expected
