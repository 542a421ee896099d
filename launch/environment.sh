# Sourced by the other scripts: creates .venv at the project's root once and activates it.
#
# The project itself is installed there in editable mode, so that `python tools/X.py`, the ranks of a
# launcher and `relora-ds` all import the package beside this script. A .venv that is a link belongs to
# another checkout: it is used as it is, and PYTHONPATH puts this checkout's package before that one's.
#
# Settings, all optional:
#   PYTHON           interpreter to create the environment with (3.11 or newer; default python3)
#   TORCH_INDEX_URL  package index for torch alone, for example https://download.pytorch.org/whl/cpu
# shellcheck shell=bash

project_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$project_root" || exit

venv="$project_root/.venv"
stamp="$venv/.requirements.sha256"
wanted="$(cat requirements.txt pyproject.toml | sha256sum | cut -d ' ' -f 1)"

if [ ! -L "$venv" ] && { [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; }; then
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version 2>&1) is too old: install Python 3.11 or newer, or set PYTHON" >&2
    exit 2
  fi
  echo "creating the environment in .venv (once, a few minutes)"
  # a stamp is written last, so an interrupted installation is repeated; a broken one is rebuilt
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  torch_pin="$(grep -E '^torch==' requirements.txt)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch_pin"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  echo "$wanted" >"$stamp"
fi

# shellcheck source=/dev/null
. "$venv/bin/activate"
export PYTHONPATH="$project_root${PYTHONPATH:+:$PYTHONPATH}"

# One thread per rank: several ranks with a thread per core each get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# DeepSpeed guesses its accelerator, with a warning, where there is no GPU.
if [ -z "${DS_ACCELERATOR:-}" ] &&
  ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  export DS_ACCELERATOR=cpu
fi
