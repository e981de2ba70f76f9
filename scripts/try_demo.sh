#!/usr/bin/env bash
# From a fresh checkout to the demo: makes the virtual environment .venv, installs the package, runs `hyspark demo`.
# Arguments are passed on to `hyspark demo`; $PYTHON chooses the interpreter, else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

"$root/scripts/make_venv.sh" "$venv"
"$venv/bin/python" -m pip install "$root"
exec "$venv/bin/hyspark" demo "$@"
