# Sourced by the other scripts: finds or creates the environment, and says what this machine has.
#
# By default that is .venv at the project's root, created once. The project is installed there in
# editable mode, so that `python tools/X.py`, the ranks of a launcher and `relora-ds` all import the
# package beside this script. A .venv that is a link belongs to another checkout: it is used as it is,
# and PYTHONPATH puts this checkout's package before that one's.
#
# Settings, all optional:
#   VENV             `none`: use the `python` and `deepspeed` of the PATH as they are, a container's for
#                    example. Nothing is installed or downloaded; what is missing is named
#   PYTHON           interpreter to create .venv with (3.11 or newer; default python3)
#   TORCH_INDEX_URL  package index for torch alone, for example https://download.pytorch.org/whl/cpu;
#                    another one than .venv was made with has it made again
#   DS_ACCELERATOR   `cpu`: leave GPUs alone
#   OMP_NUM_THREADS  threads of each rank; default 1 on CPUs, an equal share of the cores with GPUs
#
# A run file that a caller names from where it is, is found there; paths in it start at the project's root.
#
# Afterwards `gpus` is the number of GPUs that torch sees, 0 where DS_ACCELERATOR is cpu, and
# `slots N` makes `launcher_slots` the launcher's arguments for N ranks on this machine.
# shellcheck shell=bash

caller_dir="$PWD"
project_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$project_root" || exit

named_by_caller() { # WORD...: sets `arguments` to them, files that lie where the caller is by their whole name
  local word
  arguments=()
  for word in "$@"; do
    if [[ $word != [/-]* && $word != *=* && ! -e $word && -e $caller_dir/$word ]]; then
      word="$caller_dir/$word"
    fi
    arguments+=("$word")
  done
}

environment_error() {
  echo "error: $*" >&2
  exit 2
}

find_environment() {
  if [ "${VENV:-}" = none ]; then
    check_environment
  elif [ -n "${VENV:-}" ]; then
    environment_error "VENV is $VENV; write none, for the environment as it is, or leave it out"
  else
    [ -L "$project_root/.venv" ] || install_environment
    # shellcheck source=/dev/null
    . "$project_root/.venv/bin/activate"
  fi
  export PYTHONPATH="$project_root${PYTHONPATH:+:$PYTHONPATH}"
}

check_environment() {
  local program missing=""
  for program in python deepspeed; do
    command -v "$program" >/dev/null || missing+="${missing:+, }the command $program"
  done
  # modules that a run imports, and the packages that they come from
  if command -v python >/dev/null; then
    missing+="$(python - "$missing" <<'PYTHON'
import sys
from importlib.util import find_spec

modules = {
    "torch": "torch", "deepspeed": "deepspeed", "megatron": "megatron-core", "einops": "einops",
    "filelock": "filelock", "google.protobuf": "protobuf", "hjson": "hjson", "matplotlib": "matplotlib",
    "msgpack": "msgpack", "numpy": "numpy", "packaging": "packaging", "psutil": "psutil",
    "pyarrow": "pyarrow", "pydantic": "pydantic", "rich": "rich", "safetensors": "safetensors",
    "sentencepiece": "sentencepiece", "setuptools": "setuptools", "tqdm": "tqdm", "yaml": "PyYAML",
}


def absent(name):
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


missing = [package for module, package in modules.items() if absent(module)]
if sys.version_info < (3, 11):
    missing.insert(0, f"Python 3.11 or newer (this one is {sys.version.split()[0]})")
print((", " if sys.argv[1] and missing else "") + ", ".join(missing), end="")
PYTHON
    )" || environment_error "VENV=none: $(command -v python) does not run"
  fi
  [ -z "$missing" ] || environment_error \
    "VENV=none: the environment of $(command -v python || echo "this PATH") lacks $missing: provide it," \
    "or leave VENV out to have an environment made in .venv"
}

