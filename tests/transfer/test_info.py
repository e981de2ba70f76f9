"""`hyspark info` for every kind of file."""
import json

import numpy as np
import pytest
import torch

from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.transfer.description import CITATIONS, FORMAT_VERSION, describe
from nnunetv2_hyspark.transfer.inspection import bounded, count_parameters, inspect_checkpoint


@pytest.fixture
def described(tmp_path, make_network, make_checkpoint, architecture):
    """A checkpoint that says all it should."""
    checkpoint = make_checkpoint(make_network())
    checkpoint["hyspark"] = describe(
        "pretraining",
        {"pretraining": {"mask_ratio": 0.75}},
        "3d_fullres",
        {
            "architecture": {"network_class_name": "some.Network", "arch_kwargs": architecture()},
            "patch_size": [8, 8, 8], "spacing": [1.0, 0.5, 0.5], "batch_size": 2,
            "normalization_schemes": ["CTNormalization"],
        },
        {"plans_name": "nnUNetPlans", "dataset_name": "Dataset900_Pile", "transpose_forward": [0, 1, 2]},
        {"channel_names": {"0": "CT"}},
        "ab" * 32,
    )
    checkpoint |= {"trainer_name": "HySparKPretrainTrainer", "current_epoch": 12}
    path = tmp_path / "checkpoint_final.pth"
    torch.save(checkpoint, path)
    return path


def test_ours(described, capsys):
    assert main(["info", str(described)]) == 0
    out = capsys.readouterr().out
    for text in (
        "HySparK pre-training checkpoint", "HySparKPretrainTrainer", "Dataset900_Pile", "ab" * 32, "0: CT",
        "[1, 0.5, 0.5]", "[CTNormalization]", "mask_ratio: 0.75", "features_per_stage", "(B, C, D, H, W)", *CITATIONS,
    ):
        assert text in out
    assert main(["info", str(described), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format_version"] == FORMAT_VERSION and facts["epochs_done"] == 12 and facts["finite"]
    assert facts["versions"]["torch"] and facts["configuration"]["spacing"] == [1.0, 0.5, 0.5]
    assert sum(facts["parameters"].values()) > 1000 and "encoder.cnn" in facts["parameters"]


def test_a_decoder_under_two_names_is_counted_once():
    weights = {
        "encoder.cnn.stem.weight": torch.zeros(3), "reconstruction.head.weight": torch.zeros(2),
        "reconstruction.decoder.up.0.weight": torch.zeros(5), "decoder.up.0.weight": torch.zeros(5),
        "decoder.seg_layers.0.weight": torch.zeros(7),
    }
    assert count_parameters(weights) == {"encoder.cnn": 3, "reconstruction": 2, "decoder": 12}


def test_newer_format_is_still_shown(described, capsys):
    checkpoint = torch.load(described, weights_only=True)
    checkpoint["hyspark"]["format_version"] = FORMAT_VERSION + 4
    torch.save(checkpoint, described)
    assert main(["info", str(described)]) == 0
    assert f"WARNING: format {FORMAT_VERSION + 4} is newer" in capsys.readouterr().out


def test_of_nnunet(tmp_path, capsys):
    """As nnU-Net's own trainers write them, numpy numbers included."""
    plans = {"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_Hippocampus", "configurations": {"3d_fullres": {
        "patch_size": [40, 56, 40], "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["ZScoreNormalization"]}}}
    torch.save(
        {
            "network_weights": {"encoder.stages.0.weight": torch.ones(3)},
            "logging": {"ema_fg_dice": [np.float64(0.5)]},
            "_best_ema": np.float32(0.5),
            "current_epoch": 3,
            "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu"),
                          "dataset_json": {"channel_names": {"0": "MRI"}}},
            "trainer_name": "nnUNetTrainer",
        },
        tmp_path / "f.pth",
    )
    assert main(["info", str(tmp_path / "f.pth")]) == 0
    out = capsys.readouterr().out
    for text in ("nnU-Net checkpoint", "Dataset004_Hippocampus", "[40, 56, 40]", "ZScoreNormalization", "0: MRI"):
        assert text in out


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["sparse_encoder.embeddings.stem.weight"], "training file of the official"),
        (["embeddings.stem.weight"], "encoder file of the official"),
        (["embeddings.stem.weight", "decoder.out.weight"], "segmentation network of the official"),
        (["conv.weight"], "unknown origin"),
    ],
)
def test_of_others(tmp_path, names, kind):
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "f.pth")
    assert kind in inspect_checkpoint(tmp_path / "f.pth")["kind"]


def test_nan_is_shown(tmp_path, capsys):
    torch.save({"network_weights": {"a": torch.tensor([torch.nan])}}, tmp_path / "f.pth")
    assert main(["info", str(tmp_path / "f.pth")]) == 0
    assert "some weights are NaN or infinite" in capsys.readouterr().out


def test_damaged(tmp_path, capsys):
    (tmp_path / "f.pth").write_bytes(b"PK\x03\x04nonsense")
    assert main(["info", str(tmp_path / "f.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hyspark: error: ") and "is damaged" in error and error.count("\n") == 1
    assert main(["info", str(tmp_path / "none.pth")]) == 2


def test_values_from_a_file_are_bounded(tmp_path):
    """Lists of lists of the same list print without end; escape sequences move the cursor."""
    laughs: list = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    deep: dict = {}
    for _ in range(50):
        deep = {"d": deep}
    copied = bounded({"laughs": laughs, "deep": deep, "text": "a\x1b[2J\n", 3: 10**400, "t": torch.ones(3)})
    assert len(json.dumps(copied)) < 10**6
    torch.save({"network_weights": {"a": torch.ones(1)}, "hyspark": {"kind": ["x"], "versions": laughs, "settings": 3,
                "architecture": {"arch_kwargs": 4}, "configuration": "c", "citations": "d"}}, tmp_path / "f.pth")
    assert main(["info", str(tmp_path / "f.pth")]) == 0
