"""Plans of five differently shaped data sets, compared with golden files.

After a deliberate change of the planner or of a network's memory, HYSPARK_UPDATE_GOLDEN=1 writes them anew.
"""
import json
import os
import re
from pathlib import Path

import pytest

from nnunetv2_hyspark.planners.hyspark_presets import HySparKPlannerL, HySparKPlannerM, HySparKPlannerXL

GOLDEN = Path(__file__).parent / "golden"
DATASETS = {
    "cubic_ct": (1, "Cubic", (200, 200, 200), (1.0, 1.0, 1.0), ["CT"], 20),
    "prostate_mr": (2, "Prostate", (20, 320, 256), (3.0, 0.6, 0.6), ["T2"], 40),
    "small_mr": (3, "Hippocampus", (36, 50, 35), (1.0, 1.0, 1.0), ["MR"], 180),
    "thorax_ct": (4, "Thorax", (300, 512, 512), (1.5, 0.8, 0.8), ["CT"], 60),
    "brain_mr": (5, "Brain", (155, 170, 140), (1.0, 1.0, 1.0), ["T1", "T1c", "T2", "FLAIR"], 400),
}
FAST = ("prostate_mr", "small_mr")


def table(plans):
    """What must not change by accident; estimates of memory are left out, and so is nnU-Net's own 2D network."""
    rows = {"transpose_forward": plans["transpose_forward"], "configurations": {}}
    for name, configuration in plans["configurations"].items():
        row = {k: v for k, v in configuration.items() if not k.startswith(("resampling", "architecture", "hyspark"))}
        if "spacing" in row:
            row["spacing"] = [round(s, 3) for s in row["spacing"]]
        if "hyspark" in configuration:
            row["pretraining"] = configuration["hyspark"]["pretraining"]
            kwargs = configuration["architecture"]["arch_kwargs"]
            row["network"] = {
                key: kwargs[key]
                for key in ("strides", "kernel_sizes", "features_per_stage", "n_blocks_per_stage", "transformer_heads")
            }
        rows["configurations"][name] = row
    return rows


def _one_line(match):
    return "[" + re.sub(r"\s*\n\s*", " ", match.group(1)) + "]"


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DATASETS]
)
def test_plans(name, make_dataset):
    make_dataset(*DATASETS[name])
    found = {}
    for planner in (HySparKPlannerM, HySparKPlannerL, HySparKPlannerXL):
        plans = planner(DATASETS[name][0]).plan_experiment()
        for configuration in plans["configurations"].values():
            memory = configuration.get("hyspark", {}).get("memory", {})
            assert memory.get("pretraining_gb", 0) <= memory.get("target_gb", 0)
            assert memory.get("finetuning_gb", 0) <= memory.get("target_gb", 0)
        found[plans["plans_name"]] = json.loads(json.dumps(table(plans)))
    path = GOLDEN / f"{name}.json"
    if os.environ.get("HYSPARK_UPDATE_GOLDEN") == "1":
        text = json.dumps(found, indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _one_line, text)
        path.write_text(text + "\n")
    assert found == json.loads(path.read_text())