install_environment() {
  local venv="$project_root/.venv" python="${PYTHON:-python3}" wanted index made_with
  local stamp="$venv/.requirements.sha256" index_file="$venv/.torch_index_url"
  wanted="$(cat requirements.txt launch/constraints.txt pyproject.toml | sha256sum | cut -d ' ' -f 1)"
  made_with="$(cat "$index_file" 2>/dev/null || true)"
  index="${TORCH_INDEX_URL-$made_with}"
  [ "$index" = "$made_with" ] || rm -f "$stamp"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi

  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    environment_error "$("$python" --version 2>&1) is too old: install Python 3.11 or newer, or set PYTHON"
  fi
  echo "creating the environment in .venv (once, a few minutes)"
  # a stamp is written last, so an interrupted installation is repeated; a broken one is rebuilt, and
  # so is one with another build of torch, whose version alone would satisfy pip
  if { [ -f "$index_file" ] && [ "$index" != "$made_with" ]; } ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  echo "$index" >"$index_file"
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt)
  # first and alone: what depends on torch would otherwise pull another build
  "${pip[@]}" ${index:+--index-url "$index"} torch
  "${pip[@]}" -r requirements.txt
  "${pip[@]}" --no-deps --no-build-isolation -e .
  echo "$wanted" >"$stamp"
}

find_devices() {
  local torch seen=""
  gpus=0
  if [ "${DS_ACCELERATOR:-}" != cpu ]; then
    read -r gpus torch <<<"$(python -c 'import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0,
      torch.__version__, torch.version.cuda or torch.version.hip or "none")' 2>/dev/null || echo 0 none)"
    if [ "$gpus" -eq 0 ]; then
      seen="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
      [ "${seen:-0}" -eq 0 ] || no_cuda "$seen" "$torch"
      # DeepSpeed guesses its accelerator, with a warning, where there is no GPU
      export DS_ACCELERATOR=cpu
    fi
  fi
  if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS="$(threads_of_a_rank)"
  fi
  export OMP_NUM_THREADS
}

no_cuda() { # GPUS TORCH: a run on the CPU is not what a machine with GPUs is for
  local driver why remedy
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
  local version="${2%% *}" cuda="${2##* }"
  remedy="update the driver, or take a build that it can run: TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126"
  if [ "$version" = none ]; then
    why="torch cannot be imported"
  elif [ "$cuda" = none ]; then
    why="torch $version is a build for CPUs"
    remedy="set TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 (or the index of another CUDA build)"
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    why="torch $version for CUDA $cuda sees none with CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES'"
    remedy="unset it; without it, $remedy"
  else
    why="torch $version for CUDA $cuda sees none: that driver is too old for it"
  fi
  environment_error "nvidia-smi lists $1 GPUs (driver ${driver:-unknown}), but $why; $remedy." \
    "DS_ACCELERATOR=cpu trains on the CPU"
}

threads_of_a_rank() {
  # On CPUs several ranks with a thread per core each get in each other's way. With GPUs the host has
  # work of its own: offloaded updates, 8-bit codes, hashes.
  local ranks="${SLURM_NTASKS_PER_NODE:-${PROCESSES:-$gpus}}" threads=1
  [ "$gpus" -eq 0 ] || threads=$(($(nproc) / (ranks > 0 ? ranks : gpus)))
  echo $((threads > 0 ? threads : 1))
}

slots() { # N: the launcher forgets CUDA_VISIBLE_DEVICES when it is told a number
  if [ "$gpus" -eq 0 ] || [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
    launcher_slots=(--num_gpus "$1")
  elif [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    # shellcheck disable=SC2034
    launcher_slots=(--include "localhost:$(cut -d , -f "1-$1" <<<"$CUDA_VISIBLE_DEVICES")")
  else
    environment_error "CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES, but the launcher takes numbers:" \
      "write those of nvidia-smi -L, as in 0,1"
  fi
}

find_environment
find_devices
