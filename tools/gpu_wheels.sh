#!/usr/bin/env bash
# Fetch the wheels that a GPU machine without a network lacks beside torch, into .whl (under 10 MB).
# Copy this directory there, .whl included, and run launch/gpu_report.sh.
#   bash tools/gpu_wheels.sh [PACKAGE[==VERSION] ...]      more packages, without what they depend on
#
# Settings: PYTHON_VERSION of that machine (default 3.12), PYTHON here (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version="${PYTHON_VERSION:-3.12}"
python="${PYTHON:-python3}"
mkdir -p .whl
rm -f .whl/*.whl

pip=("$python" -m pip --quiet --disable-pip-version-check)
platforms=()
for platform in manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
  platforms+=(--platform "$platform")
done
# what images with torch usually lack; typing-extensions because pydantic wants a new one, py-cpuinfo
# because DeepSpeed compiles its Adam for hosts with it
wanted=(pydantic annotated-types typing-inspection typing-extensions hjson msgpack einops py-cpuinfo megatron-core)

constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
# the markers speak of the interpreter that pip runs in, not of the one that is fetched for
"$python" - "$version" >"$constraints" <<'PYTHON'
import sys

version = tuple(int(part) for part in sys.argv[1].split("."))
for line in open("launch/constraints.txt"):
    pin, _, marker = line.partition(";")
    old = '<' in marker
    if not marker or old == (version < (3, 12)):
        print(pin.strip())
PYTHON
deepspeed="$(grep '^deepspeed==' "$constraints")"

# pydantic names the exact version of its core
"${pip[@]}" download --no-deps --only-binary=:all: --python-version "$version" "${platforms[@]}" \
  -c "$constraints" -d .whl "${wanted[@]}" "$@"
core="$("$python" - .whl/pydantic-*.whl <<'PYTHON'
import re, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    print(re.search(r"Requires-Dist: (pydantic[-_]core==[\w.]+)", wheel.read(name).decode())[1])
PYTHON
)"
"${pip[@]}" download --no-deps --only-binary=:all: --python-version "$version" "${platforms[@]}" -d .whl "$core"
# DeepSpeed comes as source only; nothing is compiled
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation -w .whl "$deepspeed"

bytes="$(cat .whl/*.whl | wc -c)"
echo "$(find .whl -type f -name '*.whl' | wc -l) wheels for Python $version in .whl, $((bytes / 1000)) kB"
[ "$bytes" -lt 10000000 ] || {
  echo "error: that is more than the 10 MB that are meant to be carried" >&2
  exit 1
}
