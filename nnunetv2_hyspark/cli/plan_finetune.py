"""`hyspark plan-finetune`: plans for a labelled data set that match a pre-trained checkpoint."""

from __future__ import annotations

import argparse

EPILOG = """\
The plans hold one configuration, 3d_fullres, with the checkpoint's network, its spacing, normalization and patch size,
and the checkpoint itself (path and SHA-256): HySparKFinetuneTrainer loads it when a new run starts. An explicit
-pretrained_weights wins. The data set needs a fingerprint, from nnUNetv2_extract_fingerprint or any planning.

example:
  nnUNetv2_extract_fingerprint -d 10
  hyspark plan-finetune -d 10 --from .../HySparKPretrainTrainer__.../fold_all/checkpoint_final.pth
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `hyspark plan-finetune`."""
    parser = subparsers.add_parser(
        "plan-finetune",
        help="plan a labelled data set to match a pre-trained checkpoint",
        description="Writes a plans file for a labelled data set that matches a pre-trained checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dataset", required=True, metavar="TARGET", help="id or name of the labelled data set")
    parser.add_argument("--from", dest="checkpoint", required=True, metavar="CHECKPOINT", help="a HySparK .pth file")
    parser.add_argument(
        "--spacing", nargs="+", default=["pretrained"], metavar="S",
        help="pretrained (default), default (what nnU-Net would take for the target), or three numbers in mm, in the "
        "order in which nnU-Net reads axes, as for its -overwrite_target_spacing",
    )
    parser.add_argument(
        "--normalization", choices=("pretrained", "default"), default="pretrained",
        help="as in pre-training (default), or nnU-Net's choice for the target",
    )
    parser.add_argument("-p", "--plans-name", default="nnUNetHySparKFinetunePlans", metavar="NAME",
                        help="of the plans (default: nnUNetHySparKFinetunePlans)")
    parser.add_argument("-gpu_memory_target", type=float, default=8, metavar="GB",
                        help="memory of the GPU for fine-tuning (default: 8)")
    parser.set_defaults(run=run)


def _spacing(words: list[str]) -> tuple[str, list[float] | None]:
    """The named choice, and numbers if they were given instead."""
    if words in (["pretrained"], ["default"]):
        return words[0], None
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 < number < 1000 for number in numbers):
        raise ValueError(
            f"--spacing is {' '.join(words)}; expected pretrained, default, or three positive numbers in mm, such as "
            f"1.5 1.5 1.5."
        )
    return "default", numbers


def run(options: argparse.Namespace) -> None:
    """Write the plans and print the next commands."""
    spacing, numbers = _spacing(options.spacing)

    import contextlib
    import io

    from nnunetv2_hyspark.planners.hyspark_checkpoint_planner import CONFIGURATION, check_target, plan_finetuning

    dataset, name = check_target(options.dataset, options.plans_name)
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints the whole plans
        planner = plan_finetuning(
            dataset, options.checkpoint, name, options.gpu_memory_target, spacing, numbers, options.normalization
        )
    plan = planner.plans["configurations"][CONFIGURATION]
    print(f"Plans {name} for {dataset}, matching {planner.source.file.path}")
    print(f"  spacing        {' x '.join(f'{s:g}' for s in plan['spacing'])} mm")
    print(f"  normalization  {', '.join(plan['normalization_schemes'])}")
    print(
        f"  patches        {'x'.join(map(str, plan['patch_size']))} voxels, {plan['batch_size']} per batch, about "
        f"{plan['hyspark']['memory']['finetuning_gb']:.1f} of {options.gpu_memory_target:g} GB"
    )
    for note in planner.notes:
        print(f"NOTE: {note}.")
    number = dataset.removeprefix("Dataset").partition("_")[0].lstrip("0") or "0"
    print(
        f"\nNext:\n  nnUNetv2_preprocess -d {number} -plans_name {name} -c {CONFIGURATION}\n"
        f"  nnUNetv2_train {number} {CONFIGURATION} 0 -tr HySparKFinetuneTrainer -p {name}"
    )
