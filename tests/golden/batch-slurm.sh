#!/bin/bash
# Batch script of a slurmfork run. It starts the run's head, which has an agent started on each node, waits for
# it, and makes sure that nothing is left when the run is over.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --output=/shared/runs/grpo-abc234/batch.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@60
#SBATCH --partition=gpu
#SBATCH --time=02:00:00
#SBATCH --exclusive
#SBATCH --comment="it's 50 % \"done\""

# --- Where things are. The variables are what later parts, and a template of your own, can use.
export SLURMFORK_RUN_ID=grpo-abc234
export SLURMFORK_RUN_DIR=/shared/runs/grpo-abc234
slurmfork_python=/opt/venv/bin/python
slurmfork_package=/opt/venv/lib/python3.11/site-packages/slurmfork
slurmfork_node=${SLURMD_NODENAME:-local0}
slurmfork_head=
slurmfork_part=setup
# Should the run have been submitted from within another run, what is that run's stays there.
unset SLURMFORK_NODE SLURMFORK_WORKER SLURMFORK_ROLE SLURMFORK_INDEX SLURMFORK_PORTS SLURMFORK_AGENT \
  SLURMFORK_TARGET SLURMFORK_HEAD

# --- Every file of the run is in the run directory, so this node must see it too.
if [ ! -f "$SLURMFORK_RUN_DIR/batch.sh" ]; then
  echo "slurmfork: node $slurmfork_node cannot take part: it does not see the run directory" \
    "$SLURMFORK_RUN_DIR; put it on the shared file system with --root" >&2
  exit 78
fi

# --- What is written there is private. The umask itself stays as it is: it is the workers'.
[ ! -f "$SLURMFORK_RUN_DIR/batch.log" ] || chmod 600 "$SLURMFORK_RUN_DIR/batch.log"

# --- What an earlier attempt left, should Slurm have requeued the job.
(cd "$SLURMFORK_RUN_DIR" && rm -f batch.status end.json head.json requeued)

# --- However this script ends: end what is left of the run, then leave the exit status in batch.status.
# shellcheck disable=SC2317 # it is the trap that calls it
slurmfork_finish() {
  local status=$?
  trap - EXIT
  trap : TERM USR1 # what is left to do is short, and must be done
  set +efu
  umask 077
  if [ "$slurmfork_part" = setup ]; then
    [ "$status" -ne 0 ] || status=143 # ended by a signal, or by an `exit` in the setup lines
    echo "slurmfork: the setup lines ended with status $status on node $slurmfork_node; no agent was started" >&2
  fi
  # On every node, if agents may have been started and the head has not ended in order: its last word is end.json.
  # (A step of its own, ended by `timeout` if a node does not answer.)
  if [ -n "$slurmfork_head" ] && [ ! -f "$SLURMFORK_RUN_DIR/end.json" ]; then
    unset SLURM_GPUS SLURM_GPUS_PER_NODE # they would contradict --gres=none
    # shellcheck disable=SC2016
    timeout -k 5 60 "${slurmfork_srun[@]}" --gres=none bash -c 'exec "$@" --node "$SLURMD_NODENAME"' sweep \
      "$slurmfork_python" -I "$slurmfork_package/sweep.py" --run-dir "$SLURMFORK_RUN_DIR" --grace 2 \
      >>"$SLURMFORK_RUN_DIR/sweep.jsonl"
  fi
  # On this machine, always. It finds what belongs to the run by its journals, and by the tag in the environment.
  timeout -k 5 30 "$slurmfork_python" -I "$slurmfork_package/sweep.py" --run-dir "$SLURMFORK_RUN_DIR" --grace 2 \
    >>"$SLURMFORK_RUN_DIR/sweep.jsonl"
  if [ ! -f "$SLURMFORK_RUN_DIR/requeued" ]; then # else the run is not over: it waits for its next attempt
    printf '%s\n' "$status" >"$SLURMFORK_RUN_DIR/.batch.status" &&
      mv -f "$SLURMFORK_RUN_DIR/.batch.status" "$SLURMFORK_RUN_DIR/batch.status"
  fi
  exit "$status"
}
trap slurmfork_finish EXIT

# --- The spec's setup lines. They run in this shell, so that what they export, load and activate holds for the
# agents too. As with any script, they have failed if their last command fails, and then so has the run; begin them
# with `set -e` to have the first failure end the run. What they leave in the background is ended with the run.
export SLURMFORK_NODE=$slurmfork_node # the tag by which the sweep finds it
trap : USR1                           # a warning of the time limit; nobody is there yet who could heed it
true
# shellcheck source=/dev/null
source /dev/fd/9 9<<'END_OF_SETUP'
module load cuda
export HF_HOME='/scratch/hf'
END_OF_SETUP
slurmfork_status=$?
set +efux +o pipefail # whatever the setup lines have set for themselves
unset IFS SLURMFORK_NODE
trap slurmfork_finish EXIT
[ "$slurmfork_status" -eq 0 ] || exit "$slurmfork_status"
slurmfork_part=run

