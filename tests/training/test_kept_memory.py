"""Who has malloc keep what is freed: trainings and predictions on CPUs, not those on GPUs."""

from __future__ import annotations

import pytest
import torch

import nnunetv2_hyspark.trainers.HySparKFinetuneTrainer as finetuning
import nnunetv2_hyspark.training.trainer as training


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: told.append("training"))
    monkeypatch.setattr(finetuning, "keep_freed_memory", lambda: told.append("network"))
    return told


@pytest.mark.parametrize("name", ["HySparKPretrainTrainer", "HySparKFinetuneTrainer", "HySparKScratchTrainer"])
def test_every_training_on_a_cpu(make_trainer, calls, name):
    make_trainer(trainer_name=name)
    assert calls == ["training"]


@pytest.mark.parametrize("has_gpu, expected", [(False, ["network"]), (True, [])])
def test_prediction_where_there_is_no_gpu(make_trainer, calls, monkeypatch, has_gpu, expected):
    """All that ``nnUNetv2_predict`` asks of a trainer is its network."""
    trainer = make_trainer(trainer_name="HySparKScratchTrainer")
    calls.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    assert calls == expected
    assert network.decoder.deep_supervision is False
