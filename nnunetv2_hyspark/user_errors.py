"""A user's mistake under nnU-Net's own commands is answered by its sentence, without the traceback."""

from __future__ import annotations

import dis
import os
import sys
from types import TracebackType

VARIABLE = "nnUNet_hyspark_traceback"
_PACKAGE = __name__.partition(".")[0]


def is_user_error(error: BaseException) -> bool:
    """Whether a ``raise`` of this package raised this ValueError, OSError or RuntimeError: these say what to do.

    What comes from elsewhere, or is of another type, is a defect or a surprise and keeps its traceback.
    """
    last = error.__traceback__
    if last is None or not isinstance(error, (ValueError, OSError, RuntimeError)):
        return False
    if isinstance(error, (NotImplementedError, RecursionError)):  # RuntimeErrors, but never the user's
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code.co_code
    # a module run with python -m has the name __main__, but keeps its package
    module = last.tb_frame.f_globals.get("__package__") or last.tb_frame.f_globals.get("__name__") or ""
    is_ours = module.partition(".")[0] == _PACKAGE
    return is_ours and code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def show_user_errors_as_sentences() -> None:
    """From now on an uncaught error of the user's is printed as one line on stderr; the exit status stays 1.

    Everything else goes to the hook that was there before. ``nnUNet_hyspark_traceback=1`` shows every traceback.
    """
    before = sys.excepthook
    if getattr(before, "shows_user_errors", False):
        return

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.environ.get(VARIABLE, "0") not in ("", "0") or not is_user_error(error):
            before(kind, error, trace)
            return
        message = " ".join(str(error).split())
        print(f"nnunetv2_hyspark: error: {message} ({VARIABLE}=1 shows where it was raised)", file=sys.stderr)

    show.shows_user_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show
