#!/usr/bin/env bash
# The whole CPU test suite: style, types, architecture, unit tests, tests on several ranks.
#   bash launch/test.sh [pytest arguments]      with arguments, pytest alone runs with them
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Kernels for GPUs are interpreted and compiled here. CPU builds of torch lack Triton (190 MB); without it
# the tests of kernels are skipped, as in an environment that is not ours.
if [ "${VENV:-}" != none ] && ! python -c 'import triton' 2>/dev/null; then
  python -m pip install --quiet --disable-pip-version-check triton==3.9.0
fi

if [ "$#" -gt 0 ]; then exec python -m pytest "$@"; fi

step() {
  echo "== $*"
  "$@"
}
step ruff check .
step ruff format --check .
step lint-imports --no-cache
step pyright
step python tools/check_limits.py
step shellcheck launch/*.sh launch/*.sbatch tools/*.sh .ci/run
step python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not multihost and not distributed"
# two files at a time: ranks wait for each other and for their launchers
step python -m pytest -q -n 2 --dist loadfile -m "distributed and not slow and not gpu and not multihost" --durations 5
