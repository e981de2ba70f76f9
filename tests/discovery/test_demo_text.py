"""What `hyspark demo` prints for one's own data: commands that follow from each other, as in the README."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunetv2_hyspark.cli.demo import own_data_commands
from nnunetv2_hyspark.cli.main import _parser

README = Path(__file__).resolve().parents[2] / "README.md"


def test_commands_for_own_data() -> None:
    lines = [shlex.split(line) for line in own_data_commands().splitlines()[1:]]
    ours = {line[1]: _parser(line[1:]).parse_args(line[1:]) for line in lines if line[0] == "hyspark"}
    assert set(ours) == {"prepare", "plan-finetune"}
    checkpoint, plans = ours["plan-finetune"].checkpoint, ours["plan-finetune"].plans_name
    assert f"--from {checkpoint}\n" in README.read_text(encoding="utf-8")
    assert checkpoint.startswith(f"$nnUNet_results/Dataset900_{ours['prepare'].name}/")
    pretraining, finetuning = (line for line in lines if line[0] == "nnUNetv2_train")
    folder = f"HySparKPretrainTrainer__{pretraining[-1]}__{pretraining[2]}/fold_{pretraining[3]}"
    assert folder in checkpoint and pretraining[1] == "900"
    assert finetuning[-1] == plans
    assert all(plans in line for line in lines if line[0] in ("nnUNetv2_preprocess", "nnUNetv2_predict"))
