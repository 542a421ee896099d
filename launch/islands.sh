# shellcheck shell=bash
# Which nodes are of which island. Sourced by the launch scripts.
# A hostfile has one line per node, `name slots=N island=NAME`; either all nodes have a mark, or none.

# count_islands HOSTFILE: prints how many there are, 0 without marks. Processes are numbered in the
# order of the hostfile, and neighbours are of one island.
count_islands() {
  awk -v file="$1" '
    function stop(text) { print file ":" FNR ": " text >"/dev/stderr"; bad = 1; exit 1 }
    /^[[:space:]]*(#|$)/ { next }
    { sub(/#.*/, ""); sub(/^slots=/, "", $2); mark = $3; nodes++; marked += mark != "" }
    marked && marked < nodes { stop("every node needs an island=NAME, or none") }
    mark == "" { next }
    mark != last && mark in slots { stop(mark " is named again after another island: order nodes by island") }
    { slots[mark] += $2; count += mark != last; last = mark }
    END {
      if (bad) exit 1
      for (name in slots) if (slots[name] != slots[last]) {
        print file ": " name " has " slots[name] " slots and " last " has " slots[last] ": islands are equally large" >"/dev/stderr"
        exit 1
      }
      print count + 0
    }' "$1"
}

# marked_nodes HOSTFILE SLOTS NODE...: prints the nodes as a hostfile with so many slots each and the marks
# that HOSTFILE has for them, in its order of islands. Lines of other nodes are passed over.
marked_nodes() {
  local file="$1" slots="$2"
  shift 2
  printf '%s\n' "$@" | awk -v file="$file" -v slots="$slots" '
    /^[[:space:]]*(#|$)/ { next }
    FILENAME == file {
      sub(/#.*/, "")
      for (i = 2; i <= NF; i++) if ($i ~ /^island=./) mark[$1] = $i
      if ($1 in mark && !(mark[$1] in place)) { place[mark[$1]] = ++islands; name[islands] = mark[$1] }
      next
    }
    !($1 in mark) { print file ": " $1 " is a node of the job, but has no line with island=NAME" >"/dev/stderr"; bad = 1; next }
    { lines[place[mark[$1]]] = lines[place[mark[$1]]] $1 " slots=" slots " " mark[$1] "\n" }
    END {
      if (bad) exit 1
      for (i = 1; i <= islands; i++) printf "%s", lines[i]
    }' "$file" -
}
