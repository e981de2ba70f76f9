"""A checkpoint that is whole as a file but does not hold what `--c` needs: a sentence, and which entry it is."""

from __future__ import annotations

import copy

import pytest
import torch

from nnunetv2_hyspark.training.checkpoints import LATEST
from nnunetv2_hyspark.user_errors import is_user_error

NEEDED = (
    "network_weights", "init_args", "logging", "_best_ema", "optimizer_state", "grad_scaler_state", "random_state",
)


def refuse(make_trainer, path, checkpoint: dict, name: str) -> str:
    """What ``--c`` says to a checkpoint."""
    torch.save(checkpoint, path)
    with pytest.raises(ValueError) as error:
        make_trainer(continue_training=True, trainer_name=name)
    assert is_user_error(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["HySparKPretrainTrainer", "HySparKScratchTrainer"])
def test_entries_of_a_run(make_trainer, name: str) -> None:
    trainer = make_trainer(trainer_name=name)
    trainer.on_train_start()
    path = trainer.folder / LATEST
    trainer.save_checkpoint(str(path))
    whole = torch.load(path, weights_only=True)
    for key in NEEDED[:5]:
        said = refuse(make_trainer, path, {k: v for k, v in whole.items() if k != key}, name)
        assert f"does not describe a run of this trainer (there is no '{key}')" in said and "without --c" in said
    for key in NEEDED:
        if key in ("_best_ema", "grad_scaler_state"):  # any number, or nothing, on a CPU
            continue
        for value in (7, "text", [1, 2], {"a": 1}):
            changed = copy.deepcopy(whole)
            changed[key] = value
            said = refuse(make_trainer, path, changed, name)
            assert said.startswith("the checkpoint to continue from "), (key, value)
    torch.save(whole, path)
    assert make_trainer(continue_training=True, trainer_name=name).was_resumed
