"""The mask that `hyspark prepare` made steers where crops of pre-training lie; annotations never do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_hyspark.data.prepare import MASK_NOTE


def mark_as_prepared(base: Path) -> None:
    """Says in ``dataset.json`` what `hyspark prepare` says there."""
    file = base / "dataset.json"
    description = json.loads(file.read_text())
    description["labels"] = {"background": 0, "foreground_mask": 1}
    description["hyspark"] = {"foreground_mask": MASK_NOTE}
    file.write_text(json.dumps(description))


def training_crops(trainer):
    """What the training draws from."""
    trainer.initialize()
    train, _ = trainer.do_split()
    return trainer._crops(train, 0, (), in_order=False)


@pytest.mark.parametrize(("prepared", "settings", "fraction"), [
    (True, "", 0.67),
    (True, "pretraining.foreground_fraction=0.25", 0.25),
    (False, "", 0.0),
    (False, "pretraining.foreground_fraction=0.25", 0.0),
])
def test_only_masks_of_prepared_data_sets_steer_crops(small_dataset, make_trainer, prepared, settings, fraction):
    if prepared:
        mark_as_prepared(small_dataset)
    trainer = make_trainer(settings)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    try:
        for batches in (training, validation):
            assert batches.dataset.foreground_fraction == fraction
    finally:
        training.close()
        validation.close()


def test_locations_of_annotations_are_not_even_opened(small_dataset, make_trainer):
    for path in small_dataset.glob("*/*.pkl"):
        path.write_bytes(b"damaged")
    crops = training_crops(make_trainer())
    assert [crops.sample(0, position).skipped for position in range(8)] == [[]] * 8
    mark_as_prepared(small_dataset)
    crops = training_crops(make_trainer("pretraining.foreground_fraction=1"))
    with pytest.raises(ValueError, match=r"case_\d+\.pkl is not readable"):
        crops.sample(0, 0)
