"""The trainer of the experiments that computes dense maps: another way to the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.sparse import BlockLayout, DenseMaskLayout

FOLDER = Path(__file__).parents[2] / "experiments" / "trainers"


@pytest.mark.parametrize("hidden", ["zero", "nearest"])
def test_same_losses_as_by_blocks(make_trainer, monkeypatch, hidden: str) -> None:
    """Same seed, so same weights, crops and masks."""
    monkeypatch.setenv("nnUNet_extTrainer", str(FOLDER))
    layouts, losses = [], []
    for name in ("HySparKPretrainTrainer", "HySparKDensePretrainTrainer"):
        trainer = make_trainer(f"seed=3,hidden_neighbours={hidden}", trainer_name=name)
        trainer.run_training()
        visible = trainer.model.draw_mask(1, trainer.patch_size, 0.5, torch.Generator())
        layouts.append(type(trainer.model.lay_out(visible)))
        losses.append([trainer.logger.get_value(key, step=None) for key in ("train_losses", "val_losses")])
    assert layouts == [BlockLayout, DenseMaskLayout]
    assert losses[0] == [pytest.approx(values, rel=1e-4) for values in losses[1]]
