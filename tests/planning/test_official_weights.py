"""From an official file to a plan for fine-tuning, by the commands, in-process."""

from __future__ import annotations

import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder

NAME = "nnUNetHySparKFinetunePlans"


@pytest.mark.slow
def test_plan_for_official_weights(imported_official, make_dataset, folders, capsys):
    """The file says no spacing, so the target's is asked for; the planned network takes the whole encoder."""
    imported, _ = imported_official
    dataset = make_dataset(10, "Target", (70, 80, 64), (2.0, 1.5, 1.5), ["CT"])
    assert main(["plan-finetune", "-d", "10", "--from", str(imported)]) == 2
    assert "does not tell the spacing it was pre-trained at; use --spacing default" in capsys.readouterr().err
    assert main(["plan-finetune", "-d", "10", "--from", str(imported), "--spacing", "default"]) == 0
    assert f"nnUNetv2_train 10 3d_fullres 0 -tr HySparKFinetuneTrainer -p {NAME}\n" in capsys.readouterr().out
    configuration = PlansManager(folders.plans(dataset, NAME)).get_configuration("3d_fullres")
    assert configuration.spacing == [2.0, 1.5, 1.5]
    assert all(size % 16 == 0 for size in configuration.patch_size)
    kwargs = configuration.network_arch_init_kwargs
    assert kwargs["features_per_stage"] == [8, 12, 16, 24, 48] and kwargs["transformer_heads"] == 6
    network = get_network_from_plans(
        configuration.network_arch_class_name, kwargs, configuration.network_arch_init_kwargs_req_import, 1, 3,
        deep_supervision=True,
    )
    report = load_pretrained_encoder(network, imported)
    assert {e.name for e in report.of("loaded")} == {n for n in network.state_dict() if n.startswith("encoder.")}
    assert not report.of("adapted")
