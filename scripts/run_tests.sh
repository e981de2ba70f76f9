#!/usr/bin/env bash
# Installs the checkout with its test tools into .venv-test, then runs ruff, mypy and every test.
# Arguments are passed on to pytest; $PYTHON chooses the interpreter, $HYSPARK_TEST_VENV another folder than .venv-test,
# $HYSPARK_TEST_PROCESSES how many files are tested at a time (default: the processors, at most 4).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${HYSPARK_TEST_VENV:-.venv-test}

./scripts/make_venv.sh "$venv"
"$venv/bin/python" -m pip install --quiet --editable ".[test]"

processors=$("$venv/bin/python" -c 'import os; print(os.cpu_count() or 1)')
processes=${HYSPARK_TEST_PROCESSES:-$((processors < 4 ? processors : 4))}
threads=$((processors / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that spin while they wait slow everything beside them
export nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-2}

"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m mypy
"$venv/bin/python" -m pytest --numprocesses "$processes" --dist loadfile --no-loadscope-reorder "$@"
