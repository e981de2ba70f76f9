#!/usr/bin/env bash
# Makes the virtual environment named by the first argument, unless it is there already.
# $PYTHON chooses the interpreter, else python3.
set -euo pipefail

folder=$1
python=${PYTHON:-python3}

if ! command -v "$python" >/dev/null; then
    echo "There is no $python here: install Python 3.10 to 3.13, or set PYTHON to where it is." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "$python is $("$python" --version 2>&1), but Python 3.10 to 3.13 is needed: set PYTHON to one, such as PYTHON=python3.11." >&2
    exit 1
fi
if [ ! -x "$folder/bin/python" ]; then
    "$python" -m venv "$folder"
fi
