"""`hyspark benchmark --what sweep`: every crop size with every batch."""

from __future__ import annotations

import json

import pytest
import torch

from nnunetv2_hyspark.benchmark import sweep as module
from nnunetv2_hyspark.benchmark.request import Request
from nnunetv2_hyspark.benchmark.sweep import sweep, sweep_points
from nnunetv2_hyspark.benchmark.tables import sweep_table
from nnunetv2_hyspark.cli.main import main

CEILINGS = {"peak_gflops": 100.0, "copy_gbs": 10.0}
SMALL = ["benchmark", "--what", "sweep", "--size", "32", "32", "32", "--base-width", "8", "--device", "cpu",
         "--repeats", "1"]


def test_points_are_all_pairs_and_share_the_seconds():
    points = sweep_points(Request(budget=100.0), [(32, 32, 32), (64, 64, 64)], [1, 4])
    assert [(point.size[0], point.batch) for point in points] == [(32, 1), (32, 4), (64, 1), (64, 4)]
    assert {point.budget for point in points} == {25.0}


def test_command_sweeps_sizes_and_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nnunetv2_hyspark.benchmark.run.ceilings", lambda *_: CEILINGS)
    file, plot = tmp_path / "new" / "figures.json", tmp_path / "figures.png"
    assert main([*SMALL, "--sizes", "32", "--batches", "1", "2", "--json", str(file), "--plot", str(plot)]) == 0
    rows = json.loads(file.read_text())["sweep"]
    assert [(row["size"], row["batch"]) for row in rows] == [([32] * 3, 1), ([32] * 3, 2)]
    for row in rows:
        for key in ("encoder_forward_backward", "step"):
            assert set(row[key]) == {"blocks", "dense"} and row[key]["dense"]["ratio_to_blocks"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  32x32x32 ")] == ["1", "2"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, sentence", [
    (["--sizes", "32", "40"], "(40, 40, 40) is not divisible by (16, 16, 16)"),
    (["--sizes", "16"], "grid of 1x1x1 cells"),
    (["--batches", "1", "0"], "the batch is 0"),
    (["--sizes", "-1"], "--sizes is -1"),
])
def test_what_does_not_fit_is_said_before_anything_is_measured(capsys, monkeypatch, arguments, sentence):
    def not_yet(*_):
        raise RuntimeError("measured")

    monkeypatch.setattr("nnunetv2_hyspark.benchmark.run.ceilings", not_yet)
    assert main([*SMALL, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_gpu_too_small_for_a_point_does_not_end_the_sweep(monkeypatch):
    def step(point, variant):
        if point.batch == 2 and variant == "dense":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(module, "make_encoder", lambda point, variant, backward: lambda: None)
    monkeypatch.setattr(module, "make_step", step)
    rows = sweep(sweep_points(Request(repeats=1), [(32, 32, 32)], [1, 2, 3]), CEILINGS)
    assert [row["out_of_memory"] for row in rows] == [False, True, False]
    assert set(rows[1]) == {"size", "batch", "out_of_memory"}
    assert "out of memory" in sweep_table(rows).splitlines()[3]
