#!/bin/bash
# Trains on a Cloud TPU slice: the same command on all of its hosts, where JAX finds the others by
# itself. What follows -- goes to the trainer. To go on after anything at all, run the same line.
#
#   launch/tpu/train.sh --name=TPU --zone=us-east5-a --directory=longlive_jax -- \
#       --config=configs/train_ar_5b.py --workdir=gs://BUCKET/RUN --config.mesh.fsdp=16
#
# --name, --zone   of the TPU
# --directory      of the repository on each host, with its .venv; relative to the home directory
# --dry_run        prints what would be started, and starts nothing
# PYTHON=...       the interpreter, .venv/bin/python by default
#
# Ctrl-C tells every host to save and stop; a second one does not wait for them. The hosts' output
# comes here, and a run whose connections break ends: start it in tmux on a machine that stays up.

set -u

usage() {
  echo "error: $1" >&2
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

name='' zone='' directory='' dry_run=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --directory=*) directory=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) usage "$1 is not known here; the trainer's flags come after --" ;;
  esac
  shift
done
[[ -n $name ]] || usage "--name is missing"
[[ -n $zone ]] || usage "--zone is missing"
[[ -n $directory ]] || usage "--directory is missing"

everywhere=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)
# On every host a file says which process to tell to stop; exec keeps its id. It is this run's alone:
# under a name that nobody can foresee, in a folder where nobody else can put a link in its place.
# Those of processes that have ended are removed.
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
[[ ${#token} == 32 ]] || usage "/dev/urandom cannot be read"
folder="\"\$HOME/.cache/longlive_jax\"" ending=".\$(hostname).pid" # the home may be shared
pid_file="$folder/$token$ending"
start="(umask 077 && mkdir -p $folder && for f in $folder/*$ending; do "
start+="kill -0 \"\$(cat \"\$f\")\" || rm -f \"\$f\"; done 2>/dev/null; echo \$\$ > $pid_file) && "
start+="cd $(printf %q "$directory") && "
start+="exec $(printf '%q ' "${PYTHON:-.venv/bin/python}" -m launch.train "$@")"

if [[ -n $dry_run ]]; then
  printf '%q ' "${everywhere[@]}"
  printf -- '--command=%q\n' "$start"
  exit 0
fi

told=0
stop() {
  told=1
  trap 'exit 130' INT TERM
  "${everywhere[@]}" --command="kill -TERM \$(cat $pid_file)"
}
trap stop INT TERM

# Ctrl-C is for this script; gcloud would break off.
(trap '' INT && exec "${everywhere[@]}" --command="$start") &
run=$!
wait "$run"
code=$?
if ((told)); then # which broke the wait off
  wait "$run"
  code=130
fi
exit "$code"
