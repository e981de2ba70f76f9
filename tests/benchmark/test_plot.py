"""The figure of a benchmark, and the page that shows it."""

from __future__ import annotations

import json
import runpy
import shutil
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
        "by_mask_ratio": {
            variant: {"0": {**rows["blocks"], "ratio_to_0": 1.0}, "0.9": {**rows["blocks"], "ratio_to_0": 0.1}}
            for variant in ("blocks", "dense")
        },
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
    assert "## Encoder, step, memory, mask ratios, crop sizes and batches, single convolutions, segmentation" in page
    assert "A processor: 3d_fullres of nnUNetHySparKPlans.json, 32x32x32" in page
    assert "| blocks | 1.25 | 1.00 | 1.50 | 2 | 1.00 | 1.0 | 5% | 1.00 | 8% | 13% |" in page
    assert "| blocks | 1.25 | 1.00 | 1.50 | 2 | 1.00 |  |  |  |  |  |" in page
    assert "| 0.9 | 0.10 | 1.25 | 0.100 | 1.25 | 0.100 | 2 |" in page
    assert "1 threads, freed memory kept; arithmetic" in page
    assert "| HySparKUNet | 1.0 | 1.25 | 2 | 1.00 | 2.00 | 1.0 | 5% | 1.00 | 8% | 13% | 1.25 |" in page
    assert "| 32x32x32 | 1 | 1.25 | 3.50 | 2.83 | 1.25 | 3.50 | 2.83 |" in page
    assert "| 64x64x64 | 9 | out of memory |" in page
    assert "| 0 | full | blocks | 5x8x2x2x2 | 3x3x3 | gathered | 100.00 | 1.00 | 100.00 | 1.00 |" in page
    assert "of the default, GB | at most" not in page, "aims are for the runs that are named for them"
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_aims_are_read_from_the_runs_that_show_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = tmp_path / "docs" / "figures"
    figures.mkdir(parents=True)
    (figures / "benchmark_cpu_default.json").write_text(json.dumps(everything()))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "docs/figures/benchmark_cpu_default.json"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| encoder, forward and backward: dense over blocks | at least 4 | 2.83 |" in page
    assert "| peak memory of a step of the default, GB | at most 2.5 | 1.00 |" in page
    assert "| encoder at mask ratio 0.9 over its time at 0 | at most 0.18 | 0.10 |" in page
    assert "official release's over it" not in page, "it was not measured"


def test_the_page_is_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SCRIPT.parents[1] / "docs" / "figures", tmp_path / "docs" / "figures")
    files = sorted(str(file) for file in Path("docs/figures").glob("benchmark_*.json"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *files])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    committed = SCRIPT.parents[1] / "docs" / "benchmarks.md"
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == committed.read_text(), "run scripts/benchmark_tables.py"


def test_figures_in_readme_are_those_that_were_measured():
    repository = SCRIPT.parents[1]
    figures = json.loads((repository / "docs" / "figures" / "benchmark_cpu_default.json").read_text())
    encoder, step = (
        {variant: f"{row['ratio_to_blocks']:.1f}" for variant, row in figures[what].items()}
        for what in ("encoder_forward_backward", "step")
    )
    readme = " ".join((repository / "README.md").read_text().split())
    assert f"the encoder is {encoder['dense']} times as fast as dense-then-mask" in readme
    assert f"a whole step {step['dense']} times" in readme
    assert f"({encoder['official-like']} and {step['official-like']} times as fast" in readme
    assert f"; {step['official release']} times as fast as a step with that release's decoder" in readme
