"""The figure of a benchmark, and the page that shows it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib import image

from nnunetv2_hyspark.benchmark.plot import save_plot
from nnunetv2_hyspark.benchmark.tables import summary
from nnunetv2_hyspark.benchmark.timing import Timings

CEILINGS = {"peak_gflops": 100.0, "copy_gbs": 10.0}
TIMINGS = Timings({"blocks": [1.0, 1.5], "dense": [3.0, 4.0], "official-like": [4.0, 5.0]})
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_tables.py"
HEAD = {
    "request": {"size": [32, 32, 32], "batch": 1, "mask_ratio": 0.75, "precision": "float32", "step": "default",
                "base_width": 8},
    "machine": {"processor": "A processor", "threads": 1, "gpu": None, "freed_memory_is_kept": True},
    "versions": {"torch": "2", "python": "3"},
    "ceilings": CEILINGS,
    "command": "hyspark benchmark",
}


def everything() -> dict:
    """Results with all measurements, of a plan."""
    counts = dict.fromkeys(TIMINGS.seconds, 1.0)
    rows, bare = summary(TIMINGS, CEILINGS, counts, counts, 3), summary(TIMINGS, CEILINGS)
    network = {**rows["blocks"], "ratio_to_HySparKUNet": 1.0, "million_parameters": 1.0,
               "million_voxels_per_second": 2.0, "memory_gb": 1.25}
    planned = {"plans": "/somewhere/nnUNetHySparKPlans.json", "configuration": "3d_fullres"}
    return {
        **HEAD,
        "request": {**HEAD["request"], "planned": planned},
        "encoder_forward": rows, "encoder_forward_backward": rows, "step": rows,
        "memory_gb": {"blocks": 1.0, "dense": 2.0, "official-like": 2.5},
        "by_mask_ratio": {"0.9": 0.1, "0.5": 0.5},
        "sweep": [
            {"size": [32, 32, 32], "batch": 1, "out_of_memory": False, "encoder_forward_backward": bare, "step": bare},
            {"size": [64, 64, 64], "batch": 9, "out_of_memory": True},
        ],
        "finetuning_step": {"HySparKUNet": network}, "prediction": {"HySparKUNet": network},
        "convolutions": [{
            "stage": 0, "kind": "full", "where": "blocks", "shape": [5, 8, 2, 2, 2], "outputs": 16, "kernel": [3, 3, 3],
            **{name: {way: {"median_s": 0.1, "ratio_to_torch": 1.0} for way in ("torch", "gathered")}
               for name in ("forward", "forward_backward")},
        }],
        "loading": {"processors": 2, "case_voxels": [64, 64, 64], "step_seconds": 0.01,
                    "by_workers": {"0": {"crops_per_second": 9.0, "waiting_share": 0.5}}},
    }


def of_an_earlier_version() -> dict:
    """Results without counted bytes."""
    rows = summary(TIMINGS, CEILINGS)
    return {**HEAD, "step": rows, "memory_gb": {"blocks": 1.0}}


def test_shares_are_counts_over_time_over_ceilings():
    row = summary(TIMINGS, CEILINGS, {"blocks": 5.0, "dense": 1, "official-like": 1}, {
        "blocks": 2.0, "dense": 1, "official-like": 1}, passes=3)["blocks"]
    assert row["counted_gb"] == 2.0 and row["share_of_copy_ceiling"] == 2.0 / 1.25 / 10.0
    assert row["share_of_peak"] == 2 * 3 * 5.0 / 1.25 / 100.0


def test_has_a_panel_per_measurement(tmp_path):
    for name, results in (("all", everything()), ("few", of_an_earlier_version())):
        save_plot(json.loads(json.dumps(results)), tmp_path / f"{name}.png")
    many, few = (image.imread(tmp_path / f"{name}.png") for name in ("all", "few"))
    assert many.shape[0] > 2 * few.shape[0] and many.shape[1] > few.shape[1]
    assert many.std() > 0.05
    with pytest.raises(ValueError, match="no measurement to draw"):
        save_plot(HEAD, tmp_path / "none.png")


def test_the_page_shows_tables_and_plots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = tmp_path / "docs" / "figures"
    figures.mkdir(parents=True)
    (figures / "all.json").write_text(json.dumps(everything()))
    (figures / "old.json").write_text(json.dumps(of_an_earlier_version()))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "docs/figures/all.json", "docs/figures/old.json"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "![What was measured](figures/all.png)" in page and (figures / "old.png").is_file()
    assert "## A processor: 3d_fullres of nnUNetHySparKPlans.json, 32x32x32" in page
    assert "| blocks | 1.25 | 1.00 | 1.50 | 1.00 | 1.0 | 5% | 1.00 | 8% |" in page
    assert "| blocks | 1.25 | 1.00 | 1.50 | 1.00 |  |  |  |  |" in page
    assert "1 threads, freed memory kept; arithmetic" in page
    assert "| HySparKUNet | 1.0 | 1.25 | 1.00 | 2.00 | 1.0 | 5% | 1.00 | 8% | 1.25 |" in page
    assert "| 32x32x32 | 1 | 1.25 | 3.50 | 2.83 | 1.25 | 3.50 | 2.83 |" in page
    assert "| 64x64x64 | 9 | out of memory |" in page
    assert "| 0 | full | blocks | 5x8x2x2x2 | 3x3x3 | gathered | 100.00 | 1.00 | 100.00 | 1.00 |" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")
