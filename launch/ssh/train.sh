#!/bin/bash
# Trains on hosts that ssh reaches, one process on each with all of its GPUs. What follows -- goes
# to the trainer. To go on after anything at all, run the same line again.
#
#   launch/ssh/train.sh --hosts=FILE -- \
#       --config=configs/train_ar_5b.py --workdir=/shared/run --config.mesh.fsdp=2
#
# --hosts=FILE      a host a line, as ssh knows it; # begins a comment. The others must reach the
#                   first one under that name: it coordinates.
# --port=12355      where it does so
# --directory=DIR   of the repository on every host; by default, where it is here
# --logs=DIR        what each process prints, process_0.log and so on; default out/logs. The first
#                   one's is shown here as well.
# --dry_run         prints what would be started, and starts nothing
# PYTHON=...        the interpreter, .venv/bin/python by default
#
# When one process fails, all others are stopped, and its exit code is this script's. Ctrl-C tells
# all to save and stop; a second one does not wait for them. A process that loses the connection to
# here is told to save and stop as well.

set -u -o pipefail

usage() {
  echo "error: $1" >&2
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

hosts_file='' port=12355 logs=out/logs dry_run=''
directory=$(cd "$(dirname "$0")/../.." && pwd)
while (($#)); do
  case $1 in
    --hosts=*) hosts_file=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --directory=*) directory=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) usage "$1 is not known here; the trainer's flags come after --" ;;
  esac
  shift
done
[[ -n $hosts_file ]] || usage "--hosts is missing"
[[ -r $hosts_file ]] || usage "--hosts=$hosts_file cannot be read"
read -r -d '' -a hosts < <(sed 's/#.*//' "$hosts_file")
((${#hosts[@]})) || usage "--hosts=$hosts_file names no host"

# What runs on a host: the trainer, and one who ends it when this script's end of stdin is closed,
# with five minutes to save. Background jobs have no stdin of their own, so it is kept as 3.
remote_script() {
  local host_id=$1
  shift
  local command=("${PYTHON:-.venv/bin/python}" -m launch.train "$@"
    "--coordinator=${hosts[0]#*@}:$port" "--num_processes=${#hosts[@]}" "--process_id=$host_id")
  cat <<SCRIPT
cd $(printf %q "$directory") || exit 2
exec 3<&0
$(printf '%q ' "${command[@]}") 3<&- &
trainer=\$!
(
  cat <&3
  kill -TERM \$trainer
  left=300
  while kill -0 \$trainer && [ \$left -gt 0 ]; do sleep 1; left=\$((left - 1)); done
  kill -KILL \$trainer
) >/dev/null 2>&1 &
wait \$trainer
code=\$?
kill \$! 2>/dev/null
exit \$code
SCRIPT
}

connect=(ssh -o BatchMode=yes -o ServerAliveInterval=30)
if [[ -n $dry_run ]]; then
  for i in "${!hosts[@]}"; do
    printf '%q ' "${connect[@]}" "${hosts[i]}"
    printf '\n%s\n\n' "$(remote_script "$i" "$@" | sed 's/^/    /')"
  done
  exit 0
fi

mkdir -p "$logs" || exit 2
# Every process's stdin is a pipe whose other end is file 9 of this script alone: it closes even
# when this script is killed. File 8 brings back how each process ended.
pipes=$(mktemp -d) || exit 2 # of this user alone
mkfifo -m 600 "$pipes/stdin" "$pipes/ends" || exit 2
exec 9<>"$pipes/stdin" 8<>"$pipes/ends"
for i in "${!hosts[@]}"; do
  exec 7<"$pipes/stdin"
  {
    trap '' INT # Ctrl-C is for this script; ssh would break off
    run=("${connect[@]}" "${hosts[i]}" "$(remote_script "$i" "$@")")
    if ((i == 0)); then
      "${run[@]}" <&7 8>&- 2>&1 | tee "$logs/process_$i.log"
    else
      "${run[@]}" <&7 8>&- >"$logs/process_$i.log" 2>&1
    fi
    echo "$i $?" >&8
  } 9>&- &
done
rm -r "$pipes"
echo "started ${#hosts[@]} process(es); logs: $logs" >&2

code=0
stop_all() { exec 9>&-; }
interrupted() {
  echo "all are told to save and stop; Ctrl-C again: do not wait for them" >&2
  code=130
  trap 'exit 130' INT TERM
  stop_all
}
trap interrupted INT TERM

for _ in "${hosts[@]}"; do
  until read -r i ended <&8; do :; done # a signal may break it off
  if ((ended != 0 && code == 0)); then
    code=$ended
    echo "process $i (${hosts[i]}) ended with code $ended; stopping all. $logs/process_$i.log" >&2
    stop_all
  fi
done
exit "$code"
