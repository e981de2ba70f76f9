"""Images prepared otherwise than in pre-training are told to the user."""

from __future__ import annotations

import pytest

from nnunetv2_hyspark.transfer.preparation import difference_in_intensities, differences_in_preparation

BODY = {"mean": 26.0, "std": 327.0, "percentile_00_5": -957.0, "percentile_99_5": 1408.0}
ORGANS = {"mean": 9.0, "std": 66.0, "percentile_00_5": -124.0, "percentile_99_5": 195.0}


def plan(spacing=(2.0, 1.0, 1.0), schemes=("CTNormalization",), intensities=BODY):
    configuration = {"spacing": list(spacing), "normalization_schemes": list(schemes)}
    return configuration, {"foreground_intensity_properties_per_channel": {"0": intensities, "1": BODY}}


def description(**changes):
    configuration, plans = plan(**changes)
    return {"configuration": configuration, **plans}


@pytest.mark.parametrize(
    "before, now, expected",
    [
        ({}, {}, []),
        ({}, {"spacing": (2.2, 1.0, 1.1)}, []),
        ({}, {"spacing": (3.0, 1.0, 1.0)}, ["voxels had 2 x 1 x 1 mm in pre-training, they have 3 x 1 x 1 mm"]),
        ({"spacing": (1.0, 1.0, 0.7)}, {"spacing": (1.0, 1.0, 1.0)}, ["voxels had 1 x 1 x 0.7 mm"]),
        ({}, {"schemes": ("ZScoreNormalization",)}, ["normalised by CTNormalization in pre-training, by ZScore"]),
        (
            {}, {"intensities": ORGANS},
            ["channel 0: CT intensities were clipped to -957 to 1408 HU, mean 26, scale 327 in pre-training, and are "
             "clipped to -124 to 195 HU, mean 9, scale 66 in this plan"],
        ),
        ({}, {"intensities": {**BODY, "std": 350.0}}, []),
        ({"intensities": ORGANS}, {"intensities": {**ORGANS, "mean": 40.0}}, ["channel 0: CT intensities were"]),
        ({"schemes": ("ZScoreNormalization",)}, {"schemes": ("ZScoreNormalization",), "intensities": ORGANS}, []),
        ({}, {"schemes": ("CTNormalization",) * 2, "intensities": ORGANS}, []),
        ({}, {"schemes": ("CTNormalization", "ZScoreNormalization")}, ["by CTNormalization, ZScore"]),
    ],
)
def test_what_differs_is_said(before, now, expected):
    found = differences_in_preparation(description(**before), *plan(**now))
    assert len(found) == len(expected)
    for sentence, part in zip(found, expected):
        assert part in sentence


@pytest.mark.parametrize(
    "told",
    [
        {}, {"configuration": None}, {"configuration": {"spacing": [0.0, 1.0, 1.0]}},
        {"configuration": {"spacing": "1 mm", "normalization_schemes": None}},
        {"configuration": {"normalization_schemes": 3}},
        {"configuration": {"spacing": [1.0, 1.0], "normalization_schemes": ["CTNormalization"]}},
        {"configuration": {"normalization_schemes": ["CTNormalization"]},
         "foreground_intensity_properties_per_channel": {"0": {"mean": None}}},
    ],
)
def test_a_checkpoint_that_does_not_tell_is_taken_as_it_is(told):
    assert differences_in_preparation(told, *plan()) == []


@pytest.mark.parametrize("other", [None, {}, "CT", {**BODY, "std": 0.0}, {**BODY, "std": float("nan")}])
def test_intensities_that_are_not_known_are_not_compared(other):
    assert difference_in_intensities(BODY, other) == difference_in_intensities(other, BODY) == ""
