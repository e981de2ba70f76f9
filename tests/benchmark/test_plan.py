"""`hyspark benchmark --plans` measures what pre-training with that plan would build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_hyspark.benchmark.plan import read_plan
from nnunetv2_hyspark.benchmark.request import VARIANTS, Request, build
from nnunetv2_hyspark.benchmark.run import check_agreement, loading
from nnunetv2_hyspark.benchmark.segmentation import networks
from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.networks.reconstruction import ReconstructionDecoder, TransferableDecoder
from nnunetv2_hyspark.networks.topology import NETWORK_CLASS, ArchitectureConfig, derive_arch_kwargs
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], *[[3, 3, 3]] * 3]
FILLING = HySparKConfig.__dataclass_fields__["hidden_neighbours"].metadata["choices"][-1]
SMALL = ArchitectureConfig(base_width=4, head_width=4)


def write_plans(folder: Path, ours: bool, hyspark: dict | None = None) -> Path:
    """A plans file with two channels: ``3d_fullres``, ``3d_half`` that inherits from it, a cascade, and ``2d``."""
    kwargs = {"strides": STRIDES, "kernel_sizes": KERNELS}
    architecture = {
        "network_class_name": NETWORK_CLASS if ours else "dynamic_network_architectures.architectures.PlainConvUNet",
        "arch_kwargs": derive_arch_kwargs(STRIDES, KERNELS, SMALL) if ours else kwargs,
        "_kw_requires_import": [],
    }
    flat = {**architecture, "network_class_name": "PlainConvUNet", "arch_kwargs": {
        "strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3]] * 2,
    }}
    full = {
        "batch_size": 3,
        "patch_size": [16, 32, 32],
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "architecture": architecture,
        "hyspark": hyspark or {},
    }
    plans = {"configurations": {
        "2d": {**full, "patch_size": [32, 32], "architecture": flat},
        "3d_fullres": full,
        "3d_half": {"inherits_from": "3d_fullres", "batch_size": 1},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "3d_other": {**full, "architecture": {"network_class_name": "Primus", "arch_kwargs": {}}},
    }}
    file = folder / "somePlans.json"
    file.write_text(json.dumps(plans))
    return file


def request_of(file: Path, name: str = "3d_fullres", **changes) -> Request:
    planned = read_plan(file, name)
    return Request(**{**planned.defaults(), **changes}, planned=planned)


def test_the_plan_s_decoder(tmp_path):
    """The step by default has the plan's, also in the references; the official one has its own."""
    file = write_plans(tmp_path, True, {"pretraining": {"decoder": "reconstruction", "skips": "none"}})
    assert build(request_of(file, batch=1), "blocks")[0].reconstruction.n_fused == 1
    file = write_plans(tmp_path, True)
    request = request_of(file, batch=1)
    assert isinstance(build(request, "blocks")[0].reconstruction, TransferableDecoder)
    assert set(check_agreement(request)["loss"]) == {*VARIANTS, "torch"}
    official = build(request_of(file, batch=1, step="official"), "blocks")[0].reconstruction
    assert isinstance(official, ReconstructionDecoder) and len(official.fuse) == 2


@pytest.mark.parametrize("ours", [True, False])
def test_the_plan_gives_network_size_batch_and_channels(tmp_path, monkeypatch, ours):
    if not ours:
        monkeypatch.setenv("nnUNet_hyspark", "base_width=4,head_width=4")
    request = request_of(write_plans(tmp_path, ours))
    assert request.arch_kwargs == derive_arch_kwargs(STRIDES, KERNELS, SMALL)
    assert (request.size, request.batch, request.base_width) == ((16, 32, 32), 3, 4)
    model, image, visible = build(request, "blocks")
    assert image.shape == (3, 2, 16, 32, 32) and visible.shape == (3, 4, 4, 4)
    assert model.encoder.junction_stride == (4, 8, 8)


def test_settings_of_pretraining_count(tmp_path):
    block = {"pretraining": {
        "mask_ratio": 0.5, "batch_size": 2, "decoder": "reconstruction", "decoder_width": 64,
        "hidden_neighbours": FILLING,
    }}
    request = request_of(write_plans(tmp_path, True, block))
    assert (request.batch, request.mask_ratio, request.pretraining.decoder_width) == (2, 0.5, 64)
    assert request_of(write_plans(tmp_path, True, block), step="official").pretraining.decoder_width == 768
    assert request_of(write_plans(tmp_path, True, {}), step="default").pretraining.decoder == "segmentation"
    model, _, visible = build(request, "blocks")
    assert model.hidden_neighbours == FILLING and visible.float().mean() == 0.5


def test_configurations_inherit(tmp_path):
    assert request_of(write_plans(tmp_path, True), "3d_half").batch == 1


