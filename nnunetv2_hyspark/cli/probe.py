"""Run as a script by `hyspark doctor`, in a process of its own: what torch, timm and nnU-Net say when asked.

Nothing of this package is imported, because whether nnU-Net finds it by itself is the question.
"""
from __future__ import annotations

import json
import os
import sys
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Version and GPUs of torch."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "built_for_cuda": torch.version.cuda, "devices": devices}


def timm_facts() -> dict[str, Any]:
    """Nothing; fails when timm cannot be imported, mostly because of torchvision."""
    import timm

    return {"version": timm.__version__}


def nnunet_facts() -> dict[str, Any]:
    """In which modules nnU-Net finds our trainer and our planner, asked the way its own commands ask."""
    from os.path import join

    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find

    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find_trainer
    except ModuleNotFoundError:  # nnU-Net 2.7

        def find_trainer(name: str) -> type | None:
            folder = join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
            return find(folder, name, current_module="nnunetv2.training.nnUNetTrainer")

    answer: dict[str, Any] = {"hook": any(getattr(finder, "is_hyspark_hook", False) for finder in sys.meta_path)}
    try:
        trainer = find_trainer("HySparKPretrainTrainer")
    except RuntimeError as error:
        if "Could not find requested nnunet trainer" not in str(error):
            return {**answer, "search_error": f"RuntimeError: {error}"}
        trainer = None
    except Exception as error:
        return {**answer, "search_error": f"{type(error).__name__}: {error}"}
    folder = join(nnunetv2.__path__[0], "experiment_planning")
    planner = find(folder, "HySparKPlanner", current_module="nnunetv2.experiment_planning")
    return {**answer, "trainer": trainer and trainer.__module__, "planner": planner and planner.__module__}


def main() -> None:
    """Print one line of JSON, the last line of the output: nnU-Net prints things when it is imported."""
    here = os.path.dirname(os.path.abspath(__file__))
    # nnU-Net's commands have neither this folder nor the working directory on their path
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]
    answers: dict[str, Any] = {}
    for name, ask in (("torch", torch_facts), ("timm", timm_facts), ("nnunetv2", nnunet_facts)):
        try:
            answers[name] = ask()
        except Exception as error:
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
