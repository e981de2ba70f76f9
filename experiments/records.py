"""What a study has found so far, what its folders were made for, and who works on what."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study_file import Study

from nnunetv2_hyspark.benchmark.run import processor_name
from nnunetv2_hyspark.data.writing import whole_file

MAY_GROW = (
    "table", "structures", "headline", "folds", "seeds", "arms", "pretraining", "other_plans", "pretraining_trainers",
    "pretraining_plans",
)
"""Keys of a study that may change while it goes on: texts and extent; entries that were run are compared one by one."""


@contextmanager
def exclusive(file: Path, until: float = math.inf) -> Iterator[bool]:
    """Holds a lock against other processes; False if another one has it ``until`` then (``time.monotonic``)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(0.2)
        yield True


def write(file: Path, content: Any) -> None:
    """Writes JSON: all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        json.dump(content, stream, indent=1)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Keys whose values differ, in words."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}" for key in keys)


def claim(file: Path, request: dict[str, Any], is_begun: bool) -> None:
    """Writes down what is made beside a file.

    Raises:
        ValueError: if it ``is_begun``, and by another request.
    """
    request = json.loads(json.dumps(request))
    if is_begun and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != request:
            raise ValueError(
                f"{file.parent} holds what was begun otherwise ({differences(before, request)}); give another folder "
                f"as --work, or move this one away."
            )
    write(file, request)


def commit() -> str:
    """Of the repository that the scripts lie in, with "+" if code was changed; "unknown" outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent.parent, text=True, capture_output=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!experiments/results", ":!docs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commits_of(file: Path, now: str | None = None) -> list[str]:
    """The commits with which a training was begun and gone on with, noted in a file; ``now`` is added."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if now is not None and now not in known:
        known.append(now)
        write(file, known)
    return known


class Results:
    """The results' file of a study; several processes may add to it.

    Args:
        file: JSON; made if it is not there.

    Raises:
        ValueError: if it holds results of a study that was another one under this name.
    """

    def __init__(self, file: Path, study: Study):
        self.file, self.study = file, study
        with self.changed():
            pass

    def read(self) -> dict[str, Any]:
        """What is known so far, of this process and of others."""
        results: dict[str, Any] = {"study": {}, "pretraining": {}, "pieces": []}
        if self.file.exists():
            results.update(json.loads(self.file.read_text(encoding="utf-8")))
        return results

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """The results, to be added to: one process at a time, and a reader never sees half a file."""
        with exclusive(self.file.with_suffix(".lock")):
            results = self.read()
            study = self._checked(results)
            yield results
            results["study"] = study
            results["machine"] = {
                "processors": os.cpu_count(), "processor": processor_name(), "machine": platform.machine(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "nnunetv2", "nnunetv2-hyspark")},
            }
            write(self.file, results)

    def expect_splits(self, sha256: str) -> None:
        """Raises ValueError if finished pieces were trained and validated on other cases than these splits' file
        says."""
        with self.changed() as results:
            if results["pieces"] and results.get("splits", sha256) != sha256:
                raise ValueError(
                    f"{self.file} holds pieces of other splits than splits_final.json has now; bring that back, or "
                    f"give the study another name, and another folder as --work."
                )
            results["splits"] = sha256

    def has(self, arm: str, fold: int, seed: int) -> bool:
        """Whether a piece is finished."""
        return any((p["arm"], p["fold"], p["seed"]) == (arm, fold, seed) for p in self.read()["pieces"])

    def add_piece(self, piece: dict[str, Any]) -> None:
        """Adds a finished piece, once."""
        with self.changed() as results:
            known = {(p["arm"], p["fold"], p["seed"]) for p in results["pieces"]}
            if (piece["arm"], piece["fold"], piece["seed"]) not in known:
                results["pieces"].append(piece)

    def add_pretraining(self, name: str, sha256: str, found: dict[str, Any]) -> str:
        """Adds a finished pre-training, once; returns its key.

        That is its name; where a pre-training of this name was run before and gave another checkpoint, such as on
        another machine, the name and a number.
        """
        with self.changed() as results:
            runs = {key: run for key, run in results["pretraining"].items() if run.get("name", key) == name}
            for key, run in runs.items():
                if run.get("sha256") == sha256:
                    return key
            key = f"{name}, run {len(runs) + 1}" if runs else name
            results["pretraining"][key] = {"name": name, "sha256": sha256, **found}
            return key

    def _checked(self, results: dict[str, Any]) -> dict[str, Any]:
        """The study as it is to be stored: this one, and what others have added to it meanwhile, or what it had before;
        raises ValueError if something that was run is another thing now."""
        before, now = results["study"], json.loads(json.dumps(self.study.__dict__))
        if not before:
            return now
        fixed = [{key: study[key] for key in study if key not in MAY_GROW} for study in (before, now)]
        pairs = [(fixed[0], {key: value for key, value in fixed[1].items() if key in before})]
        used_plans: set[str | None] = set()
        for arm in {piece["arm"] for piece in results["pieces"]} & now["arms"].keys():
            sides = [
                {key: value for key, value in study["arms"].get(arm, {}).items() if key != "baselines"}
                for study in (before, now)
            ]
            pairs.append(({f"arm {arm}": sides[0]}, {f"arm {arm}": sides[1]}))
            used_plans.add(sides[0].get("plans"))
        for name in {run.get("name", key) for key, run in results["pretraining"].items()} & now["pretraining"].keys():
            for key in ("pretraining", "pretraining_trainers", "pretraining_plans"):
                label = f"{key} {name}"
                pairs.append(({label: before.get(key, {}).get(name)}, {label: now[key].get(name)}))
            used_plans.add(before.get("pretraining_plans", {}).get(name))
        for name in used_plans & now["other_plans"].keys():
            label = f"plans {name}"
            pairs.append(({label: before["other_plans"].get(name)}, {label: now["other_plans"].get(name)}))
        changes = "; ".join(filter(None, (differences(*pair) for pair in pairs)))
        if changes:
            raise ValueError(
                f"{self.file} holds results of a study {self.study.name} that was another one ({changes}); give the "
                f"study another name, and another folder as --work."
            )
        grown = {
            key: {**before[key], **value} for key, value in now.items()
            if isinstance(value, dict) and key in MAY_GROW and key in before
        }
        return {**now, **grown}
