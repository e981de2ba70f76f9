"""Settings of a run, from a plan's configuration."""

from __future__ import annotations

import pytest

from nnunetv2_hyspark.training.settings import resolve_settings


@pytest.mark.parametrize("block", [None, [], "mask_ratio=0.6", 3])
def test_a_block_that_holds_no_settings_is_answered_in_a_sentence(block) -> None:
    with pytest.raises(ValueError, match='"hyspark" block of configuration 3d_fullres is .*expected settings by name'):
        resolve_settings({"hyspark": block}, "3d_fullres", "pretraining", {})


def test_no_block_leaves_the_defaults() -> None:
    assert resolve_settings({}, "3d_fullres", "pretraining", {}) == resolve_settings(
        {"hyspark": {}}, "3d_fullres", "pretraining", {}
    )
