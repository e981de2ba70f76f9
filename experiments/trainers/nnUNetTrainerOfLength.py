"""nnU-Net's own trainer with a length, for baselines with the same number of steps."""

import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_hyspark.training.exclusive import claim
from nnunetv2_hyspark.training.parameters import decay_groups
from nnunetv2_hyspark.training.schedule import WarmupCosineSchedule
from nnunetv2_hyspark.training.threads import keep_to_allowed_threads


class nnUNetTrainerOfLength(nnUNetTrainer):
    """nnUNetTrainer; ``EPOCHS``, ``ITERATIONS`` and ``VAL_ITERATIONS`` of the environment say how long it trains.

    With ``RATE`` it is trained as our arms are: AdamW with that peak rate, warm-up and cosine (by epoch), and mirrored
    along the axes of ``MIRROR_AXES`` alone, digits such as ``12``. It saves every fifth epoch, each checkpoint whole or
    not at all: unlike ours, it saves nothing when it is told to stop.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.device.type == "cpu":
            keep_to_allowed_threads()
        self.save_every = 5
        self.num_epochs = int(os.environ["EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["ITERATIONS"])
        self.num_val_iterations_per_epoch = int(os.environ["VAL_ITERATIONS"])

    def on_train_start(self) -> None:
        """nnU-Net's, in a folder that no other process trains in."""
        self.claimed = claim(Path(self.output_folder), self.print_to_log_file)
        super().on_train_start()

    def configure_optimizers(self):
        """nnU-Net's SGD, or AdamW with ``RATE``."""
        if "RATE" not in os.environ:
            return super().configure_optimizers()
        rate = float(os.environ["RATE"])
        optimizer = torch.optim.AdamW(decay_groups(self.network, 0.05), lr=rate)
        return optimizer, WarmupCosineSchedule(optimizer, rate, self.num_epochs, 10, self.num_iterations_per_epoch)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):  # nnU-Net's spelling
        """nnU-Net's, with the axes of ``MIRROR_AXES``."""
        rotation, is_planewise, size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if "MIRROR_AXES" in os.environ:
            axes = tuple(axis for axis in axes if str(axis) in os.environ["MIRROR_AXES"])
            self.inference_allowed_mirroring_axes = axes or None
        return rotation, is_planewise, size, axes

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's, renamed when it is written."""
        partial = f"{filename}.part"
        super().save_checkpoint(partial)
        if os.path.exists(partial):
            os.replace(partial, filename)