@pytest.mark.parametrize("block", [
    {"architecture": {"cnn": "mednext"}, "pretraining": {"hidden_neighbours": FILLING}},
    {"architecture": {"cnn": "residual"}},
    {"architecture": {"cnn": "plain"}},
])
def test_variants_agree_on_planned_networks(tmp_path, block):
    block["architecture"].update(base_width=4, head_width=4)
    differences = check_agreement(request_of(write_plans(tmp_path, False, block), batch=1))
    assert max(differences["loss"].values()) < 1e-4


def test_planned_segmentation_networks_and_crops(tmp_path):
    request = request_of(write_plans(tmp_path, True), batch=1)
    _, image, _ = build(request, "blocks")
    made = networks(request)
    assert list(made) == ["HySparKUNet", "ResEnc"]
    for network in made.values():
        outputs = network(image)
        assert [tuple(output.shape[2:]) for output in outputs] == [(16, 32, 32), (16, 16, 16), (8, 8, 8)]


def test_crops_of_several_channels_are_loaded(tmp_path, monkeypatch):
    seen = []

    def measured(files, size, grid, batch, *rest):
        from nnunetv2_hyspark.data.cases import image_shape, read_crop

        seen.append((image_shape(files[0]), read_crop(files[0], (0, 0, 0), size).shape, grid, batch))
        return {}

    monkeypatch.setattr("nnunetv2_hyspark.benchmark.run.measure_loading", measured)
    loading(request_of(write_plans(tmp_path, True)))
    assert seen == [((32, 64, 64), (2, 16, 32, 32), (4, 4, 4), 3)]


def test_command_takes_a_plan_and_options_override_it(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunetv2_hyspark.benchmark.run.ceilings", lambda *_: {"peak_gflops": 50.0, "copy_gbs": 10.0})
    file, plans = tmp_path / "figures.json", write_plans(tmp_path, True)
    arguments = ["benchmark", "--what", "encoder", "--plans", str(plans), "--repeats", "1", "--device", "cpu"]
    assert main([*arguments, "--size", "8", "16", "16", "--batch", "1", "--json", str(file)]) == 0
    request = json.loads(file.read_text())["request"]
    assert request["size"] == [8, 16, 16] and request["batch"] == 1 and request["mask_ratio"] == 0.75
    planned = request["planned"]
    assert planned["configuration"] == "3d_fullres" and planned["plans"] == str(plans) and planned["channels"] == 2
    assert planned["arch_kwargs"] == derive_arch_kwargs(STRIDES, KERNELS, SMALL)


@pytest.mark.parametrize("arguments, sentence", [
    (["--plans", "none.json"], "the plans file none.json does not exist"),
    (["--plans", "PLANS", "--configuration", "3d_none"], "has no configuration 3d_none; give --configuration one of"),
    (["--plans", "PLANS", "--configuration", "2d"], "2D patch [32, 32]; HySparK networks are 3D"),
    (["--plans", "PLANS", "--configuration", "3d_cascade_fullres"], "second stage of a cascade"),
    (["--plans", "PLANS", "--configuration", "3d_other"], "has no strides, from which the network would follow"),
    (["--plans", "PLANS", "--base-width", "8"], "--base-width 8 is given with --plans"),
    (["--plans", "PLANS", "--size", "16", "20", "32"], "(16, 20, 32) is not divisible by (4, 8, 8)"),
    (["--plans", "odd.json"], "configuration 3d_fullres of odd.json does not describe a network ("),
    (["--plans", "odd.json", "--configuration", "3d_half"], "configuration 3d_half of odd.json does not describe a"),
    (["--plans", "deep.json"], "does not describe a network (it names 1000000"),
    (["--configuration", "3d_fullres"], "--configuration 3d_fullres is given without a plans file"),
    (["--plans", "text.json"], "text.json is not JSON"),
    (["--plans", "list.json"], 'list.json has no "configurations"'),
    (["--batch", "0"], "the batch is 0"),
    (["--plot", "figure.pdf"], "--plot is figure.pdf; expected a file name that ends in .png"),
])
def test_mistakes_are_answered_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    plans = write_plans(tmp_path, True)
    Path("text.json").write_text("plans")
    Path("list.json").write_text("[]")
    odd = json.loads(plans.read_text())
    odd["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_blocks_per_stage"] = [None] * 4
    odd["configurations"]["3d_half"]["batch_size"] = "all"
    Path("odd.json").write_text(json.dumps(odd))
    odd["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_blocks_per_stage"] = [1, 10**9, 1, 1]
    Path("deep.json").write_text(json.dumps(odd))
    words = [str(plans) if word == "PLANS" else word for word in arguments]
    assert main(["benchmark", "--what", "step", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "raised in" not in error
