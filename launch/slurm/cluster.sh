#!/usr/bin/env bash
# Sourced by serve.sbatch and batch.sbatch: a coordinator on this node, and one `srun` step for each worker group.
#
#   parse_cluster_option OPTION VALUE   takes one of the options below; false when it is none
#   start_cluster HOST                  the coordinator listens on HOST, at a free port; sets $endpoint
#   stop_cluster                        finishes live requests, ends everything; 0 when nothing had to be killed
#   cluster_failed                      whether it has given up
#   tell_end                            sets SLURM_JOB_END_TIME where Slurm has not
#
# What ends is started again after a pause that doubles from 1 s to 15 s, at most RANKWISE_MAX_RESTARTS (8) times in a row;
# a run of 60 s forgives all before it. Exit code 2 of our programs means that starting again will not help.

model='' tp=1 replicas=1 nodes_per_group='' threads='' drain_seconds=60
worker_flags=() coordinator_flags=()
coordinator_loop='' group_loops=() endpoint='' run_folder='' token_file=''

# shellcheck disable=SC2034  # of those who source this
readonly cluster_options="  --model DIR           model folder or workspace, readable on every node
  --tp N                ranks of one group (1)
  --replicas N          groups (1)
  --nodes-per-group N   nodes of one group (as few as hold it)
  --threads N           threads of one rank (SLURM_CPUS_PER_TASK, else this node's CPUs of the job shared out)
  --kv FORMAT, --kv-scales DIR, --kv-memory SIZE, --max-tokens N, --max-running N, --device D, --activations A
                        as in rankwise serve
  --drain-timeout N     seconds that live requests get to finish at the end (60)"

complain() { echo "rankwise: $*" >&2; }

parse_cluster_option() {
  case $1 in
    --model) model=$2 ;;
    --tp) tp=$2 ;;
    --replicas) replicas=$2 ;;
    --nodes-per-group) nodes_per_group=$2 ;;
    --threads) threads=$2 ;;
    --drain-timeout) drain_seconds=$2 ;;
    --kv | --kv-scales | --kv-memory | --max-tokens | --max-running | --device | --activations | --step-timeout)
      worker_flags+=("$1" "$2") ;;
    --max-live | --group-timeout | --group-wait) coordinator_flags+=("$1" "$2") ;;
    *) return 1 ;;
  esac
}

# Sleeps before the next start of what ran $1 seconds; false when there were too many. Keeps $restarts and $pause.
next_pause() {
  local ran=$1
  if ((ran >= 60)); then restarts=0 pause=1; fi
  ((++restarts <= ${RANKWISE_MAX_RESTARTS:-8})) || return 1
  sleep "$pause"
  pause=$((pause * 2 > 15 ? 15 : pause * 2))
}

# Runs "$@" until it ends well, refuses its configuration, or fails too often. $1 is its name in messages.
keep_running() {
  local name=$1 restarts=0 pause=1 code begun child=''
  shift
  trap 'if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi' TERM
  while :; do
    begun=$SECONDS
    "$@" </dev/null &
    child=$!
    wait "$child"
    code=$?
    # A trap ends `wait` early.
    while kill -0 "$child" 2>/dev/null; do
      wait "$child"
      code=$?
    done
    child=''
    if ((code == 0)) || [[ -e $run_folder/stopping ]]; then return 0; fi
    if ((code == 2)); then
      complain "$name refused its configuration"
      return 2
    fi
    complain "$name ended with code $code after $((SECONDS - begun)) s"
    next_pause $((SECONDS - begun)) || {
      complain "$name failed too often"
      return 3
    }
    if [[ -e $run_folder/stopping ]]; then return 0; fi
  done
}

run_coordinator() {
  # Started again, it comes back where it was.
  local listen=$1
  if [[ -s $run_folder/endpoint ]]; then listen=$(<"$run_folder/endpoint"); fi
  exec "$rankwise_bin/rankwise-coordinator" --model "$model" --listen "$listen" --endpoint-file "$run_folder/endpoint" \
    --token-file "$token_file" --drain-timeout "$drain_seconds" --log-level "${RANKWISE_LOG_LEVEL:-warn}" "${coordinator_flags[@]}"
}

