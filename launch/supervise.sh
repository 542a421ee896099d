# Sourced by single_node.sh and multi_node.sh: runs a launcher that stops when asked and cleans up.
# shellcheck shell=bash
#
# The deepspeed command must not be signalled: on one machine it forgets its ranks, with a hostfile it
# ends every DeepSpeed job that the user has on those machines, and in both cases the ranks' exit code
# is lost. So it runs in a session of its own, out of reach of Ctrl-C, and signals go to the ranks.
#
#   TERM, INT, USR1   every rank saves a checkpoint at its next step and exits 75; another signal, 5 s
#                     later or more, ends them at once
#   STOP_GRACE_S      seconds for that, default 300; afterwards the ranks are killed
#   DRAIN_S           seconds for all ranks to end once one of them has, default 60
#
# Who sources this defines `on_nodes COMMAND`, which runs a shell command wherever ranks run, within
# bounded time, and passes "--launch-id=$launch_id" to launch/pretrain.py.

launch_id="$(hostname)-$$-$(date +%s)"
state_dir="$(mktemp -d)" # readable by the user alone
trap 'rm -rf "$state_dir"' EXIT
: >"$state_dir/exits" # one exit code per node, where a launcher reports them

# Anchored: neither the launcher nor the shell that carries the pattern to a node may match.
ranks="^[^ ]*python[^ ]* -u launch/pretrain[.]py .*--launch-id=$launch_id( |\$)"
processes="^[^ ]*python[^ ]* -u .*--launch-id=$launch_id( |\$)"

say() { echo "$(basename "$0"): $*" >&2; }

fail() { # MESSAGE: a mistake of the user
  say "error: $*"
  exit 2
}

stop_ranks() {
  deadline=$((SECONDS + ${STOP_GRACE_S:-300}))
  say "stopping: the ranks save a checkpoint after the current step"
  if [ -z "$(on_nodes "pkill -TERM -e -f '$ranks'" 2>/dev/null)" ]; then
    say "no rank runs yet: ending the launch"
    end_launch
  fi
}

end_launch() { # nothing of this launch survives, here or on a node that can be reached
  kill -KILL -- "-$launcher" 2>/dev/null
  on_nodes "pkill -KILL -f '$processes'" >/dev/null 2>&1
  true
}

root_cause() { # CODE...: of the ranks' exit codes the one that says most
  local known code worst=0
  for known in 2 3 4 5 6 75 7; do
    for code in "$@"; do if [ "$code" = "$known" ]; then echo "$known" && return; fi; done
  done
  for code in "$@"; do if [ "$code" -gt "$worst" ]; then worst="$code"; fi; done
  echo "$worst"
}

supervise() { # COMMAND...: returns the ranks' exit code
  local code codes
  deadline=""
  mkfifo "$state_dir/stderr"
  sed -un -e p -e "/launch $launch_id: completed\$/w $state_dir/completed" \
    -e "s/^pdsh@.*exited with exit code \([0-9]*\)\$/\1/w $state_dir/exits" \
    <"$state_dir/stderr" >&2 &
  reader=$!
  # the command dies with this script, even if that is killed
  setsid setpriv --pdeathsig KILL -- "$@" 2>"$state_dir/stderr" &
  launcher=$!
  trap stop_ranks TERM INT USR1

  while kill -0 "$launcher" 2>/dev/null; do
    sleep 1 &
    wait $! || true # returns early on a signal
    if [ -z "$deadline" ] && [ -s "$state_dir/exits" ]; then
      deadline=$((SECONDS + ${DRAIN_S:-60}))
    fi
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      say "some ranks did not end in time: killing them"
      end_launch
    fi
  done
  code=0
  wait "$launcher" || code=$?
  trap '' TERM INT USR1

  kill -KILL -- "-$launcher" 2>/dev/null || true # what the launcher left: with it goes the ranks' output
  wait "$reader" || true
  if [ -n "$(on_nodes "pgrep -f '$ranks'" 2>/dev/null)" ]; then
    say "the launcher left its ranks alone: waiting for them to save a checkpoint"
    deadline=$((SECONDS + ${STOP_GRACE_S:-300}))
    while [ "$SECONDS" -lt "$deadline" ] && [ -n "$(on_nodes "pgrep -f '$ranks'" 2>/dev/null)" ]; do
      sleep 2
    done
  fi
  end_launch
  if [ "$code" -eq 0 ] && [ ! -s "$state_dir/completed" ]; then
    say "the launcher ended before the run did" # deepspeed returns 0 when what it started is killed
    code=1
  fi
  mapfile -t codes <"$state_dir/exits"
  return "$(root_cause "${codes[@]}" "$code")"
}
