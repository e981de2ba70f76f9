"""A copy of the source tree, and throw-away environments that see the base environment's packages."""
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PROBE_MODULES = {  # classes that no nnU-Net has, one for each package of ours that is searched
    "trainers/probe_trainer.py": (
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class ProbeTrainer(nnUNetTrainer):\n    pass\n"
    ),
    "planners/probe_planner.py": (
        "from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner\n"
        "class ProbePlanner(ExperimentPlanner):\n    pass\n"
    ),
    "nnunetv2_hyspark/normalization/probe_normalization.py": "class ProbeNormalization:\n    pass\n",
}

# Run with -m, so that the working directory is on the path, and imported by the spawned worker.
QUESTIONS = '''
import json, multiprocessing, pickle, sys
from os.path import join
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find

def find_trainer(name):
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    except ModuleNotFoundError:  # nnU-Net 2.7
        return find(join(nnunetv2.__path__[0], "training", "nnUNetTrainer"), name, "nnunetv2.training.nnUNetTrainer")
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        if "Could not find requested nnunet trainer" in str(error):
            return None
        raise

def module_of_trainer(name):
    trainer = find_trainer(name)
    return trainer and trainer.__module__

def module_of(package, name):
    found = find(join(nnunetv2.__path__[0], *package.split(".")), name, "nnunetv2." + package)
    return found and found.__module__

if __name__ == "__main__":
    names, spawn = sys.argv[1].split(","), sys.argv[2] == "spawn"
    answers = {name: module_of_trainer(name) for name in names}
    answers["planner"] = module_of("experiment_planning", "ProbePlanner")
    answers["normalization"] = module_of("preprocessing.normalization", "ProbeNormalization")
    probe = find_trainer("ProbeTrainer")
    answers["pickles"] = probe is not None and pickle.loads(pickle.dumps(probe)) is probe
    if spawn:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            answers["worker"] = pool.apply(module_of_trainer, ("ProbeTrainer",))
    print(json.dumps(answers))
'''


class Environment:
    """A virtual environment without packages of its own, that also sees those of the environment running the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site_packages = folder / "lib" / version / "site-packages"
        base = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        base.add(str(metadata.distribution("nnunetv2").locate_file("")))
        # lines of paths only: start-up files of the base environment, perhaps our own, are not processed again
        (self.site_packages / "base.pth").write_text("".join(f"{path}\n" for path in sorted(base)))
        (self.site_packages / "questions.py").write_text(QUESTIONS)

    def pip(self, *arguments: str) -> None:
        """Run the base environment's pip for this environment."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.site_packages)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stdout}\n{finished.stderr}")

    def install(self, *what: str) -> None:
        """Install without touching a package index; the base environment may hold the same version, hence the force."""
        self.pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall", *what)

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python."""
        foreign = ("nnUNet_", "PYTHON", "VIRTUAL_ENV")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        command = [str(self.python), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**inherited, **variables}
        )

    def leftovers(self) -> list[str]:
        """Names in site-packages that are ours."""
        return sorted(path.name for path in self.site_packages.iterdir() if "hyspark" in path.name)


@pytest.fixture
def make_environment(tmp_path: Path):
    """Makes a throw-away environment in a folder of the test."""

    def make(name: str = "venv") -> Environment:
        return Environment(tmp_path / name)

    return make


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what gets installed, with a probe class in each searched package; builds may write into it."""
    tree = tmp_path / "checkout"
    tree.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    for name in ("nnunetv2_hyspark", "trainers", "planners"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in PROBE_MODULES.items():
        file = tree / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    return tree