start_cluster() {
  local host=$1 gpu_flags=() cpus per_node
  rankwise_bin=${RANKWISE_BIN:-$(dirname "$(command -v rankwise || echo .)")}
  if [[ ! -x $rankwise_bin/rankwise-worker ]]; then
    complain "no rankwise-worker in \"$rankwise_bin\": put rankwise's folder into PATH or RANKWISE_BIN"
    return 2
  fi
  if [[ ! -d $model ]]; then
    complain "--model \"$model\" is not a folder"
    return 2
  fi
  if [[ ! $tp =~ ^[1-9][0-9]*$ || ! $replicas =~ ^[1-9][0-9]*$ ]]; then
    complain "--tp $tp --replicas $replicas: both are numbers from 1"
    return 2
  fi
  local cpus_on_node=${SLURM_CPUS_ON_NODE:-1}
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    # Each rank sees its own GPU and no other.
    gpu_flags=(--gpus-per-task=1)
    per_node=$SLURM_GPUS_ON_NODE
    cpus=${SLURM_CPUS_PER_TASK:-$((cpus_on_node / per_node > 0 ? cpus_on_node / per_node : 1))}
  else
    local nodes=${SLURM_JOB_NUM_NODES:-1}
    local ranks_per_node=$(((tp * replicas + nodes - 1) / nodes))
    cpus=${SLURM_CPUS_PER_TASK:-$((cpus_on_node / ranks_per_node > 0 ? cpus_on_node / ranks_per_node : 1))}
    per_node=$((cpus_on_node / cpus))
  fi
  nodes_per_group=${nodes_per_group:-$(((tp + per_node - 1) / per_node))}
  run_folder=$(mktemp -d "${TMPDIR:-/tmp}/rankwise-$SLURM_JOB_ID-XXXXXX")
  # This job's own, for clients and groups, in a folder that the nodes share; only its owner may read it.
  token_file=${token_file:-${SLURM_SUBMIT_DIR:-.}/.rankwise-$SLURM_JOB_ID.token}
  (umask 077 && rm -f "$token_file" && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token_file") || return 2
  export RANKWISE_TOKEN_FILE=$token_file

  keep_running coordinator run_coordinator "$host:0" &
  coordinator_loop=$!
  for ((i = 0; i < 600; ++i)); do
    [[ -s $run_folder/endpoint ]] && break
    kill -0 $coordinator_loop 2>/dev/null || break
    sleep 0.05
  done
  if [[ ! -s $run_folder/endpoint ]]; then
    complain "the coordinator announced no endpoint"
    return 2
  fi
  endpoint=$(<"$run_folder/endpoint")
  for ((i = 0; i < replicas; ++i)); do
    # --exact: steps of one job side by side. --wait: ranks that outlive the first one's end by more are ended.
    keep_running "group $i" srun --mpi=pmix --exact --nodes="$nodes_per_group" --ntasks="$tp" --cpus-per-task="$cpus" \
      --wait=10 --kill-on-bad-exit=1 --job-name="rankwise-group-$i" "${gpu_flags[@]}" \
      "$rankwise_bin/rankwise-worker" --model "$model" --coordinator "$endpoint" --token-file "$token_file" \
      --threads "${threads:-$cpus}" \
      --log-level "${RANKWISE_LOG_LEVEL:-warn}" "${worker_flags[@]}" &
    group_loops+=($!)
  done
}

cluster_failed() {
  local loop
  kill -0 "$coordinator_loop" 2>/dev/null || return 0
  for loop in "${group_loops[@]}"; do
    if kill -0 "$loop" 2>/dev/null; then return 1; fi
  done
  return 0
}

# Older Slurms do not tell a job its end.
tell_end() {
  local end
  # The id of an array's last task also names the whole array.
  end=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* EndTime=\([0-9T:-]*\) .*/\1/p")
  if [[ -z ${SLURM_JOB_END_TIME:-} && -n $end ]]; then
    SLURM_JOB_END_TIME=$(date -d "$end" +%s) && export SLURM_JOB_END_TIME
  fi
}

# Waits until process $1 has ended, $2 seconds at most.
wait_end() {
  local i
  for ((i = 0; i < $2 * 10; ++i)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  return 1
}

stop_cluster() {
  local loop status=0
  if [[ -z $run_folder ]]; then return 0; fi
  touch "$run_folder/stopping"
  if [[ -n $coordinator_loop ]]; then
    # It drains, then tells the groups to end.
    kill -TERM "$coordinator_loop" 2>/dev/null
    wait_end "$coordinator_loop" $((drain_seconds + 5)) || {
      complain "the coordinator did not end in time"
      kill -KILL "$coordinator_loop" 2>/dev/null
      status=1
    }
  fi
  for loop in "${group_loops[@]}"; do
    wait_end "$loop" 10 && continue
    # A group that had not joined looks for its coordinator in vain.
    kill -TERM "$loop" 2>/dev/null
    wait_end "$loop" 10 || {
      kill -KILL "$loop" 2>/dev/null
      status=1
    }
  done
  rm -rf "$run_folder" "$token_file"
  return $status
}
