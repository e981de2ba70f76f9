"""The part of nnU-Net's trainer that all HySparK trainers change."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from ..networks.topology import architecture_of
from ..transfer.reading import read_checkpoint
from .checkpoints import plain, save_atomically
from .description import describe, fingerprint_digest
from .settings import Stage, resolve_settings


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class HySparKTrainer(nnUNetTrainer):
    """nnU-Net's trainer with HySparK's settings and network, and checkpoints of plain data, written atomically.

    The network follows from the plan and the settings; both are written into the trainer's own copy of the plans, which
    nnU-Net stores next to the results. So prediction rebuilds it from there, whatever the settings are by then.
    """

    stage: ClassVar[Stage]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        plans = copy.deepcopy(plans)
        resolved = PlansManager(plans).get_configuration(configuration).configuration
        self.check_configuration(configuration, resolved)
        self.settings = resolve_settings(resolved, configuration, self.stage)
        own = plans["configurations"][configuration]
        own["architecture"] = architecture_of(resolved, self.settings.architecture)
        own["hyspark"] = {self.stage: self.settings.as_dict(self.stage)[self.stage]}
        super().__init__(plans, configuration, fold, dataset_json, device)
        options = getattr(self.settings, self.stage)
        self.initial_lr = options.learning_rate
        self.weight_decay = options.weight_decay
        self.num_epochs = options.epochs
        self.num_iterations_per_epoch = options.iterations_per_epoch
        self.num_val_iterations_per_epoch = options.val_iterations_per_epoch
        self.save_every = options.save_every
        if options.batch_size:
            self.configuration_manager.configuration["batch_size"] = options.batch_size
        self.print_to_log_file("HySparK settings:", json.dumps(self.settings.as_dict(self.stage)), add_timestamp=False)

    @staticmethod
    def check_configuration(name: str, configuration: dict[str, Any]) -> None:
        """Raises ValueError where this kind of configuration cannot be trained."""
        if len(configuration["patch_size"]) != 3:
            raise ValueError(
                f"configuration {name} is {len(configuration['patch_size'])}D; HySparK networks are 3D, so use a 3D "
                f"configuration such as 3d_fullres."
            )

    def initialize(self) -> None:
        """nnU-Net's, with the initial weights fixed by the seed."""
        seed = getattr(self.settings, self.stage).seed
        if seed >= 0:
            torch.manual_seed(seed)
        super().initialize()

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split. Raises ValueError where it cannot be made: fewer cases than folds."""
        splits = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold != "all" and not splits.is_file():
            if self.dataset_class is None:
                from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

                self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
            cases = len(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
            if cases < 5:
                raise ValueError(
                    f"{self.plans_manager.dataset_name} has {cases} case(s) for five-fold cross-validation; use fold "
                    f"'all', or write your own {splits}."
                )
        return super().do_split()

    def plot_network_architecture(self) -> None:
        """Leaves out nnU-Net's plot, which needs a package that no longer works."""

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """The weights that go into a checkpoint."""
        return unwrap(self.network).state_dict()

    def save_checkpoint(self, filename: str) -> None:
        """Writes a checkpoint of plain data, whole or not at all."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        folder = self.preprocessed_dataset_folder_base
        checkpoint = {
            "network_weights": dict(self.checkpoint_weights()),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": {**self.my_init_kwargs, "device": str(self.my_init_kwargs["device"])},
            "trainer_name": self.__class__.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "hyspark": describe(
                self.stage,
                self.settings.as_dict(self.stage),
                self.configuration_name,
                self.configuration_manager.configuration,
                self.plans_manager.plans,
                self.dataset_json,
                fingerprint_digest(folder) if folder is not None else "unknown",
            ),
        }
        save_atomically(plain(checkpoint), filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restores a run of this trainer.

        Raises:
            ValueError: if the file is damaged or was written with another network.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = read_checkpoint(checkpoint)
        network = unwrap(self.network)
        expected = network.state_dict()
        weights = {name: tensor for name, tensor in checkpoint["network_weights"].items() if name in expected}
        wrong = [n for n in expected if n not in weights or weights[n].shape != expected[n].shape]
        if wrong:
            raise ValueError(
                f"the checkpoint to continue from has another network ({wrong[0]} and {len(wrong) - 1} more differ); "
                f"continue with the settings and plans of that run, or start a new one without --c."
            )
        network.load_state_dict(weights)
        self.my_init_kwargs = {**self.my_init_kwargs, "fold": checkpoint["init_args"]["fold"]}
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        self.inference_allowed_mirroring_axes = tuple(axes) if axes is not None else None
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])

    def backward_and_step(self, loss: torch.Tensor, max_norm: float) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)
            self.optimizer.step()
        return float(norm)


def split_batch(global_batch: int, world_size: int, rank: int) -> range:
    """Which samples of a global batch a process makes. Raises ValueError if there are fewer samples than processes."""
    if global_batch < world_size:
        raise ValueError(
            f"the batch size is {global_batch} for {world_size} processes; set batch_size to at least {world_size}."
        )
    bounds = np.linspace(0, global_batch, world_size + 1).round().astype(int)
    return range(int(bounds[rank]), int(bounds[rank + 1]))
