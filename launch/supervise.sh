# Sourced by the scripts that train: runs a launcher that stops when asked and cleans up.
# shellcheck shell=bash
#
# The deepspeed command must not be signalled: on one machine it forgets its ranks, with a hostfile it
# ends every DeepSpeed job that the user has on those machines, and in both cases the ranks' exit code
# is lost. So it runs in a session of its own, out of reach of Ctrl-C, and signals go to the ranks.
#
#   TERM, INT, HUP, USR1   every rank saves a checkpoint at its next step and exits 75; another signal, 5 s
#                     later or more, ends them at once
#   STOP_GRACE_S      seconds for that, default 300; afterwards the ranks are killed
#   DRAIN_S           seconds for all ranks to end once one of them has, default 60
#
# Who sources this defines `on_nodes COMMAND`, which runs a shell command wherever ranks run, within
# bounded time, and passes "--launch-id=$launch_id" to launch/pretrain.py.

launch_id="$(hostname)-$$-$(date +%s)"
state_dir="$(mktemp -d)" # readable by the user alone
readonly launch_id state_dir # whom signals go to is told by the id
trap 'rm -rf "$state_dir"' EXIT
: >"$state_dir/exits" # one exit code per node, where a launcher reports them
: >"$state_dir/cause" # what the ranks say of the first that failed
asked=""

say() { echo "$(basename "$0"): $*" >&2; }

fail() { # MESSAGE: a mistake of the user
  say "error: $*"
  exit 2
}

# Whom a signal goes to is put together where it is sent, from the id of this launch alone: a name that
# a script and this file both use must never decide it. The interpreter may lie below a folder whose
# name has blanks. Neither the launcher nor the shell that carries the pattern to a node may match:
# hence the brackets.
on_launch() { # COMMAND: a pgrep or pkill, for all processes of this launch wherever ranks run
  on_nodes "$1 -f '(^|/)python[^ /]* -u .*--launch-id=$launch_id( |\$)'"
}

on_ranks() { # COMMAND: the like, for ranks alone
  on_nodes "$1 -f '(^|/)python[^ /]* -u launch/pretrain[.]py .*--launch-id=$launch_id( |\$)'"
}

started_at() { # PID: when it was started, which tells it from a later process of this number
  sed -n 's/.*) //p' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20 || true
}

launcher_runs() {
  local now
  now="$(started_at "$launcher")"
  [ -n "$now" ] && [ "$now" = "$launcher_started" ]
}

stop_ranks() {
  asked=yes
  deadline=$((SECONDS + ${STOP_GRACE_S:-300}))
  say "stopping: the ranks save a checkpoint after the current step"
  if [ -z "$(on_ranks "pkill -TERM -e" 2>/dev/null)" ]; then
    say "no rank runs yet: ending the launch"
    asked=early
    end_launch
  fi
}

end_session() { # the launcher, and what it left in its session
  if launcher_runs; then kill -KILL "$launcher" 2>/dev/null || true; fi # it may lead no session yet
  # its number is kept while anything is left of its session, and may be a stranger's afterwards
  if launcher_runs || [ -z "$(started_at "$launcher")" ]; then
    pkill -KILL -g "$launcher" -s "$launcher" || true
  fi
}

end_launch() { # nothing of this launch survives, here or on a node that can be reached
  end_session
  on_launch "pkill -KILL" >/dev/null 2>&1 || true # there may be none
}

root_cause() { # CODE...: of the ranks' exit codes the one that says most
  local known code worst=0
  for known in 2 3 4 5 6 75 7; do
    for code in "$@"; do if [ "$code" = "$known" ]; then echo "$known" && return; fi; done
  done
  for code in "$@"; do if [ "$code" -gt "$worst" ]; then worst="$code"; fi; done
  echo "$worst"
}

code_of_table() { # CODE: what it means where a launcher or a signal has changed it
  case "$1" in
    134 | 250) echo 7 ;; # aborted: NCCL does that to a rank whose peer is lost, gloo at times too
    *) echo "$1" ;;
  esac
}

code_of_cause() { # CODE: for one that says little, that of the rank which failed first, if a rank told it
  local stated=""
  case "$1" in 1 | 7) stated="$(sed -n '1s/.*(exit code \([1-9][0-9]*\))$/\1/p' "$state_dir/cause")" ;; esac
  echo "${stated:-$1}"
}

explain() { # CODE: the last line of a launch that failed
  local cause
  cause="$(head -n 1 "$state_dir/cause")"
  case "$1" in
    0) return 0 ;;
    75) cause="asked to stop; requeue to continue from the last checkpoint" ;;
    137 | 247) cause="a rank was killed (by hand, or by the system if memory ran out)${cause:+; $cause}" ;;
    *) cause="${cause:-see logs/rank_*.log in the output directory}" ;;
  esac
  say "exit code $1: $cause"
}

supervise() { # COMMAND...: returns the ranks' exit code
  local code codes
  deadline=""
  mkfifo "$state_dir/stderr"
  sed -un -e p -e "/launch $launch_id: completed\$/w $state_dir/completed" \
    -e "/ROOT CAUSE rank/s/.*ROOT CAUSE/ROOT CAUSE/w $state_dir/cause" \
    -e "s/^pdsh@.*exited with exit code \([0-9]*\)\$/\1/w $state_dir/exits" \
    <"$state_dir/stderr" >&2 &
  reader=$!
  # the command dies with this script, even if that is killed
  setsid setpriv --pdeathsig KILL -- "$@" 2>"$state_dir/stderr" &
  launcher=$!
  launcher_started="$(started_at "$launcher")"
  trap stop_ranks TERM INT HUP USR1

  while launcher_runs; do
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
  trap '' TERM INT HUP USR1

  end_session # what the launcher left: with it goes the ranks' output
  wait "$reader" || true
  if [ -n "$(on_ranks pgrep 2>/dev/null)" ]; then
    say "the launcher left its ranks alone: waiting for them to save a checkpoint"
    deadline=$((SECONDS + ${STOP_GRACE_S:-300}))
    while [ "$SECONDS" -lt "$deadline" ] && [ -n "$(on_ranks pgrep 2>/dev/null)" ]; do
      sleep 2
    done
  fi
  end_launch
  if [ "$code" -eq 0 ] && [ ! -s "$state_dir/completed" ]; then
    say "the launcher ended before the run did" # deepspeed returns 0 when what it started is killed
    code=1
  fi
  mapfile -t codes <"$state_dir/exits"
  code="$(code_of_table "$(root_cause "${codes[@]}" "$code")")"
  code="$(code_of_cause "$code")"
  case "$asked$code" in
    early*) code=75 ;;
    # nothing had begun that could be saved, unless a rank says otherwise; 241: a rank ended by SIGTERM
    # before it could listen
    yes1 | yes241 | yes143 | yes129 | yes130)
      if [ ! -s "$state_dir/cause" ]; then code=75; fi ;;
  esac
  explain "$code"
  return "$code"
}
