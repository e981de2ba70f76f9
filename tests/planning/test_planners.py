"""The planner classes in-process."""
import json
import os

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hyspark.planners.hyspark_paper_planner import HySparKPaperPlanner
from nnunetv2_hyspark.planners.hyspark_planner import HySparKPlanner
from nnunetv2_hyspark.training.settings import resolve_settings

SMALL = (7, "Small", (40, 48, 40), (1.0, 1.0, 1.0), ["CT"])


@pytest.fixture
def small(make_dataset, monkeypatch):
    """A data set and settings with which planning takes a moment."""
    network = "base_width=6,junction_width=24,head_width=12,max_stride=8,transformer_depth=1"
    monkeypatch.setenv("nnUNet_hyspark", network)
    return make_dataset(*SMALL)


def test_both_batch_sizes_stand_in_the_plan_and_reach_the_settings(small, folders):
    HySparKPlanner(7).plan_experiment()
    plans = folders.plans(small, "nnUNetHySparKPlans")
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    block = configuration.configuration["hyspark"]
    settings = resolve_settings(configuration.configuration, "3d_fullres", "pretraining", environment={})
    assert settings.pretraining.batch_size == block["pretraining"]["batch_size"] >= 2
    assert configuration.batch_size >= 2 and settings.finetuning.batch_size == 0
    assert block["memory"]["target_gb"] == 8
    assert "hyspark" not in plans["configurations"]["2d"]


def test_the_plan_tells_for_which_settings_its_batch_was_fitted(small, folders, monkeypatch):
    network = os.environ["nnUNet_hyspark"]
    needed = {}
    for decoder in ("reconstruction", "segmentation"):
        monkeypatch.setenv("nnUNet_hyspark", f"{network},decoder={decoder}")
        HySparKPlanner(7).plan_experiment()
        plans = folders.plans(small, "nnUNetHySparKPlans")
        configuration = PlansManager(plans).get_configuration("3d_fullres").configuration
        needed[decoder] = configuration["hyspark"]["memory"]["pretraining_gb"]
        for trained in ("reconstruction", "segmentation"):
            environment = {"nnUNet_hyspark": f"decoder={trained}"}
            unplanned = resolve_settings(configuration, "3d_fullres", "pretraining", environment).unplanned
            assert unplanned == ({} if trained == decoder else {"decoder": (decoder, trained)})
    assert needed["segmentation"] > needed["reconstruction"]


def test_data_are_shared_where_nobody_else_has_planned(small):
    plans = HySparKPlanner(7).plan_experiment()
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert plans["configurations"]["2d"]["data_identifier"] == "nnUNetPlans_2d"


def test_data_are_shared_with_equal_stock_plans_only(small, folders):
    ExperimentPlanner(7).plan_experiment()
    path = folders.preprocessed / small / "nnUNetPlans.json"
    shared = HySparKPlanner(7).plan_experiment()["configurations"]
    assert shared["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    stock = json.loads(path.read_text())
    stock["configurations"]["3d_fullres"]["spacing"][0] = 1.1
    path.write_text(json.dumps(stock))
    own = HySparKPlanner(7).plan_experiment()["configurations"]
    assert own["3d_fullres"]["data_identifier"] == "nnUNetHySparKPlans_3d_fullres"
    assert own["2d"]["data_identifier"] == "nnUNetPlans_2d"


def test_another_spacing_is_not_shared(small):
    plans = HySparKPlanner(7, overwrite_target_spacing=[2.0, 1.0, 1.0]).plan_experiment()
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetHySparKPlans_3d_fullres"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]


def test_a_small_memory_target_gives_a_small_patch_and_a_tiny_one_a_sentence(small):
    patches = {}
    for target in (0.57, 8):
        plan = HySparKPlanner(7, gpu_memory_target_in_gb=target).plan_experiment()["configurations"]["3d_fullres"]
        patches[target] = plan["patch_size"]
        assert max(plan["hyspark"]["memory"][key] for key in ("pretraining_gb", "finetuning_gb")) <= target
    assert patches[0.57] < patches[8]
    with pytest.raises(ValueError, match=r"needs about 0\.\d GB, but the memory target is 0\.1 GB"):
        HySparKPlanner(7, gpu_memory_target_in_gb=0.1).plan_experiment()


def test_the_paper_planner_refuses_what_is_not_ct(make_dataset):
    make_dataset(8, "Mr", (40, 48, 40), (1.0, 1.0, 1.0), ["T2"])
    with pytest.raises(ValueError, match=r"channel\(s\) T2, but the paper's preprocessing is for CT"):
        HySparKPaperPlanner(8)


@pytest.mark.slow
def test_the_papers_plan(make_dataset):
    make_dataset(9, "Ct", (300, 512, 512), (1.0, 0.8, 0.8), ["CT"])
    small, large = (HySparKPaperPlanner(9, gpu_memory_target_in_gb=gb).plan_experiment() for gb in (8, 80))
    plan = large["configurations"]["3d_fullres"]
    kwargs = plan["architecture"]["arch_kwargs"]
    assert large["plans_name"] == "nnUNetHySparKPaperPlans" and "3d_lowres" not in large["configurations"]
    assert plan["spacing"] == [1.5, 1.5, 1.5] and list(plan["patch_size"]) == [96, 96, 96]
    assert plan["normalization_schemes"] == ["CTWindow01Normalization"]
    assert kwargs["features_per_stage"] == [32, 64, 128, 256, 384]
    assert kwargs["n_blocks_per_stage"] == [1, 1, 3, 3, 1] and kwargs["expansion_per_stage"] == [2, 4, 4, 4, 2]
    assert (kwargs["transformer_depth"], kwargs["transformer_heads"]) == (3, 12)
    assert plan["hyspark"]["pretraining"] == {
        "batch_size": 8, "mask_ratio": 0.75, "accumulate": 1, "decoder": "reconstruction",
    }
    assert plan["hyspark"]["memory"]["pretraining"]["decoder"] == "reconstruction"
    assert plan["batch_size"] == 8
    less = small["configurations"]["3d_fullres"]["hyspark"]
    assert less["pretraining"]["batch_size"] == 8 and less["pretraining"]["accumulate"] > 1
    assert less["memory"]["pretraining_gb"] <= 8
    with pytest.raises(ValueError, match="-gpu_memory_target"):
        HySparKPaperPlanner(9, gpu_memory_target_in_gb=2).plan_experiment()
