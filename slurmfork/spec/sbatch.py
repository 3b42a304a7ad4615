"""What may stand under ``slurm:``: every long option of sbatch (20.11 to 26.05), and why some are refused.

Only words; which release knows which option is for sbatch itself to say.
"""

from __future__ import annotations

FLAGS = frozenset(
    """
    consolidate-segments contiguous hold ignore-pbs overcommit oversubscribe reboot spread-job
    spread-segments stepmgr use-min-nodes
    """.split()  # noqa: SIM905 (a column of 70 strings is no easier to read)
)
FLAG_OR_VALUE = frozenset({"exclusive", "nice", "no-kill", "oom-kill-step", "propagate"})
VALUES = frozenset(
    """
    account acctg-freq batch bb bbf begin cluster-constraint clusters comment constraint container
    container-id container-type core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
    delay-boot dependency distribution exclude extra extra-node-info gpu-freq gpus-per-node gres gres-flags
    hint job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu
    mem-per-gpu mem-update mincpus network nodefile nodelist partition power prefer priority profile qos
    reservation resources resv-ports segment sockets-per-node switches thread-spec threads-per-core time
    time-min tmp wait-all-nodes wckey
    """.split()  # noqa: SIM905
)
TEMPLATE = "template"
ALLOWED = FLAGS | FLAG_OR_VALUE | VALUES | {TEMPLATE}

_TASKS = "slurmfork starts one agent on each node, which starts the workers; use `replicas` of a role"
_PER_TASK = "Slurm would give the one agent of a node the GPUs of one task only; use gpus-per-node"
_BINDING = "each worker gets GPUs of its own from the agent of its node, by CUDA_VISIBLE_DEVICES; leave it out"
_ENVIRONMENT = "slurmfork decides what reaches the workers; use `env` and `secrets`"
_OUTPUT = "the output is kept in the run directory; `slurmfork logs` shows it"
_READ = "slurmfork reads what sbatch prints; leave it out"
_ASKS = "it only prints and submits nothing; ask sbatch itself"
_OWNER = "a run belongs to the one who submits it; leave it out"
_REQUEUE = "use the top-level `requeue: true`; without it runs are not requeued"
_HETEROGENEOUS = "heterogeneous jobs are not supported; a run is one job of like nodes"

REFUSED = {
    "array": "one run is one job; submit the spec several times",
    "chdir": "workers start in the directory of submission; use `cwd` of a role",
    "error": _OUTPUT,
    "export": _ENVIRONMENT,
    "export-file": _ENVIRONMENT,
    "get-user-env": _ENVIRONMENT,
    "gid": _OWNER,
    "gpu-bind": _BINDING,
    "gpus": "the plan has to know what each node has; use gpus-per-node",
    "gpus-per-socket": "the plan has to know what each node has; use gpus-per-node",
    "gpus-per-task": _PER_TASK,
    "help": _ASKS,
    "het": _HETEROGENEOUS,
    "het-group": _HETEROGENEOUS,
    "hetjob": _HETEROGENEOUS,
    "input": "the batch script reads nothing; let a worker open its input itself",
    "no-requeue": _REQUEUE,
    "nodes": "use the top-level `nodes`",
    "ntasks": _TASKS,
    "ntasks-per-core": _TASKS,
    "ntasks-per-gpu": _TASKS,
    "ntasks-per-node": _TASKS,
    "ntasks-per-socket": _TASKS,
    "open-mode": "logs are always appended to; leave it out",
    "output": _OUTPUT,
    "pack-group": _HETEROGENEOUS,
    "packed": _HETEROGENEOUS,
    "packjob": _HETEROGENEOUS,
    "parsable": _READ,
    "quiet": _READ,
    "requeue": _REQUEUE,
    "signal": "slurmfork uses it itself, to warn the workers in time; use `checkpoint` of a role",
    "test-only": "use `slurmfork validate` and `slurmfork plan`",
    "tres-bind": _BINDING,
    "tres-per-task": _PER_TASK,
    "uid": _OWNER,
    "usage": _ASKS,
    "verbose": _READ,
    "version": _ASKS,
    "wait": "use `slurmfork submit --wait`, or `slurmfork wait`",
    "wrap": "slurmfork writes the batch script; give a role the `command`",
}
NO_OPTIONS = frozenset({"het", "het-group", "hetjob", "pack-group", "packed", "packjob"})  # refused with a reason
