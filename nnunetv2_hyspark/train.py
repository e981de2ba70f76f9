"""Training by several processes on one or many machines: ``torchrun ... -m nnunetv2_hyspark.train``.

Takes the arguments of nnUNetv2_train except ``-num_gpus``: torchrun starts the processes, and tells each its rank and
its GPU. Without torchrun it trains with one process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch import distributed as dist

from .training.checkpoints import checkpoints_in
from .training.distributed import process_device, process_group
from .user_errors import show_user_errors_as_sentences

TIMEOUT_MINUTES = 30


def parser() -> argparse.ArgumentParser:
    """nnU-Net's arguments."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m nnunetv2_hyspark.train",
        description="Trains like nnUNetv2_train, with the processes that torchrun started.",
    )
    parser.add_argument("dataset_name_or_id", help="data set name or number")
    parser.add_argument("configuration", help="configuration, such as 3d_fullres")
    parser.add_argument("fold", help="0 to 4, or all")
    parser.add_argument("-tr", default="HySparKPretrainTrainer", help="trainer (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-pretrained_weights", default=None, help="checkpoint to fine-tune")
    parser.add_argument("--npz", action="store_true", help="save probabilities of the final validation")
    parser.add_argument("--c", action="store_true", help="go on with the run in the results folder")
    parser.add_argument("--val", action="store_true", help="only validate; the training must be done")
    parser.add_argument("--val_best", action="store_true", help="validate the best checkpoint instead of the final one")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    return parser


def check(options: argparse.Namespace) -> int | str:
    """Returns the fold. Raises ValueError for arguments that contradict each other, and for a fold that is none."""
    if options.c and options.val:
        raise ValueError("--c and --val are both given; --c goes on training, --val only validates, so give one.")
    if options.c and options.pretrained_weights is not None:
        raise ValueError(
            "--c and -pretrained_weights are both given; a run that goes on has its weights already, so give one."
        )
    if options.val_best and options.disable_checkpointing:
        raise ValueError("--val_best needs checkpoints, but --disable_checkpointing is given; leave one out.")
    if options.fold == "all":
        return "all"
    if not options.fold.isdigit():
        raise ValueError(f"fold is {options.fold!r}; expected a whole number from 0 on, or all.")
    return int(options.fold)


def train(options: argparse.Namespace) -> None:
    """Trains and validates in this process, as one of those that torchrun started; see :func:`parser`."""
    fold = check(options)
    device = process_device(torch.device(options.device))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("no GPU is visible to torch; give -device cpu, or run where there is one.")
        if device.index >= torch.cuda.device_count():
            raise RuntimeError(
                f"this is process {device.index} of its machine, which has {torch.cuda.device_count()} GPU(s); start "
                f"at most one process per GPU (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(device)
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("RANK", "0")) > 0:
        os.environ["nnUNet_wandb_enabled"] = "0"  # one run of Weights & Biases, not one per process
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with process_group(device, timedelta(minutes=TIMEOUT_MINUTES)) if launched else nullcontext():
        train_and_validate(options, fold, device)
        if dist.is_initialized():
            dist.barrier()


def train_and_validate(options: argparse.Namespace, fold: int | str, device: torch.device) -> None:
    """What nnUNetv2_train does with these arguments in one process, on this device."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and not options.val
    trainer = get_trainer_from_args(
        options.dataset_name_or_id, options.configuration, fold, options.tr, options.p, options.c or restarted, device
    )
    trainer.disable_checkpointing = options.disable_checkpointing
    # processes that torchrun started again go on where they were, if they had come to write a checkpoint
    goes_on = options.c or restarted and bool(checkpoints_in(trainer.output_folder))
    weights = None if goes_on else options.pretrained_weights
    maybe_load_checkpoint(trainer, goes_on, options.val, weights)
    if not options.val:
        trainer.run_training()
    if options.val_best:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_best.pth"))
    trainer.perform_actual_validation(options.npz)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with one sentence for a user's mistake, with status 2 for wrong arguments, else 1."""
    arguments = parser()
    options = arguments.parse_args(argv)
    try:
        check(options)
    except ValueError as error:
        arguments.error(str(error))
    show_user_errors_as_sentences()
    train(options)


if __name__ == "__main__":
    main()
