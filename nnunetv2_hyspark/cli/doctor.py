"""`hyspark doctor`: what runs here, whether nnU-Net finds HySparK, what is wrong and how to mend it."""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnunetv2_hyspark import _startup
from nnunetv2_hyspark.cli import probe
from nnunetv2_hyspark.cli.path import external_trainers_folder

_DISTRIBUTIONS = (
    "nnunetv2-hyspark",
    "nnunetv2",
    "torch",
    "torchvision",
    "timm",
    "dynamic-network-architectures",
    "batchgenerators",
    "batchgeneratorsv2",
)
_EXTRAS = {"tensorboard": "training curves in TensorBoard"}
"""Packages that our extras of the same name install, and what they are for."""

_LEAST_SHARED_MEMORY = 2**30  # bytes; nnU-Net's workers hand whole batches over through it


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    what: str
    mend: str


@dataclass
class Report:
    """What was found, by section and name, and the problems in it."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def fact(self, section: str, name: str, value: Any) -> None:
        """Add a fact that is not a problem by itself."""
        self.facts.setdefault(section, {})[name] = value

    def problem(self, what: str, mend: str) -> None:
        """Add a problem with its mend."""
        self.problems.append(Problem(what, mend))


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say which versions run, whether nnU-Net finds HySparK, and what is wrong",
        description="Checks this environment. Exit status 0 if all is right, 1 if something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine this environment and print the report."""
    report = examine()
    print(_as_json(report) if options.json else _as_text(report))
    return 1 if report.problems else 0


def examine() -> Report:
    """Everything the doctor looks at."""
    report = Report()
    answers, warnings = _ask_in_a_new_process()
    _check_versions(report, answers)
    _check_discovery(report, answers["nnunetv2"], warnings)
    _check_command(report)
    _check_folders(report)
    _check_external_trainers(report)
    _check_other_variables(report)
    _check_extras(report)
    _check_shared_memory(report)
    return report


