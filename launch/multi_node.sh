#!/usr/bin/env bash
# Train on the nodes of a hostfile over pdsh and ssh, from one of them or from outside.
#   bash launch/multi_node.sh HOSTFILE RUN.yaml [key=value ...]
# Ctrl-C and SIGTERM save a checkpoint first.
#
# HOSTFILE has one line per node, `name slots=N` with N ranks (GPUs) each. Every node needs ssh without
# a password, and this directory, its .venv, the data and the output directory at the same paths.
# Where every line ends with `island=NAME`, nodes of one name, which follow each other, are an island:
# the run gets as many parallel.islands as there are names.
#
# Settings: MASTER_ADDR (default: the first node's first address), MASTER_PORT (default 29500), FORWARD
# (names of further variables to forward), and those of launch/supervise.sh.
# Exit code: that of the run, as listed in docs/troubleshooting.md: 7 if a node is lost, 75 after a
# checkpoint on request. A lost node is noticed within train.timeout_minutes.
#
# Variables reach the nodes on command lines that every user there can read. So only those of the
# list below are forwarded, and never a credential: put keys where their libraries look for them on
# the nodes (~/.netrc for wandb, `hf auth login` for Hugging Face), or use a shared home directory.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/supervise.sh
. launch/supervise.sh
# shellcheck source=launch/islands.sh
. launch/islands.sh

forwarded='^(DS_ACCELERATOR|OMP_NUM_THREADS|PATH|LD_LIBRARY_PATH|TORCH_EXTENSIONS_DIR|TRITON_CACHE_DIR|HF_HOME|HF_HUB_OFFLINE|WANDB_MODE|WANDB_DIR|(GLOO|NCCL|TORCH_NCCL|FI)_[A-Z0-9_]+)$'
secret='(KEY|TOKEN|SECRET|PASSW|CREDENTIAL)'
# an unreachable node ends its connection within 10 s, or 60 s once connected
ssh_options='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4'

[ "$#" -ge 2 ] || fail "usage: bash launch/multi_node.sh HOSTFILE RUN.yaml [key=value ...]"
named_by_caller "$@"
set -- "${arguments[@]}"
hostfile="$1"
shift
[ -f "$hostfile" ] || fail "there is no hostfile $hostfile"
awk '!/^[[:space:]]*(#|$)/ && !/^[[:space:]]*[A-Za-z0-9._-]+[[:space:]]+slots=[1-9][0-9]*([[:space:]]+island=[A-Za-z0-9._-]+)?[[:space:]]*(#.*)?$/ \
  { print FILENAME ":" FNR ": not `name slots=N`: " $0; bad = 1 } END { exit bad }' "$hostfile" >&2 ||
  fail "the hostfile must have one line \`name slots=N\` per node; users and ports go into ~/.ssh/config"
nodes="$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile" | paste -sd ,)"
[ -n "$nodes" ] || fail "$hostfile: names no node"

islands="$(count_islands "$hostfile")" || fail "the marks of islands in $hostfile do not fit"
if [ "$islands" -gt 0 ]; then
  plain="$state_dir/hostfile" # as the launcher knows it
  sed 's/[[:space:]]island=[^[:space:]]*//' "$hostfile" >"$plain"
  hostfile="$plain"
  set -- "$@" "parallel.islands=$islands"
fi

export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="$ssh_options"

# called by supervise
on_nodes() { timeout 60 pdsh -S -t 10 -u 40 -w "$nodes" "$1"; }

quote_arguments() { # the launcher joins arguments for a remote shell, and quotes only those with blanks
  local argument
  arguments=()
  for argument in "$@"; do
    case "$argument" in
      *[\"\'\$\`\\%]* | *$'\n'*) fail "cannot carry $argument to the nodes: write it into the run file" ;;
      *' '*) arguments+=("$argument") ;;
      *) arguments+=("'$argument'") ;;
    esac
  done
}

write_environment() { # FILE: what every rank gets, in the form that the launcher reads
  local name
  : >"$1"
  for name in $(compgen -e); do
    if [[ $name =~ $secret ]]; then
      case " ${FORWARD:-} " in *" $name "*) fail "FORWARD: $name looks like a credential; see the top of $0" ;; esac
      unset "$name" # the launcher forwards some names on its own account
    elif [[ $name =~ $forwarded || " ${FORWARD:-} " == *" $name "* ]]; then
      [[ ${!name} =~ ^[A-Za-z0-9_@+=:,./^\ -]*$ ]] ||
        fail "$name=${!name}: only letters, digits, blanks and _@+=:,./^- reach the nodes unchanged"
      echo "$name=${!name}" >>"$1"
    fi
  done
}

quote_arguments "$@"
write_environment "$state_dir/environment"
# The launcher would read ~/.deepspeed_env and ./.deepspeed_env; an absolute name replaces both.
export DS_ENV_FILE="$state_dir/environment"

command -v pdsh >/dev/null || fail "pdsh is not installed: apt-get install pdsh"
# pdsh dies with the launcher and ssh with pdsh: the ranks notice that nobody listens to them.
mkdir "$state_dir/bin"
for program in pdsh ssh; do
  printf '#!/bin/sh\nexec setpriv --pdeathsig TERM -- %s "$@"\n' "$(command -v "$program")" \
    >"$state_dir/bin/$program"
  chmod +x "$state_dir/bin/$program"
done

python="$(command -v python)"
on_nodes "test -x $python -a -f $PWD/launch/pretrain.py" >&2 ||
  fail "not every node is reachable by ssh and has $python and $PWD/launch"
if [ -z "${MASTER_ADDR:-}" ]; then
  # shellcheck disable=SC2086
  MASTER_ADDR="$(timeout 30 ssh $ssh_options "${nodes%%,*}" hostname -I | cut -d ' ' -f 1)" ||
    fail "${nodes%%,*} does not tell its address: set MASTER_ADDR"
fi

code=0
PATH="$state_dir/bin:$PATH" supervise deepspeed -q --hostfile "$hostfile" --force_multi --launcher pdsh \
  --no_ssh_check --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
  launch/pretrain.py "--launch-id=$launch_id" "${arguments[@]}" || code=$?
exit "$code"
