#!/usr/bin/env bash
# Prove this machine's GPU: checks, then figures. Uses the machine's own Python and its torch; nothing
# is installed but the wheels in .whl, if tools/gpu_wheels.sh has fetched any, into a folder beside them.
#   bash launch/gpu_report.sh [checks|speed|all] [arguments of tools/gpu_report.py]
#
# Settings: PYTHON, the interpreter that has torch (default python3).
# Exit code: 0, 1 if a case failed, 2 if something is missing. See docs/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

verb=all
case "${1:-}" in checks | speed | all) verb="$1" && shift ;; esac
python="${PYTHON:-python3}"

"$python" -c 'import torch' 2>/dev/null || {
  echo "error: $(command -v "$python" || echo "$python") has no torch: set PYTHON to an interpreter that has it" >&2
  exit 2
}

wheels=(.whl/*.whl)
if [ -e "${wheels[0]}" ]; then
  wanted="$(printf '%s\n' "${wheels[@]}" | sha256sum | cut -d ' ' -f 1)"
  if [ "$(cat .whl/site/.wheels 2>/dev/null || true)" != "$wanted" ]; then
    rm -rf .whl/site
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
      --disable-pip-version-check --target .whl/site "${wheels[@]}"
    echo "$wanted" >.whl/site/.wheels
  fi
  export PYTHONPATH="$PWD/.whl/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}"

# found, not imported: that takes half a minute on a cold disk, and is done once anyway
missing="$("$python" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' \
  deepspeed megatron pydantic hjson sentencepiece pyarrow safetensors rich matplotlib)"
[ -z "$missing" ] || {
  echo "error: the libraries $missing are missing: bash tools/gpu_wheels.sh fetches what images with torch lack" >&2
  exit 2
}
exec "$python" tools/gpu_report.py "$verb" "$@"
