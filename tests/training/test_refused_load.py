"""A refused load: the message names some tensors, the report beside the log all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.training.checkpoints import LATEST
from nnunetv2_hyspark.training.trainer import unwrap


@pytest.mark.parametrize("name", ["HySparKFinetuneTrainer", "HySparKPretrainTrainer"])
def test_report_of_a_refused_load(make_trainer, tmp_path: Path, name: str) -> None:
    first = make_trainer("base_width=6,head_width=6")
    first.on_train_start()
    source = tmp_path / LATEST
    first.save_checkpoint(str(source))
    trainer = make_trainer(trainer_name=name)
    trainer.initialize()
    network = unwrap(trainer.network)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="does not cover this network's encoder"):
        trainer.load_pretrained(str(source))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    report = json.loads((trainer.folder / "refused_load_report.json").read_text())
    assert report["source"] == str(source) and report["totals"]["loaded"]["tensors"] == 0
    assert {entry["name"] for entry in report["entries"]} >= set(before)
    stem = next(entry for entry in report["entries"] if entry["name"].endswith("cnn.stem.weight"))
    assert stem["action"] == "fresh" and stem["source_shape"][0] == 6 and stem["target_shape"][0] == 4
    assert "in the network" in stem["reason"]
    assert "refused, nothing was loaded" in Path(trainer.log_file).read_text()
    assert not (trainer.folder / "load_report.json").exists()
