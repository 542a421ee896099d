#!/usr/bin/env bash
# Train on this machine: every GPU, or PROCESSES=N ranks (default 2 on CPUs).
#   bash launch/single_node.sh RUN.yaml [key=value ...]
# Ctrl-C and SIGTERM save a checkpoint first.
#
# Settings: PROCESSES, MASTER_PORT (default 29500), and those of launch/supervise.sh.
# Exit code: that of the run, as listed in docs/troubleshooting.md.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/supervise.sh
. launch/supervise.sh

[ "$#" -gt 0 ] || fail "usage: bash launch/single_node.sh RUN.yaml [key=value ...]"

named_by_caller "$@"
set -- "${arguments[@]}"

if [ "$gpus" -gt 0 ]; then processes="${PROCESSES:-$gpus}"; else processes="${PROCESSES:-2}"; fi

# called by supervise
# shellcheck disable=SC2317,SC2329
on_nodes() { bash -c "$1"; }

slots "$processes"
code=0
supervise deepspeed -q "${launcher_slots[@]}" \
  --master_port "${MASTER_PORT:-29500}" launch/pretrain.py "--launch-id=$launch_id" "$@" || code=$?
exit "$code"
