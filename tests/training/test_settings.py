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


@pytest.mark.parametrize("setting", ["decoder_width=48", "fuse_finest=false", "skips=add", "decoder_norm=batch"])
def test_what_the_segmentation_decoder_has_no_use_for_is_refused(setting) -> None:
    environment = {"nnUNet_hyspark": f"decoder=segmentation,{setting}"}
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}=.* is set together .* leave it out"):
        resolve_settings({}, "3d_fullres", "pretraining", environment)
    environment = {"nnUNet_hyspark": f"decoder=reconstruction,{setting}"}
    assert resolve_settings({}, "3d_fullres", "pretraining", environment).pretraining.decoder == "reconstruction"


def test_a_plan_s_value_can_be_taken_back() -> None:
    """A plan made for the paper's decoder may fix its width; 0 is the default."""
    block = {"hyspark": {"pretraining": {"decoder_width": 768}}}
    with pytest.raises(ValueError, match="decoder_width=768 is set together with decoder=segmentation"):
        resolve_settings(block, "3d_fullres", "pretraining", {"nnUNet_hyspark": "decoder=segmentation"})
    taken_back = {"nnUNet_hyspark": "decoder=segmentation,decoder_width=0"}
    assert resolve_settings(block, "3d_fullres", "pretraining", taken_back).pretraining.decoder_width == 0
