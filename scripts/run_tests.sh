#!/usr/bin/env bash
# Installs the checkout with its test tools into .venv-test, then runs ruff, mypy and every test.
# Arguments are passed on to pytest; $PYTHON chooses the interpreter, $HYSPARK_TEST_VENV another folder than .venv-test.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${HYSPARK_TEST_VENV:-.venv-test}

./scripts/make_venv.sh "$venv"
"$venv/bin/python" -m pip install --quiet --editable ".[test]"

# One process computes most of the time; the workers that nnU-Net starts beside it get one thread each from nnU-Net.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$venv/bin/python" -c 'import os; print(min(os.cpu_count() or 1, 8))')}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that spin while they wait slow everything beside them
export nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-2}

"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
"$venv/bin/python" -m pytest "$@"
