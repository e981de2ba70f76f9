"""nnU-Net's own `-pretrained_weights`, without any part of ours in between, accepts our pre-training checkpoints."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_hyspark.transfer.inspection import inspect_checkpoint
from nnunetv2_hyspark.transfer.loading import load_pretrained_encoder
from nnunetv2_hyspark.transfer.reading import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]

SCRIPT = """
import copy, sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_hyspark.networks.topology import ArchitectureConfig, architecture_of
from nnunetv2_hyspark.trainers.HySparKFinetuneTrainer import HySparKFinetuneTrainer
from nnunetv2_hyspark.trainers.HySparKPretrainTrainer import HySparKPretrainTrainer

assert not getattr(load_pretrained_weights, "is_hyspark_hook", False)
torch.set_num_threads(1)
convs = {"conv_op": "torch.nn.modules.conv.Conv3d", "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}}
three_d = {
    "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
    "patch_size": [16, 16, 16], "median_image_size_in_voxels": [16.0, 16.0, 16.0], "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False], "batch_dice": False,
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [8, 16, 32], "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2], **convs,
        },
        "_kw_requires_import": ["conv_op", "nonlin"],
    },
}
plans = {
    "dataset_name": "Dataset999_Small", "plans_name": "nnUNetPlans", "configurations": {"3d_fullres": three_d},
    "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager", "foreground_intensity_properties_per_channel": {}, "continue_training": False,
}
dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2, "c": 3}, "numTraining": 5,
           "file_ending": ".nii.gz"}


def trainer(kind, plans):
    made = kind(copy.deepcopy(plans), "3d_fullres", 0, copy.deepcopy(dataset), torch.device("cpu"))
    made.initialize()
    return made


path = sys.argv[1]
pretraining = trainer(HySparKPretrainTrainer, plans)
Path(pretraining.output_folder).mkdir(parents=True, exist_ok=True)
pretraining.save_checkpoint(path)

ours = copy.deepcopy(plans)
ours["configurations"]["3d_fullres"]["architecture"] = architecture_of(
    three_d, ArchitectureConfig(base_width=4, head_width=6)
)
batch = {"data": torch.randn(2, 1, 16, 16, 16)}
wanted = pretraining.network.encoder.state_dict()
for kind, plan in ((HySparKFinetuneTrainer, plans), (nnUNetTrainer, ours)):
    finetuning = trainer(kind, plan)
    load_pretrained_weights(finetuning.network, path)
    have = finetuning.network.encoder.state_dict()
    assert wanted.keys() == have.keys() and all(torch.equal(have[n], wanted[n]) for n in wanted)
    outputs = finetuning.network(batch["data"])
    target = [torch.randint(0, 4, (2, 1, *o.shape[2:])).float() for o in outputs]
    finetuning.step_in_epoch = 0
    finetuning.network.train()
    loss = finetuning.train_step({**batch, "target": target})["loss"]
    print(kind.__name__, float(loss))
finetuning._best_ema = np.float64(0.5)
finetuning.save_checkpoint(sys.argv[2])
"""


@pytest.mark.slow
def test_unmodified_nnunet(tmp_path, make_network):
    """For our fine-tuning trainer and, on a plan that names our network, for the stock nnUNetTrainer."""
    (tmp_path / "script.py").write_text(SCRIPT)
    checkpoint, stock = tmp_path / "checkpoint_final.pth", tmp_path / "stock.pth"
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    images = Path(folders["nnUNet_preprocessed"]) / "Dataset999_Small" / "nnUNetPlans_3d_fullres"
    images.mkdir(parents=True)
    (images / "case.b2nd").touch()  # nnU-Net looks at the ending when a trainer is made
    settings = "base_width=4,head_width=6,pretraining.epochs=1,finetuning.epochs=1,iterations_per_epoch=2"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(checkpoint), str(stock)],
        env={**os.environ, **folders, "nnUNet_hyspark_disable": "1", "nnUNet_hyspark": settings,
             "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HySparKFinetuneTrainer" in result.stdout and "nnUNetTrainer" in result.stdout

    # the same real file holds plain data only, and says what it is
    content = torch.load(checkpoint, weights_only=True)
    assert content.keys() == read_checkpoint(checkpoint).keys()
    for key in ("format_version", "settings", "architecture", "configuration", "channel_names", "versions",
                "axis_order", "dataset_fingerprint_sha256", "citations"):
        assert content["hyspark"][key], key
    facts = inspect_checkpoint(stock)
    assert facts["kind"] == "nnU-Net checkpoint" and facts["configuration"]["patch_size"] == [16, 16, 16]

    network = make_network(**content["hyspark"]["architecture"]["arch_kwargs"])
    assert load_pretrained_encoder(network, checkpoint).of("loaded")
    trained = load_pretrained_encoder(network, stock)  # nnU-Net's own, with a decoder that was trained
    assert {e.name for e in trained.of("loaded")} > {n for n in network.state_dict() if n.startswith("decoder.up")}
