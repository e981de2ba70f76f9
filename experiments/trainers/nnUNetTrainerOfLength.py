"""nnU-Net's own trainer with a length, for baselines with the same number of steps."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOfLength(nnUNetTrainer):
    """nnUNetTrainer; ``EPOCHS``, ``ITERATIONS`` and ``VAL_ITERATIONS`` of the environment say how long it trains.

    It saves every fifth epoch, each checkpoint whole or not at all: unlike ours, it saves nothing when it is told to
    stop.
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
        self.save_every = 5
        self.num_epochs = int(os.environ["EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["ITERATIONS"])
        self.num_val_iterations_per_epoch = int(os.environ["VAL_ITERATIONS"])

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's, renamed when it is written."""
        partial = f"{filename}.part"
        super().save_checkpoint(partial)
        if os.path.exists(partial):
            os.replace(partial, filename)
