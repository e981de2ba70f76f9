"""Which axes fine-tuning mirrors, in training and for test-time augmentation."""

from __future__ import annotations

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform


def mirror_transforms(trainer) -> list[MirrorTransform]:
    """Those of the training data's augmentation."""
    rotation, is_planewise, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    composed = trainer.get_training_transforms(size, rotation, None, axes, is_planewise)
    return [transform for transform in composed.transforms if isinstance(transform, MirrorTransform)]


@pytest.mark.parametrize(
    "setting, axes", [("", (0, 1, 2)), ("mirror_axes=[0]", (0,)), ("mirror_axes=[2,1]", (1, 2))]
)
def test_axes_of_training_and_prediction(make_trainer, setting, axes):
    trainer = make_trainer(setting, trainer_name="HySparKScratchTrainer")
    (transform,) = mirror_transforms(trainer)
    assert tuple(transform.allowed_axes) == axes
    assert trainer.inference_allowed_mirroring_axes == axes


def test_no_axis(make_trainer):
    trainer = make_trainer("mirror_axes=[]", trainer_name="HySparKFinetuneTrainer")
    assert mirror_transforms(trainer) == []
    assert trainer.inference_allowed_mirroring_axes is None


def test_the_axes_are_kept_with_the_weights(make_trainer):
    trainer = make_trainer("mirror_axes=[1]", trainer_name="HySparKScratchTrainer")
    trainer.initialize()
    mirror_transforms(trainer)
    trainer.save_checkpoint(str(trainer.folder / "checkpoint_final.pth"))
    stored = torch.load(trainer.folder / "checkpoint_final.pth", weights_only=True)
    assert tuple(stored["inference_allowed_mirroring_axes"]) == (1,)


def test_an_axis_that_is_none_is_refused(make_trainer):
    with pytest.raises(ValueError, match="mirror_axes is .3. in .*expected a list of values out of .0, 1, 2."):
        make_trainer("mirror_axes=[3]", trainer_name="HySparKScratchTrainer")
