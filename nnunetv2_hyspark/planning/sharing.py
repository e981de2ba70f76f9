"""Whether preprocessed data can be shared with nnU-Net's own plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

_OF_THE_PLANS = ("transpose_forward", "foreground_intensity_properties_per_channel")


class PreprocessingPlanner(Protocol):
    """What is asked of a planner."""

    overwrite_target_spacing: Any
    suppress_transpose: bool
    preprocessor_name: str

    def preprocessing(self, configuration_name: str) -> dict[str, Any]:
        """What decides how images look after preprocessing."""


def shares_data(planner: PreprocessingPlanner, stock_plans: Path, configuration_name: str) -> str | None:
    """The data identifier of nnU-Net's own plans, if our preprocessed data are the same as theirs.

    Where these plans exist, all that decides how preprocessed data look is compared with them. Where they do not, data
    are shared if nothing deviates from what nnU-Net's default planner would do.

    Args:
        planner: ours.
        stock_plans: file ``nnUNetPlans.json`` of the data set, which need not exist.
        configuration_name: ``2d`` and ``3d_fullres`` can be shared; the spacing of others depends on the patch size.
    """
    if configuration_name not in ("2d", "3d_fullres"):
        return None
    if not stock_plans.is_file():
        deviates = (
            planner.overwrite_target_spacing is not None
            or planner.suppress_transpose
            or planner.preprocessor_name != "DefaultPreprocessor"
        )
        return None if deviates else f"{stock_plans.stem}_{configuration_name}"
    plans = json.loads(stock_plans.read_text(encoding="utf-8"))
    configuration = plans.get("configurations", {}).get(configuration_name)
    if not isinstance(configuration, Mapping):
        return None
    ours = planner.preprocessing(configuration_name)
    theirs = {key: (plans if key in _OF_THE_PLANS else configuration).get(key) for key in ours}
    same = json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True)
    return configuration.get("data_identifier") if same else None
