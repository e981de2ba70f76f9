"""Entry point of the `hyspark` command."""
from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import nnunetv2_hyspark

# Modules of this folder, in the order `hyspark --help` shows them; one that does not exist is not shown.
_MODULES = (
    "demo",
    "doctor",
    "prepare",
    "info",
    "plan_finetune",
    "reconstruct",
    "import_weights",
    "export_weights",
    "benchmark",
    "path",
)


def command_name(module_name: str) -> str:
    """`plan_finetune` is `hyspark plan-finetune`; `import_weights` is `hyspark import`, a word no module can have."""
    return module_name.removesuffix("_weights").replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0 fine, 1 something is wrong, 2 wrong use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser(arguments).parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("hyspark: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hyspark doctor | head`
        sys.stderr.close()
        return 1
    except (NotImplementedError, RecursionError):  # RuntimeErrors, but never the user's
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug:
            raise
        print(f"hyspark: error: {_one_sentence(error)}", file=sys.stderr)
        return 2


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the one subcommand that was asked for, or of all of them if that is not clear."""
    parser = argparse.ArgumentParser(
        prog="hyspark", description="HySparK pre-training for nnU-Net v2: what nnU-Net's own commands do not do."
    )
    parser.add_argument("--version", action="version", version=f"hyspark {nnunetv2_hyspark.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    modules = {command_name(name): f"{__package__}.{name}" for name in _MODULES}
    modules = {command: module for command, module in modules.items() if find_spec(module) is not None}
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    for module in [modules[command]] if command in modules else modules.values():
        import_module(module).add_parser(subparsers)
    for subparser in subparsers.choices.values():
        if "--debug" not in subparser.format_usage():
            subparser.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
            )
    return parser


def _one_sentence(error: Exception) -> str:
    """The error's message in one line; one that did not come from our own code says where it came from."""
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = " ".join(str(error).split()) or type(error).__name__
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals.get("__name__", "").startswith(nnunetv2_hyspark.__name__):
        message += f" (raised in {frame.f_code.co_filename}, line {line}; --debug shows the traceback)"
    return message


if __name__ == "__main__":
    sys.exit(main())
