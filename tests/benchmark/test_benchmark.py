"""The benchmark's references compute the same, its ratios are paired, its counts are right."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace

import pytest
import torch

from nnunetv2_hyspark.benchmark import loading
from nnunetv2_hyspark.benchmark.loading import measure_loading, write_cases
from nnunetv2_hyspark.benchmark.memory import peak_gb
from nnunetv2_hyspark.benchmark.operations import forward_gmac
from nnunetv2_hyspark.benchmark.request import VARIANTS, Request, build
from nnunetv2_hyspark.benchmark.run import check_agreement, segmentation
from nnunetv2_hyspark.benchmark.segmentation import networks, parameters
from nnunetv2_hyspark.benchmark.timing import Timings, interleave
from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.data.cases import foreground_voxels, image_shape, read_crop
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig, reconstruction_loss
from nnunetv2_hyspark.sparse.backends import gathered_where_small
from nnunetv2_hyspark.sparse.convolution import submanifold_conv3d

CEILINGS = {"peak_gflops": 100.0, "copy_gbs": 10.0}
TINY = Request(size=(32, 32, 32), base_width=8, batch=2, repeats=2)


@pytest.mark.parametrize("step", ["default", "segmentation", "reconstruction", "official"])
def test_variants_agree_in_loss_and_gradients(step):
    request = Request(size=(32, 32, 16), base_width=8, step=step)
    differences = check_agreement(request)
    everything = {"blocks", "dense", "official-like", "torch"}
    assert all(set(differences[what]) == everything for what in ("loss", "reconstruction", "gradients"))
    gradients = {}
    for variant in everything:
        model, image, visible = build(request, variant)
        model = model.double()
        loss = reconstruction_loss(image.double(), model(image.double(), visible), visible)
        gradients[variant] = torch.autograd.grad(loss, list(model.parameters()))
    for variant in everything:
        for got, want in zip(gradients[variant], gradients["blocks"]):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_a_variant_that_disagrees_ends_the_benchmark(monkeypatch):
    def wrong(model):
        model.encoder.cnn.stem.weight.data[0] *= 1.5
        return model

    monkeypatch.setitem(VARIANTS, "dense", wrong)
    with pytest.raises(RuntimeError, match="disagree with the block path in their loss by {'dense'"):
        check_agreement(Request(size=(32, 32, 32), base_width=8, step="reconstruction"))


def test_a_small_error_shows_in_the_reconstruction_before_it_shows_in_the_loss(monkeypatch):
    def wrong(model):
        model.encoder.cnn.stem.weight.data[0] *= 1.001
        return model

    monkeypatch.setitem(VARIANTS, "dense", wrong)
    with pytest.raises(RuntimeError, match="disagree with the block path in their reconstruction by {'dense'"):
        check_agreement(Request(size=(32, 32, 32), base_width=8))


def test_the_other_backend_is_one():
    """``auto`` takes gathered products on CPUs, so that the variant ``torch`` compares something."""
    ways = {variant: build(TINY, variant)[0].layout.keywords["convolve"] for variant in ("blocks", "torch")}
    assert ways["torch"] is submanifold_conv3d and ways["blocks"] is gathered_where_small


def test_in_half_precision_blocks_err_no_more_than_dense_maps():
    def computed(variant, dtype=None):
        model, image, visible = build(TINY, variant)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            reconstruction = model(image, visible)
        loss = reconstruction_loss(image, reconstruction, visible)
        gradients = torch.autograd.grad(loss, list(model.encoder.parameters()))
        return loss.item(), torch.cat([gradient.flatten().float() for gradient in gradients])

    loss, exact = computed("blocks")
    found = {variant: computed(variant, torch.bfloat16) for variant in ("blocks", "dense")}
    errors = {variant: float((g - exact).norm() / exact.norm()) for variant, (_, g) in found.items()}
    assert found["blocks"][0] == pytest.approx(loss, rel=2e-2)
    assert 0 < errors["blocks"] < 2 * errors["dense"] + 1e-3, errors


def test_blocks_cost_about_the_visible_share():
    gmac = {}
    for variant in ("blocks", "dense"):
        model, image, visible = build(TINY, variant)
        layout = model.lay_out(visible)
        gmac[variant] = forward_gmac(lambda m=model, i=image, la=layout: m.encoder(la.gather(i), la))
    assert 0.2 < gmac["blocks"] / gmac["dense"] < 0.3


def test_ratios_are_medians_of_pairs():
    timings = Timings({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]})
    assert timings.ratio("a", "b") == 2.0


def test_the_budget_ends_the_rounds_and_one_is_always_counted():
    timings = interleave({"a": lambda: None, "b": lambda: None}, 5, budget=-1.0, device=torch.device("cpu"))
    assert {name: len(values) for name, values in timings.seconds.items()} == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="0 variants"):
        interleave({}, 5, 1.0, torch.device("cpu"))


def test_command_writes_json_and_answers_mistakes(tmp_path, capsys):
    file = tmp_path / "figures.json"
    small = ["--size", "32", "32", "32", "--base-width", "8", "--device", "cpu", "--repeats", "1"]
    what = ["step", "ratios", "convolutions"]
    assert main(["benchmark", "--what", *what, "--ratios", "0.5", *small, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["convolutions"][1]["forward_backward"]["torch"]["ratio_to_torch"] == 1.0
    assert "2x8x16x16x16" in capsys.readouterr().out
    assert set(figures["step"]) == {*VARIANTS, "torch", "official release"}
    assert figures["step"]["official release"]["forward_gmac"] > figures["step"]["official-like"]["forward_gmac"]
    for rows in (figures["by_mask_ratio"][variant] for variant in ("blocks", "dense")):
        assert set(rows) == {"0", "0.5"} and rows["0"]["ratio_to_0"] == 1 and rows["0.5"]["repeats"] == 1
    assert figures["step"]["blocks"]["ratio_to_blocks"] == 1.0
    assert main(["benchmark", "--what", "step", *small, "--size", "33", "32", "32"]) == 2
    assert "not divisible" in capsys.readouterr().err


def test_settings_of_the_variable_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_hyspark", "decoder=reconstruction,decoder_width=96,mask_ratio=0.5")
    monkeypatch.setattr("nnunetv2_hyspark.benchmark.run.ceilings", lambda *_: CEILINGS)
    file = tmp_path / "figures.json"
    options = ["--size", "32", "32", "32", "--base-width", "8", "--device", "cpu", "--repeats", "1"]
    assert main(["benchmark", "--what", "step", *options, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["request"]["mask_ratio"] == 0.5 and figures["request"]["settings"]["decoder_width"] == 96
    assert figures["command"].startswith(
        "nnUNet_hyspark=decoder=reconstruction,decoder_width=96,mask_ratio=0.5 hyspark"
    )
    wide = Request(size=(32, 32, 32), base_width=8, settings=HySparKConfig(decoder="reconstruction", decoder_width=96))
    narrow = replace(TINY, step="reconstruction")
    assert parameters(build(wide, "blocks")[0]) > parameters(build(narrow, "blocks")[0])
    monkeypatch.setenv("nnUNet_hyspark", "decoder_width=96")
    assert main(["benchmark", "--what", "step", *options]) == 2
    assert "set decoder=reconstruction too" in capsys.readouterr().err
    assert main(["benchmark", "--what", "step", "--step", "reconstruction", *options, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["request"]["settings"]["decoder_width"] == 96
    monkeypatch.setenv("nnUNet_hyspark", "decoder_widht=96")
    assert main(["benchmark", "--what", "step", *options]) == 2
    assert "decoder_widht" in capsys.readouterr().err


def test_peak_memory_counts_what_a_step_allocates():
    assert 0.3 < peak_gb(allocate_400_mb, torch.device("cpu")) < 0.6


def allocate_400_mb():
    return lambda: torch.zeros(100_000_000).sum()


def test_peak_memory_counts_nothing_that_making_the_step_needed():
    """Neither as part of the peak nor as memory that is there already."""
    assert 0.3 < peak_gb(allocate_400_mb_after_800, torch.device("cpu")) < 0.6


def allocate_400_mb_after_800():
    torch.ones(200_000_000)
    return allocate_400_mb()


def test_loading_reads_what_nnunet_writes_and_sees_who_waits(tmp_path):
    (file,) = write_cases(tmp_path, 1, (24, 24, 24), (16, 16, 16))
    assert image_shape(file) == (24, 24, 24)
    assert 0.9 < float(read_crop(file, (0, 0, 0), (24, 24, 24)).std()) < 1.1
    figures = measure_loading([file], (16, 16, 16), (2, 2, 2), 2, (0, 1), 0.02, steps=10)
    assert set(figures) == {"0", "1"}
    assert all(row["crops_per_second"] > 0 and 0 <= row["waiting_share"] < 1 for row in figures.values())
    slow = measure_loading([file], (16, 16, 16), (2, 2, 2), 2, (0,), 0.0, steps=10)
    assert slow["0"]["waiting_share"] > figures["0"]["waiting_share"]


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_are_handed_over_in_order_and_errors_with_them(ahead):
    class Numbers:
        closed, count = False, 0

        def __next__(self):
            self.count += 1
            if self.count > 5:
                raise ValueError("case 6 is broken")
            return {"step": self.count}

        def close(self):
            self.closed = True

    numbers = Numbers()
    with loading.handed_over(numbers, ahead) as delivered:
        assert [next(delivered)["step"] for _ in range(5)] == [1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="case 6 is broken"):
            next(delivered)
    assert numbers.closed
    before = threading.active_count()
    endless = Numbers()
    endless.count = -100
    with loading.handed_over(endless, ahead) as delivered:
        next(delivered)
    assert endless.closed and threading.active_count() == before


def test_loading_draws_crops_as_pretraining_of_a_prepared_data_set(tmp_path, monkeypatch):
    (file,) = write_cases(tmp_path, 1, (24, 24, 24), (16, 16, 16))
    voxels = foreground_voxels(file)
    assert len(voxels) > 200 and voxels.min() == 3 and voxels.max() == 20
    read = []
    monkeypatch.setattr("nnunetv2_hyspark.data.loader.foreground_voxels", lambda path: read.append(path) or voxels)
    made = []

    class Recorded(loading.CropBatches):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(loading, "CropBatches", Recorded)
    measure_loading([file], (16, 16, 16), (2, 2, 2), 2, (0,), 0.0, steps=10)
    assert read == [file]
    assert made[0].foreground_fraction == 0.67


def test_segmentation_networks_are_compared_with_their_sizes():
    rows = segmentation(Request(size=(64, 64, 64), base_width=8, repeats=1), training=True, top=CEILINGS)
    assert set(rows) == {"HySparKUNet", "ResEnc-L", "ResEnc, narrow"}
    assert rows["HySparKUNet"]["ratio_to_HySparKUNet"] == 1
    assert rows["ResEnc-L"]["million_parameters"] > 3 * rows["ResEnc, narrow"]["million_parameters"]
    assert all(row["forward_gmac"] > 0 for row in rows.values())
    assert all(0 < row["share_of_copy_ceiling"] < 1 for row in rows.values())
    forward = segmentation(Request(size=(64, 64, 64), base_width=8, repeats=1), training=False, top=CEILINGS)
    for name, row in rows.items():  # two patches, without a backward pass; deep supervision has heads of its own
        assert 1.9 < forward[name]["forward_gmac"] / row["forward_gmac"] <= 2
        assert forward[name]["counted_gb"] < row["counted_gb"]
        voxels = forward[name]["million_voxels_per_second"] * forward[name]["median_s"]
        assert voxels == pytest.approx(96 * 64 * 64 / 1e6)
    if os.path.exists("/proc/self/status"):
        assert all(0 < forward[name]["memory_gb"] < rows[name]["memory_gb"] for name in rows)


def test_networks_of_the_paper_and_of_nnunet_have_the_sizes_stated():
    sizes = {name: parameters(network) for name, network in networks(Request()).items()}
    assert sizes["ResEnc-L"] == pytest.approx(102.4, abs=0.1)
    assert abs(sizes["ResEnc, narrow"] / sizes["HySparKUNet"] - 1) < 0.05
