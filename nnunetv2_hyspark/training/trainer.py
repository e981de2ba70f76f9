"""The part of nnU-Net's trainer that all HySparK trainers change."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from ..heap import keep_freed_memory
from ..networks.topology import architecture_of
from ..transfer.description import as_mapping, describe, description_of, fingerprint_digest
from ..transfer.loading import hidden_differences
from ..transfer.preparation import differences_in_preparation
from ..transfer.reading import read_checkpoint
from ..transfer.rebuilding import reason_of
from ..transfer.report import LoadReport, summarise
from ..user_errors import is_user_error, show_user_errors_as_sentences
from .checkpoints import (
    FINAL,
    LATEST,
    checkpoints_in,
    most_advanced,
    plain,
    progress_of,
    remove_partial_files,
    save_atomically,
    set_aside,
)
from .distributed import any_process, distribute, only_on_first, process_device
from .exclusive import claim
from .random_state import capture_random_state, restore_random_state
from .settings import Settings, Stage, resolve_settings
from .signals import StopSignals
from .threads import keep_to_allowed_threads

LOAD_REPORT = "load_report.json"
RESULTS = ("progress.png", "previews", "incidents", "validation", "debug.json", LOAD_REPORT, "tensorboard")


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class HySparKTrainer(nnUNetTrainer):
    """nnU-Net's trainer with HySparK's settings and network, and runs that lose nothing.

    The network follows from the plan and the settings; both are written into the trainer's own copy of the plans, which
    nnU-Net stores next to the results. So prediction rebuilds it from there, whatever the settings are by then.

    Checkpoints hold plain data and are written atomically. SIGTERM, SIGINT and SIGUSR1 save and leave with status
    128 + signal. A run that starts anew in a folder with checkpoints moves these aside; one that goes on (``--c``)
    goes on from the checkpoint that got furthest, and from the next one if that is damaged. One that was stopped before
    its first checkpoint begins again, from the same pre-trained weights if it had any.

    Attributes:
        beside_the_network: prefixes of what checkpoints hold beside the network's own weights.
    """

    stage: ClassVar[Stage]
    beside_the_network: ClassVar[tuple[str, ...]] = ()
    dataset_class: Any
    is_ddp: bool
    network: Any
    my_init_kwargs: dict[str, Any]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        show_user_errors_as_sentences()
        plans = copy.deepcopy(plans)
        resolved = PlansManager(plans).get_configuration(configuration).configuration
        self.check_configuration(configuration, resolved)
        self.settings = resolve_settings(resolved, configuration, self.stage)
        own = plans["configurations"][configuration]
        own["architecture"] = architecture_of(resolved, self.settings.architecture)
        self.settings = self.complete_settings(self.settings, own["architecture"]["arch_kwargs"])
        own["hyspark"] = {self.stage: self.settings.as_dict(self.stage)[self.stage]}
        self.continue_training = bool(plans.get("continue_training", False))
        self.was_resumed = False
        self.resumed_from = ""
        self.epochs_before = 0
        self.training_began = False
        self.is_leaving = False
        self.weights_were_loaded = False
        self.epoch_is_open = False
        self.claimed: TextIO | None = None
        self.stop = StopSignals()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = process_device(device)
            if self.device.type != "cuda":
                self.grad_scaler = None
        if self.device.type == "cpu":
            keep_freed_memory()
            threads = keep_to_allowed_threads()
            self.print_to_log_file(f"Threads: {threads}", add_timestamp=False)
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

    @staticmethod
    def complete_settings(settings: Settings, arch_kwargs: Mapping[str, Any]) -> Settings:
        """The settings with what follows from the network in place of "by default"."""
        return settings

    @property
    def folder(self) -> Path:
        """Where this run's results go."""
        return Path(self.output_folder)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's; of several processes, the first one speaks, the others only warn."""
        if self.local_rank == 0:
            super().print_to_log_file(
                *args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp
            )
        elif args and str(args[0]).startswith("WARNING"):
            print(f"process {self.local_rank}:", *args)

    def initialize(self) -> None:
        """nnU-Net's, with the initial weights fixed by the seed.

        With several processes the network is wrapped here, because nnU-Net takes the GPU from the rank among all
        machines and knows no CPU.
        """
        seed = getattr(self.settings, self.stage).seed
        if seed >= 0:
            torch.manual_seed(seed)
        is_ddp, self.is_ddp = self.is_ddp, False
        try:
            super().initialize()
        finally:
            self.is_ddp = is_ddp
        if is_ddp:
            self._set_batch_size_and_oversample()
            self.network = distribute(self.network, self.device)
            self.loss = self._build_loss()

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split; a new one is written atomically.

        Raises:
            ValueError: if it cannot be made, because there are fewer cases than folds, or read.
        """
        splits = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold != "all":
            if splits.is_file():
                try:
                    json.loads(splits.read_text())
                except ValueError as error:
                    raise ValueError(f"{splits} is damaged ({error}); delete it to have it made again.") from None
            else:
                self._make_split(splits)
        return super().do_split()

    def _make_split(self, path: Path) -> None:
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = sorted(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        if len(cases) < 5:
            raise ValueError(
                f"{self.plans_manager.dataset_name} has {len(cases)} case(s) for five-fold cross-validation; use fold "
                f"'all', or write your own {path}."
            )
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_json(generate_crossval_split(cases, seed=12345, n_splits=5), str(partial))
        os.replace(partial, path)

    def plot_network_architecture(self) -> None:
        """Leaves out nnU-Net's plot, which needs a package that no longer works."""

    def run_training(self) -> None:
        """nnU-Net's, with signals that stop it.

        Raises:
            SystemExit: with status 128 + signal, after saving.
        """
        with self.stop:
            try:
                super().run_training()
            except RuntimeError:
                # a signal to the whole process group ends the data workers too, which shows before the next step
                if self.stop.received is None:
                    raise
                if self.epoch_is_open:
                    self.save_and_leave(wait=False)
                self.print_to_log_file(f"Stopped by {self.stop.name}, with nothing new to save.")
                raise SystemExit(self.stop.exit_status) from None
            self.leave_after_training()

    def on_train_start(self) -> None:
        """nnU-Net's, after seeing to what is in the folder already.

        Raises:
            ValueError: if other folds of these results belong to another network.
            RuntimeError: if another process trains there.
        """
        if not self.was_initialized:
            self.initialize()
        self._check_other_folds()
        only_on_first(self._claim_folder)
        if self.continue_training and not self.was_resumed:
            if checkpoints_in(self.folder):
                self.load_checkpoint(self.folder / LATEST)
            elif not self.weights_were_loaded:
                self.load_again()
        if not self.was_resumed:
            only_on_first(self._set_earlier_run_aside)
        self.training_began = True
        super().on_train_start()

    def _check_other_folds(self) -> None:
        """Prediction builds the network of every fold from one ``plans.json``, which each training writes.

        Raises:
            ValueError: if another fold has checkpoints of another network; nothing has been changed then.
        """
        if self.stage == "pretraining":  # nothing is predicted with these
            return
        path = Path(self.output_folder_base) / "plans.json"
        others = [folder for folder in path.parent.glob("fold_*") if folder != self.folder and checkpoints_in(folder)]
        if not others or not path.is_file():
            return
        try:
            configuration = json.loads(path.read_text())["configurations"][self.configuration_name]
            theirs = as_mapping(configuration["architecture"]["arch_kwargs"])
        except (KeyError, TypeError, ValueError):
            return
        ours = json.loads(json.dumps(self.configuration_manager.network_arch_init_kwargs))
        differing = [
            f"{key} {theirs[key]} there, {value} here" for key, value in ours.items() if theirs.get(key, value) != value
        ]
        if differing:
            folds = ", ".join(sorted(folder.name for folder in others))
            raise ValueError(
                f"{path.parent} holds checkpoints of {folds} with another network ({'; '.join(differing)}), and "
                f"prediction builds one network for all folds; set nnUNet_hyspark and the plans as they were there, or "
                f"set nnUNet_results to another folder."
            )

    def load_again(self) -> None:
        """The pre-trained weights with which this run began before it was stopped without a checkpoint."""
        report = self.folder / LOAD_REPORT
        try:
            source = json.loads(report.read_text(encoding="utf-8"))["source"]
        except (OSError, KeyError, TypeError, ValueError):
            source = None
        only_on_first(lambda: None)  # the first process writes the report anew, when all have read it
        remembered = self.settings.checkpoint
        if source is None or (remembered is not None and source == remembered.path):  # loaded anyway, and checked
            return
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"this run began from {source} and was stopped before its first checkpoint, and that file is gone; "
                f"start it again with -pretrained_weights and without --c."
            )
        self.print_to_log_file(
            f"This run was stopped before its first checkpoint; it begins again from {source}, named by {report.name}."
        )
        self.load_pretrained(source)

    def load_pretrained(self, filename: str) -> None:
        """Loads what ``-pretrained_weights`` names."""
        raise NotImplementedError

    def hand_over_loader(self, network: nn.Module) -> None:
        """Lets the start-up hook find :meth:`load_pretrained` at the network. A function that holds this trainer
        weakly, so that networks can be copied."""
        trainer = weakref.ref(self)

        def load(filename: str) -> None:
            owner = trainer()
            if owner is None:
                raise RuntimeError(f"{filename} was not loaded: the trainer of this network is gone.")
            owner.load_pretrained(os.path.abspath(filename))  # the report is read from other folders too

        network.hyspark_load_pretrained = load  # type: ignore[assignment]

    def _claim_folder(self) -> None:
        if self.claimed is None:
            self.claimed = claim(self.folder, self.print_to_log_file)
        remove_partial_files(self.folder)

    def _set_earlier_run_aside(self) -> None:
        self._claim_folder()
        if self.disable_checkpointing:  # nothing will stand in the place of what is there
            return
        earlier = set_aside(self.folder, RESULTS, datetime.now())
        if earlier is None and not self.weights_were_loaded:
            (self.folder / LOAD_REPORT).unlink(missing_ok=True)  # of a run that left no checkpoint
        if earlier is not None:
            self.print_to_log_file(
                f"NOTE: this folder held the checkpoints of an earlier run, and this run starts anew; they are now in "
                f"{earlier}. To go on with a run instead, give --c."
            )

    def write_load_report(self, report: LoadReport) -> None:
        """Logs what was loaded and how its images differ from this plan's, and writes ``load_report.json``; weights are
        loaded before the training starts, so an earlier run goes first."""
        is_unplanned = self.stage == "finetuning" and not self.settings.checkpoint
        advice = "; `hyspark plan-finetune` prepares images as in pre-training" if is_unplanned else ""
        report.notes += [
            f"{difference}{advice}" for difference in differences_in_preparation(
                report.description, self.configuration_manager.configuration, self.plans_manager.plans
            )
        ]
        self.print_to_log_file(report.table(), add_timestamp=False)
        if not self.continue_training:
            self._check_other_folds()
            only_on_first(self._set_earlier_run_aside)
        self.weights_were_loaded = True
        if self.local_rank == 0:
            report.write_json(self.folder / LOAD_REPORT)

    def on_epoch_start(self) -> None:
        """nnU-Net's; a checkpoint written from now on says that this epoch is not done."""
        super().on_epoch_start()
        self.epoch_is_open = True

    def on_epoch_end(self) -> None:
        """nnU-Net's; the epoch is done."""
        self.epoch_is_open = False
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """nnU-Net's; with checkpointing disabled, an existing ``checkpoint_latest.pth`` stays."""
        latest, kept = self.folder / LATEST, self.folder / "checkpoint_latest_kept.pth"
        keep = self.disable_checkpointing and self.local_rank == 0 and latest.is_file()
        if keep:
            latest.rename(kept)
        super().on_train_end()
        if keep:
            kept.rename(latest)

    def leave_if_asked(self) -> None:
        """After a step: all processes save and exit if a signal has come to any. The epoch is repeated when the run
        goes on.

        Raises:
            SystemExit: with status 128 + signal.
        """
        if any_process(self.stop.received is not None, self.device):
            self.save_and_leave()

    def save_and_leave(self, wait: bool = True) -> None:
        """Writes ``checkpoint_latest.pth`` and exits.

        Args:
            wait: no process leaves before the first one has saved; not to be asked for where one may have died.

        Raises:
            SystemExit: with status 128 + signal.
        """
        self.is_leaving = True
        try:
            self.save_checkpoint(str(self.folder / LATEST))
        finally:
            if wait:
                only_on_first(lambda: None)
        where = "" if self.disable_checkpointing else f" Progress is saved in {self.folder / LATEST}."
        without = " and without -pretrained_weights" if self.weights_were_loaded else ""
        self.print_to_log_file(f"Stopped by {self.stop.name}.{where} Run the same command with --c{without} to go on.")
        raise SystemExit(self.stop.exit_status)

    def leave_after_training(self) -> None:
        """Exits if a signal came too late for a step: the training is done, its validation is not.

        Raises:
            SystemExit: with status 128 + signal.
        """
        if self.stop.received is not None:
            self.print_to_log_file(
                f"Stopped by {self.stop.name}; the training is done. Run the same command with --c for its validation."
            )
            raise SystemExit(self.stop.exit_status)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, and the last thing that it asks of a trainer; see :meth:`leave_process_group`."""
        super().perform_actual_validation(save_probabilities)
        self.leave_process_group()

    def leave_process_group(self) -> None:
        """Lets go of the process group; from here on this process works alone.

        nnU-Net's ``-num_gpus`` destroys the group while the trainer still is there. A group that something holds lives
        on until the interpreter shuts down, and then its threads, which give back the tensors of the last exchange, may
        end the process with SIGABRT.
        """
        if isinstance(self.network, DistributedDataParallel):
            self.network = self.network.module
            self.is_ddp = False
            gc.collect()

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """The weights that go into a checkpoint."""
        return unwrap(self.network).state_dict()

    def run_state(self) -> dict[str, Any]:
        """How far the run is, for a checkpoint; nnU-Net saves while ``current_epoch`` still is the one just done."""
        return {"current_epoch": self.current_epoch + (0 if self.epoch_is_open else 1)}

    def save_checkpoint(self, filename: str) -> None:
        """Writes a checkpoint of plain data, whole or not at all.

        The final one of a run that was finished before stays.

        Raises:
            OSError: if it cannot be written; the previous one is untouched.
            RuntimeError: if weights are NaN or infinite; the previous one is untouched.
        """
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        if self.was_finished and Path(filename).name == FINAL:
            return
        folder = self.preprocessed_dataset_folder_base
        weights = dict(self.checkpoint_weights())
        self._check_finite(weights, Path(filename))
        checkpoint = {
            "network_weights": weights,
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            **self.run_state(),
            "random_state": capture_random_state(),
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

    @property
    def was_finished(self) -> bool:
        """Whether this run goes on from the end of its training, to be validated again."""
        return self.resumed_from == FINAL and self.epochs_before >= self.num_epochs

    def _check_finite(self, weights: dict[str, torch.Tensor], path: Path) -> None:
        wrong = [n for n, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if wrong:
            good = most_advanced(self.folder)
            raise RuntimeError(
                f"{path.name} was not written, because {len(wrong)} weights are NaN or infinite (first {wrong[0]}); "
                + (f"the last good checkpoint is {good}, " if good else "there is no earlier checkpoint, ")
                + "go on from there with a lower learning_rate."
            )

    def load_checkpoint(self, filename_or_checkpoint: dict | str | os.PathLike[str]) -> None:
        """Restores a run of this trainer.

        With ``--c``, the checkpoint of this run's folder that got furthest is taken, whichever is named; a damaged one
        is said and passed over.

        Raises:
            ValueError: if the file is damaged or was written with another network.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint: Any = filename_or_checkpoint
        if isinstance(checkpoint, (str, os.PathLike)):
            if self.continue_training and not self.was_resumed and not self.training_began:
                checkpoint = self._read_most_advanced(Path(checkpoint))
            else:
                checkpoint = read_checkpoint(checkpoint)
        try:
            self._restore(checkpoint)
        except Exception as error:  # a checkpoint without its entries, or with others in their place, raises anything
            if is_user_error(error) or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ValueError(
                f"the checkpoint to continue from does not describe a run of this trainer ({reason_of(error)}); take "
                f"another one of that run, or start a new one without --c."
            ) from error

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes over weights, log, optimizer and random state; raises anything if the checkpoint makes no sense."""
        network = unwrap(self.network)
        expected = network.state_dict()
        stored = checkpoint["network_weights"]
        weights = {name: tensor for name, tensor in stored.items() if name in expected}
        wrong = [n for n in expected if n not in weights or weights[n].shape != expected[n].shape]
        surplus = [n for n in stored if n not in expected and not n.startswith(self.beside_the_network)]
        problems = [f"it lacks or has in another shape {summarise(wrong, 2)}"] if wrong else []
        problems += [f"this run's has no {summarise(surplus, 2)}"] if surplus else []
        problems += [text for _, text in hidden_differences(network, description_of(checkpoint))]
        if problems:
            raise ValueError(
                f"the checkpoint to continue from has another network ("
                f"{'; '.join([*problems, *self._changed_settings(checkpoint)])}); continue with the settings and plans "
                f"of that run, or start a new one without --c."
            )
        network.load_state_dict(weights)
        self.my_init_kwargs = {**self.my_init_kwargs, "fold": checkpoint["init_args"]["fold"]}
        log = checkpoint["logging"]
        if not isinstance(log, dict) or not all(isinstance(values, list) for values in log.values()):
            raise TypeError("its log is not one list of numbers per quantity")
        self.logger.load_checkpoint(log)
        self._best_ema = checkpoint["_best_ema"]
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        self.inference_allowed_mirroring_axes = tuple(axes) if axes is not None else None
        self._load_optimizer(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        if checkpoint.get("random_state"):
            restore_random_state(checkpoint["random_state"])
        self.restore_run_state(checkpoint)
        self.was_resumed = True
        self._say_what_changed(checkpoint)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments and steps from the checkpoint; the groups' own values (weight decay, rates) are today's settings."""
        groups = self.optimizer.param_groups
        sizes = [[len(group["params"]) for group in some] for some in (groups, state["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the checkpoint's optimizer has parameter groups of {sizes[1]} tensors, these settings make "
                f"{sizes[0]}; go on with the layer_decay and weight_decay of that run, or start a new one without --c."
            )
        own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.optimizer.load_state_dict(state)
        for group, values in zip(self.optimizer.param_groups, own):
            group.update(values)

    def _changed_settings(self, checkpoint: dict[str, Any]) -> list[str]:
        settings = as_mapping(description_of(checkpoint).get("settings"))
        before = {section: dict(as_mapping(values)) for section, values in settings.items()}
        if "pretraining" in before:
            before["pretraining"].setdefault("decoder", "reconstruction")  # the decoder of files that name none
        now = json.loads(json.dumps(self.settings.as_dict(self.stage)))
        return [
            f"{section}.{key} was {before[section][key]}, is {value}"
            for section, values in now.items()
            for key, value in values.items()
            if key in before.get(section, {}) and before[section][key] != value
        ]

    def _say_what_changed(self, checkpoint: dict[str, Any]) -> None:
        changes = self._changed_settings(checkpoint)
        if changes and self.continue_training:
            self.print_to_log_file(
                f"WARNING: this run goes on with other settings than it had: {'; '.join(changes)}. If that is not "
                f"meant, stop it and set nnUNet_hyspark and the plans as they were."
            )

    def restore_run_state(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what :meth:`run_state` wrote."""
        self.current_epoch = self.epochs_before = checkpoint["current_epoch"]

    def _read_most_advanced(self, named: Path) -> dict[str, Any]:
        damaged = [path for path in checkpoints_in(named.parent) if progress_of(path) is None]
        while True:
            path = most_advanced(named.parent, damaged)
            if path is None:
                names = ", ".join(p.name for p in damaged) or "none"
                raise ValueError(
                    f"no checkpoint in {named.parent} can be read (damaged: {names}); restore one, or start anew "
                    f"without --c, which moves them aside."
                )
            try:
                checkpoint = read_checkpoint(path)
            except ValueError as error:
                self.print_to_log_file(f"WARNING: {error}")
                damaged.append(path)
                continue
            for broken in damaged:
                self.print_to_log_file(f"WARNING: {broken.name} is damaged and passed over.")
            epoch, step = progress_of(path) or (0, 0)
            self.resumed_from = path.name
            self.print_to_log_file(f"Going on from {path.name}: {epoch} epochs and {step} steps are done.")
            return checkpoint

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass, scaled where half precision needs it."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clips the gradients of all parameters together; returns their norm before that, on the device."""
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)

    def update_weights(self, skip: bool = False) -> None:
        """Optimizer step, or with ``skip`` only what the gradient scaler learns from gradients that are not finite."""
        if self.grad_scaler is not None:
            if not skip:
                self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        elif not skip:
            self.optimizer.step()

    def scale_may_fall(self) -> bool:
        """Whether gradients that overflow are the scale's fault: half precision begins with too large a one."""
        return self.grad_scaler is not None and self.grad_scaler.get_scale() > 1
