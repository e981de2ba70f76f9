"""Pre-training goes on from an official training file with the settings that `hyspark import` prints."""

from __future__ import annotations

import json
import re

import torch

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.training.checkpoints import FINAL


def test_goes_on_from_an_official_file(small_dataset, make_trainer, imported_official, tmp_path) -> None:
    ours, printed = imported_official
    (settings,) = re.findall("export nnUNet_hyspark='(.*)'", printed)
    path = small_dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [32, 32, 32]
    configuration["architecture"]["arch_kwargs"] = {
        "strides": [[1] * 3, *[[2] * 3] * 4], "kernel_sizes": [[3] * 3] * 5,
    }  # fmt: skip
    path.write_text(json.dumps(plans))

    one = "pretraining.epochs=1,iterations_per_epoch=1,val_iterations_per_epoch=1"
    trainer = make_trainer(f"{settings},{one}")
    trainer.initialize()
    trainer.load_pretrained(str(ours))
    report = json.loads((trainer.folder / "load_report.json").read_text())
    taken = torch.load(ours, weights_only=True)["network_weights"]
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, taken[name]), name
    assert report["totals"]["fresh"]["tensors"] == report["totals"]["adapted"]["tensors"] == 0
    trainer.run_training()

    content = torch.load(trainer.folder / FINAL, weights_only=True)
    assert content["current_epoch"] == 1 and 0 < content["logging"]["train_losses"][0] < 2
    trained = content["network_weights"]
    assert any(not torch.equal(trained[name], taken[name]) for name in trained if name.startswith("encoder."))
    back = tmp_path / "back.pth"
    assert main(["export", str(trainer.folder / FINAL), "-o", str(back)]) == 0
    assert torch.load(back, weights_only=True).keys() >= {"sparse_encoder.embeddings.stem.weight"}