def _ask_in_a_new_process() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The answers of `probe`, and the warnings that our start-up hook printed meanwhile."""
    finished = subprocess.run([sys.executable, probe.__file__], capture_output=True, text=True, check=False)
    lines = finished.stdout.splitlines()
    try:
        answers = json.loads(lines[-1])
    except (IndexError, ValueError):
        last_words = (finished.stderr.splitlines() or ["nothing was printed"])[-1]
        failed = {"error": f"Python ended with status {finished.returncode}: {last_words}"}
        answers = {"torch": failed, "timm": failed, "nnunetv2": failed}
    prefix = "nnunetv2_hyspark: warning: "
    return answers, [line.removeprefix(prefix) for line in finished.stderr.splitlines() if line.startswith(prefix)]


def _installed_version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_versions(report: Report, answers: dict[str, dict[str, Any]]) -> None:
    report.fact("versions", "python", f"{platform.python_version()} ({sys.executable})")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        report.problem(
            f"Python {platform.python_version()} is not one of 3.10 to 3.13", "make an environment with one of these"
        )
    versions = {name: _installed_version(name) for name in _DISTRIBUTIONS}
    for name, version in versions.items():
        report.fact("versions", name, version or "not installed")
    if versions["nnunetv2-hyspark"] is None:
        report.problem(
            "nnunetv2-hyspark is not installed in this environment, but runs from a folder",
            "run `pip install .` or `pip install -e .` in the folder that holds its setup.cfg",
        )
    nnunet, torch = versions["nnunetv2"], answers["torch"]
    if nnunet and _major_minor(nnunet) < (2, 7):
        report.problem(f"nnunetv2 {nnunet} is too old", "run `pip install --upgrade 'nnunetv2>=2.7'`")
    if "error" in torch:
        report.problem(f"torch cannot be imported ({torch['error']})", "install it as https://pytorch.org says")
    else:
        _check_torch(report, torch)
    if "error" in answers["timm"]:
        report.fact("versions", "import timm", answers["timm"]["error"])
        report.problem(
            f"timm, which nnU-Net's networks need, cannot be imported ({answers['timm']['error']}); mostly because "
            f"torchvision {versions['torchvision']} was not made for torch {versions['torch']}",
            "install the two in one command and from the same place, so that they match: "
            "`pip install --upgrade --force-reinstall 'torch!=2.9.*' torchvision`, with the --index-url that torch "
            "had, if it had one",
        )
    else:
        report.fact("versions", "import timm", "works")


def _check_torch(report: Report, torch: dict[str, Any]) -> None:
    if _major_minor(torch["version"]) == (2, 9):
        report.problem(
            f"torch {torch['version']} is one that nnU-Net excludes",
            "run `pip install 'torch>=2.4,!=2.9.*' torchvision`",
        )
    if torch["devices"]:
        report.fact("versions", "GPU", f"{', '.join(torch['devices'])} (CUDA {torch['built_for_cuda']})")
        return
    report.fact("versions", "GPU", "none that torch can use; `-device cpu` trains without one, slowly")
    if shutil.which("nvidia-smi"):
        reason = "was built for the CPU only" if torch["built_for_cuda"] is None else "cannot use it"
        report.problem(
            f"nvidia-smi is here, so there should be a GPU, but torch {torch['version']} {reason}",
            "install a torch for the CUDA version that nvidia-smi shows, as https://pytorch.org says; "
            "start a container with `--gpus all`",
        )


def _check_discovery(report: Report, answer: dict[str, Any], warnings: list[str]) -> None:
    for warning in warnings:
        report.problem(warning, "mend what the message in brackets names, or reinstall nnunetv2-hyspark")
    if "error" in answer:
        report.fact("discovery", "nnU-Net", answer["error"])
        report.problem(
            f"nnU-Net itself cannot be imported ({answer['error']})", "run `pip install --upgrade 'nnunetv2>=2.7'`"
        )
        return
    if "search_error" in answer:
        report.problem(
            f"nnU-Net fails when it looks for a class of HySparK ({answer['search_error']})",
            "reinstall nnunetv2-hyspark, and unset nnUNet_extTrainer if it is set",
        )
    if _startup.is_disabled():
        hook = "switched off by nnUNet_hyspark_disable"
    else:
        hook = "active" if answer["hook"] else "not installed"
    report.fact("discovery", "start-up hook", hook)
    way = "the start-up hook" if hook == "active" else "nnUNet_extTrainer"
    for role, name in (("trainer", "HySparKPretrainTrainer"), ("planner", "HySparKPlanner")):
        module = answer.get(role)
        report.fact("discovery", name, f"found in {module} through {way}" if module else "not found by nnU-Net")
    if "search_error" in answer or (answer["trainer"] and answer["planner"]):
        return
    if answer["trainer"] and hook != "active":
        report.fact("discovery", "note", "nnUNet_extTrainer covers the trainers alone; the planner needs the hook")
        return
    missing = " and ".join(role for role in ("trainer", "planner") if not answer[role])
    if _startup.is_disabled():
        mend = "run `unset nnUNet_hyspark_disable`"
    elif hook == "active":
        mend = "run `pip install --force-reinstall --no-deps .` in the checkout of nnunetv2-hyspark"
    else:
        mend = (
            "run `pip install --force-reinstall --no-deps .` in the checkout of nnunetv2-hyspark, so that "
            "nnunetv2_hyspark.pth lies in site-packages; where that is not possible (`pip install --target`), "
            "run `export nnUNet_extTrainer=$(hyspark path)`, which nnU-Net 2.8 and newer honour"
        )
    report.problem(f"nnU-Net does not find the {missing} of HySparK (start-up hook: {hook})", mend)


def _check_command(report: Report) -> None:
    """The usual trap: `nnUNetv2_train` of another environment comes first on PATH."""
    command = shutil.which("nnUNetv2_train")
    report.fact("discovery", "nnUNetv2_train", command or "not on PATH; activate this environment")
    if command is None:
        return
    with open(command, "rb") as file:
        shebang = file.readline().decode("utf-8", "replace").strip()
    interpreter = re.fullmatch(r"#!(.*/python[\d.]*)", shebang)
    if interpreter and Path(interpreter[1]).parent != Path(sys.executable).parent:
        report.problem(
            f"nnUNetv2_train on PATH is {command}, which runs {interpreter[1]}, not this environment's Python",
            f"activate the environment of {sys.executable}",
        )


def _check_folders(report: Report) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        value = os.environ.get(name)
        if not value:
            report.fact("variables", name, "not set")
            report.problem(f"{name} is not set", f"run `export {name}=/path/to/a/folder` before any nnU-Net command")
        elif not Path(value).is_dir():
            report.fact("variables", name, f"{value}, which is not a folder")
            report.problem(f"{name} is {value}, which is not a folder", f"run `mkdir -p {value}`, or set it to another")
        elif os.access(value, os.W_OK):
            report.fact("variables", name, value)
        else:
            report.fact("variables", name, f"{value}, which is read-only")
            if name != "nnUNet_raw":  # which is only read by nnU-Net
                report.problem(f"{name} is {value}, which you may not write to", "change its rights or the variable")


def _check_external_trainers(report: Report) -> None:
    value = os.environ.get("nnUNet_extTrainer")
    if not value:
        report.fact("variables", "nnUNet_extTrainer", "not set")
        return
    report.fact("variables", "nnUNet_extTrainer", value)
    package = external_trainers_folder().parent.resolve()
    real_code = (package, package / "trainers", package.parent, package.parent / "trainers")
    for folder in (Path(entry) for entry in value.split(os.pathsep) if entry.strip()):
        if not folder.is_dir():
            report.problem(f"nnUNet_extTrainer names {folder}, which is not a folder", "correct it or unset it")
        elif folder.resolve() in real_code:
            report.problem(
                f"nnUNet_extTrainer names {folder}, real code of HySparK: nnU-Net would load it a second time, and its "
                f"classes could not be pickled",
                "run `export nnUNet_extTrainer=$(hyspark path)`, or unset it where the start-up hook is active",
            )


def _check_other_variables(report: Report) -> None:
    shown = report.facts["variables"]
    for name, value in sorted(os.environ.items()):
        if name.startswith("nnUNet_") and name not in shown:
            report.fact("variables", name, value)


def _check_extras(report: Report) -> None:
    for package, purpose in _EXTRAS.items():
        found = f"not installed; for {purpose}: `pip install {package}`"
        if find_spec(package) is not None:
            found = _installed_version(package) or "installed"
        report.fact("optional", package, found)


def _check_shared_memory(report: Report) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():  # not Linux
        return
    usage = shutil.disk_usage(folder)
    report.fact("machine", "CPU cores", os.cpu_count())
    report.fact("machine", "shared memory", f"{usage.total / 2**30:.1f} GiB in {folder}")
    if usage.total < _LEAST_SHARED_MEMORY:
        report.problem(
            f"shared memory ({folder}) is {usage.total / 2**20:.0f} MiB small; nnU-Net's workers may die of it",
            "start the container with `--shm-size=8g` or `--ipc=host`",
        )


def _as_json(report: Report) -> str:
    problems = [asdict(problem) for problem in report.problems]
    return json.dumps({**report.facts, "problems": problems, "all_right": not problems}, indent=2)


def _as_text(report: Report) -> str:
    width = max(len(name) for facts in report.facts.values() for name in facts)
    lines = []
    for section, facts in report.facts.items():
        lines.append(section)
        lines.extend(f"  {name:<{width}}  {value}" for name, value in facts.items())
        lines.append("")
    if not report.problems:
        lines.append("all right")
    for number, problem in enumerate(report.problems, 1):
        lines.append(f"{number}. {problem.what}.\n   Mend: {problem.mend}.")
    return "\n".join(lines)
