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


@pytest.mark.parametrize("setting", ["fuse_finest=false", "skips=add", "decoder_norm=batch"])
def test_what_the_segmentation_decoder_has_no_use_for_is_refused(setting) -> None:
    environment = {"nnUNet_hyspark": f"decoder=segmentation,{setting}"}
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}=.* is set together .* leave it out"):
        resolve_settings({}, "3d_fullres", "pretraining", environment)
    environment = {"nnUNet_hyspark": f"decoder=reconstruction,{setting}"}
    assert resolve_settings({}, "3d_fullres", "pretraining", environment).pretraining.decoder == "reconstruction"


def test_a_plan_s_value_can_be_taken_back() -> None:
    block = {"hyspark": {"pretraining": {"skips": "none", "decoder_norm": "batch"}}}
    with pytest.raises(ValueError, match="skips=none, decoder_norm=batch is set together .* leave them out"):
        resolve_settings(block, "3d_fullres", "pretraining", {"nnUNet_hyspark": "decoder=segmentation"})
    taken_back = {"nnUNet_hyspark": "decoder=segmentation,skips=concatenate,decoder_norm=instance"}
    assert resolve_settings(block, "3d_fullres", "pretraining", taken_back).pretraining.skips == "concatenate"


def test_the_width_that_runs_store_is_taken() -> None:
    """A run's copy of the plans holds it as a number, whoever decodes; `hyspark benchmark` reads such plans."""
    block = {"hyspark": {"pretraining": {"decoder": "segmentation", "decoder_width": 48}}}
    assert resolve_settings(block, "3d_fullres", "pretraining", {}).pretraining.decoder_width == 48


def _planned_with(**settings) -> dict:
    return {"hyspark": {"pretraining": {"batch_size": 7}, "memory": {"target_gb": 8.0, "pretraining": settings}}}


@pytest.mark.parametrize(
    "variable, expected",
    [
        ("", {}),
        ("epochs=5,mask_ratio=0.75", {}),
        ("decoder=segmentation", {"decoder": ("reconstruction", "segmentation")}),
        ("decoder=segmentation,batch_size=3", {}),
        ("mask_ratio=0.5,bottom_up=false", {"mask_ratio": (0.75, 0.5), "bottom_up": (True, False)}),
    ],
)
def test_settings_for_which_the_batch_was_not_fitted_are_found(variable, expected) -> None:
    plan = _planned_with(decoder="reconstruction", mask_ratio=0.75, bottom_up=True)
    assert resolve_settings(plan, "3d_fullres", "pretraining", {"nnUNet_hyspark": variable}).unplanned == expected
    other_stage = {"nnUNet_hyspark": "pretraining.mask_ratio=0.5"}
    assert not resolve_settings(plan, "3d_fullres", "finetuning", other_stage).unplanned


@pytest.mark.parametrize("memory", [None, "8 GB", {}, {"target_gb": 8.0}, {"pretraining": None}])
def test_plans_that_do_not_tell_are_taken_as_they_are(memory) -> None:
    plan = {"hyspark": {"pretraining": {"batch_size": 7}, "memory": memory}}
    assert not resolve_settings(plan, "3d_fullres", "pretraining", {"nnUNet_hyspark": "mask_ratio=0.5"}).unplanned