# --- What the head starts, to have one agent started on each node; and how it runs a command on one node, to sweep
# it should its agent not answer: slurmfork_sweep, the node, the command, which gets `--node NODE` at its end.
slurmfork_sweep=()
# srun obeys many variables, of this job, of a shell in another job, and of the site. Those that would change what
# the agents get are unset; what the agents get is said in full below.
unset "${!SRUN_@}" "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" \
  SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET \
  SLURM_GPU_BIND SLURM_TRES_BIND SLURM_STEP_GRES SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE \
  SLURM_NTASKS_PER_CORE SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_SOCKET SLURM_NTASKS_PER_TRES \
  SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_THREADS_PER_CORE SLURM_NSOCKETS_PER_NODE \
  SLURM_NCORES_PER_SOCKET SLURM_HINT SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_OVERLAP \
  SLURM_OVERCOMMIT SLURM_EXTERNAL_LAUNCHER SLURM_EXPORT_ENV SLURM_LABELIO SLURM_STDINMODE SLURM_STDOUTMODE \
  SLURM_STDERRMODE SLURM_KILL_BAD_EXIT SLURM_WAIT SLURM_NO_KILL SLURM_MULTI SLURM_MPI_TYPE SLURM_TIMELIMIT \
  SLURM_RESV_PORTS SLURM_REMOTE_CWD SLURM_WORKING_DIR
export SLURM_OOM_KILL_STEP=0 # a worker out of memory is one worker's end, not the whole node's

# For the head to know how long it has after a SIGTERM from Slurm.
SLURMFORK_KILL_WAIT=$(timeout 10 scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
export SLURMFORK_KILL_WAIT

# One task on each node. It shares all that the job has with other steps, takes all of the job's memory, is bound
# to no CPU, and is ended neither by another task's end nor by its failure: that is for the head to decide.
slurmfork_step=(
  --overlap --mem=0 --cpu-bind=none --mpi=none --export=ALL --input=none --kill-on-bad-exit=0 --wait=0
)
slurmfork_srun=(
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
  "${slurmfork_step[@]}"
)
# There it becomes the agent, with the node's own log. (srun names files by host, but nodes may share one.)
# shellcheck disable=SC2016
slurmfork_on_node='
  if [ ! -f "$SLURMFORK_RUN_DIR/batch.sh" ]; then
    echo "slurmfork: node $SLURMD_NODENAME cannot take part: it does not see the run directory" \
      "$SLURMFORK_RUN_DIR; put it on the shared file system with --root" >&2
    exit 78
  fi
  export SLURMFORK_NODE=$SLURMD_NODENAME # the tag, so that a sweep ends the agent too
  log=$SLURMFORK_RUN_DIR/agents/$SLURMD_NODENAME.log
  (umask 077 && : >>"$log")
  exec "$@" >>"$log" 2>&1'
slurmfork_launcher=(
  "${slurmfork_srun[@]}" bash -c "$slurmfork_on_node" node
  "$slurmfork_python" -I "$slurmfork_package/agent/__main__.py"
)
# shellcheck disable=SC2016
slurmfork_sweep=(
  bash -c 'unset SLURM_GPUS SLURM_GPUS_PER_NODE # they would contradict --gres=none
  step=$1 node=$2; shift 2
  exec srun $step --nodes=1 --ntasks=1 --nodelist="$node" --gres=none "$@" --node "$node"'
  sweep "${slurmfork_step[*]}"
)

# --- The head. A trap runs only when no command is in the foreground, so the head is in the background, and this
# shell waits for it. SIGTERM (scancel) ends the run; SIGUSR1 warns that the time limit is near. Both go to the head
# alone: srun, if it got one, would kill all agents at once.
slurmfork_told=
trap 'slurmfork_told=yes; [ -z "$slurmfork_head" ] || kill -TERM "$slurmfork_head" 2>/dev/null' TERM
trap '[ -z "$slurmfork_head" ] || kill -USR1 "$slurmfork_head" 2>/dev/null' USR1
(
  trap '' USR1 # until the head listens, a warning must not end it
  exec "$slurmfork_python" -I "$slurmfork_package/head/__main__.py" --run-dir "$SLURMFORK_RUN_DIR" --parent "$$" \
    -- "${slurmfork_launcher[@]}" --sweep "${slurmfork_sweep[@]}"
) &
slurmfork_head=$!
[ -z "$slurmfork_told" ] || kill -TERM "$slurmfork_head" 2>/dev/null
# A signal interrupts `wait`; only the last one, which none can interrupt, surely has the head's exit status.
while kill -0 "$slurmfork_head" 2>/dev/null; do wait "$slurmfork_head"; done
trap '' TERM USR1
wait "$slurmfork_head"
exit $?
