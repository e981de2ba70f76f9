"""Settings of a run, from a plan's configuration."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from nnunetv2_hyspark.pretext.build import with_decoder_width
from nnunetv2_hyspark.pretext.hyspark import HySparKConfig
from nnunetv2_hyspark.training.settings import resolve_settings


@pytest.mark.parametrize("block", [None, [], "mask_ratio=0.6", 3])
def test_a_block_that_holds_no_settings_is_answered_in_a_sentence(block) -> None:
    with pytest.raises(ValueError, match='"hyspark" block of configuration 3d_fullres is .*expected settings by name'):
        resolve_settings({"hyspark": block}, "3d_fullres", "pretraining", {})


def test_no_block_leaves_the_defaults() -> None:
    assert resolve_settings({}, "3d_fullres", "pretraining", {}) == resolve_settings(
        {"hyspark": {}}, "3d_fullres", "pretraining", {}
    )


@pytest.mark.parametrize("decoder", ["", "decoder=segmentation,"])
@pytest.mark.parametrize("setting", ["decoder_width=48", "fuse_finest=false", "skips=add", "decoder_norm=batch"])
def test_what_the_segmentation_decoder_has_no_use_for_is_refused(setting, decoder) -> None:
    environment = {"nnUNet_hyspark": f"{decoder}{setting}"}
    said = f"{setting} belongs to the paper's decoder.*set decoder=reconstruction too, or leave it out"
    with pytest.raises(ValueError, match=said):
        resolve_settings({}, "3d_fullres", "pretraining", environment)
    environment = {"nnUNet_hyspark": f"decoder=reconstruction,{setting}"}
    assert resolve_settings({}, "3d_fullres", "pretraining", environment).pretraining.decoder == "reconstruction"


def test_a_plan_s_value_can_be_taken_back() -> None:
    block = {"hyspark": {"pretraining": {"skips": "none", "decoder_norm": "batch"}}}
    with pytest.raises(ValueError, match="skips=none, decoder_norm=batch belong to .* leave them out"):
        resolve_settings(block, "3d_fullres", "pretraining", {"nnUNet_hyspark": "decoder=segmentation"})
    taken_back = {"nnUNet_hyspark": "decoder=segmentation,skips=concatenate,decoder_norm=instance"}
    assert resolve_settings(block, "3d_fullres", "pretraining", taken_back).pretraining.skips == "concatenate"


@pytest.mark.parametrize("decoder, width", [("segmentation", 0), ("reconstruction", 16)])
def test_what_runs_store_is_taken(decoder, width) -> None:
    """A run's copy of the plans holds the width of the decoder that has one; `hyspark benchmark` reads such plans."""
    stored = asdict(with_decoder_width(HySparKConfig(decoder=decoder), {"features_per_stage": [8, 16, 32]}))
    assert stored["decoder_width"] == width
    block = {"hyspark": {"pretraining": stored}}
    assert resolve_settings(block, "3d_fullres", "pretraining", {}).pretraining == HySparKConfig(**stored)


def _planned_with(**settings) -> dict:
    return {"hyspark": {"pretraining": {"batch_size": 7}, "memory": {"target_gb": 8.0, "pretraining": settings}}}


@pytest.mark.parametrize(
    "variable, expected",
    [
        ("", {}),
        ("epochs=5,mask_ratio=0.75", {}),
        ("decoder=reconstruction", {"decoder": ("segmentation", "reconstruction")}),
        ("decoder=reconstruction,batch_size=3", {}),
        ("mask_ratio=0.5,bottom_up=false", {"mask_ratio": (0.75, 0.5), "bottom_up": (True, False)}),
    ],
)
def test_settings_for_which_the_batch_was_not_fitted_are_found(variable, expected) -> None:
    plan = _planned_with(decoder="segmentation", mask_ratio=0.75, bottom_up=True)
    assert resolve_settings(plan, "3d_fullres", "pretraining", {"nnUNet_hyspark": variable}).unplanned == expected
    other_stage = {"nnUNet_hyspark": "pretraining.mask_ratio=0.5"}
    assert not resolve_settings(plan, "3d_fullres", "finetuning", other_stage).unplanned


@pytest.mark.parametrize("memory", [None, "8 GB", {}, {"target_gb": 8.0}, {"pretraining": None}])
def test_plans_that_do_not_tell_are_taken_as_they_are(memory) -> None:
    plan = {"hyspark": {"pretraining": {"batch_size": 7}, "memory": memory}}
    assert not resolve_settings(plan, "3d_fullres", "pretraining", {"nnUNet_hyspark": "mask_ratio=0.5"}).unplanned
