"""The shape of a spec: one struct per section, field names as in the YAML file.

Plain data with defaults; what may stand in a field beyond its type is checked in ``slurmfork.spec.checks``.
The field comments are the reference: docs/spec.md is generated from this file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
Plain: TypeAlias = Annotated[Any, Meta(description="whatever YAML can say")]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=31_536_000)]


class Section(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, frozen=True):
    """Base of all sections: unknown keys are errors, instances never change."""


class Ready(Section, kw_only=True, frozen=True):
    """When a worker counts as ready. Exactly one of ``notify``, ``http``, ``tcp``."""

    # The worker says READY=1 on $NOTIFY_SOCKET (systemd's protocol).
    notify: bool = False
    # A path; a GET of it on the worker's first port answers 2xx or 3xx.
    http: str | None = None
    # The worker's first port accepts a connection.
    tcp: bool = False
    # Seconds from its start after which a worker that is not ready has failed.
    timeout: Annotated[float, Meta(gt=0, le=31_536_000)] = 120.0


class Restart(Section, kw_only=True, frozen=True):
    """What happens when a worker ends by itself."""

    # never; on-failure: when its exit status is not 0; always.
    policy: Literal["never", "on-failure", "always"] = "never"
    # Restarts at most, over the life of the worker.
    max: Count = 3
    # Seconds before the first restart; doubled for each further one, 60 at most.
    backoff: Seconds = 1.0


class Stop(Section, kw_only=True, frozen=True):
    """How a worker is asked to end, before SIGKILL to its whole tree."""

    # A signal's name, with SIG or without: TERM, INT, USR1 ... (KILL follows by itself).
    signal: str = "TERM"
    # Seconds between that signal and SIGKILL.
    grace: Seconds = 10.0


class Checkpoint(Section, kw_only=True, frozen=True):
    """A signal that tells a worker that the job is about to be ended, and how long before."""

    # The signal's name, with SIG or without. The worker has to handle it: most end a process that does not.
    signal: str = "USR1"
    # Seconds before the time limit. When the job is preempted it comes at once.
    before: Annotated[float, Meta(ge=1, le=86_400)] = 120.0


class Strategy(Section, kw_only=True, frozen=True):
    """Where a role's workers go."""

    # separation: devices of their own; colocation: on the devices of the target's workers.
    type: Literal["separation", "colocation"] = "separation"
    # The role beside whose workers these are started (colocation only).
    target: str | None = None
    # true: a process of its own beside the target. false: its engines live in the target's own processes; both
    # roles have an `engine` then, and what only a process has (env, cwd, ports, gpus, restart ...) is the target's.
    fork: bool = True


class Role(Section, kw_only=True, frozen=True):
    """A named group of identical workers."""

    # A list of arguments, or one string for the shell. {port}, {ports}, {index}, {rank}, {role}, {worker},
    # {node}, {run_id}, {run_dir} are filled in; write {{port}} for the text {port}. ${port} is the shell's.
    command: str | list[str] | None = None
    # In place of a command: a Python class, as package.module:Class. Each worker makes one object of it, and serves
    # calls of its methods.
    engine: str | None = None
    # Positional arguments for the engine's class.
    args: list[Plain] = field(default_factory=list)
    # Arguments by name for the engine's class.
    kwargs: dict[str, Plain] = field(default_factory=dict)
    # true: calls of the engine may carry pickled objects, where the caller asks for it. Whoever may call can then
    # run anything in the worker.
    pickle: bool = False
    # Workers in all. Left out: 1, or with colocation one for each group of targets that gives it its devices.
    replicas: Positive | None = None
    # Workers on every node; in place of replicas.
    per_node: Positive | None = None
    # GPUs of each worker. Left out: 0, or with colocation all those of its target. With colocation also a
    # part of the target's, or a multiple: then those of as many targets on one node.
    gpus: Count | None = None
    # CPUs of each worker, to size the request and to pack. Left out: one per GPU, ignored by packing.
    cpus: Count | None = None
    # Environment of these workers, over the run's. Numbers and true become the text that they are written as.
    env: dict[str, str] = field(default_factory=dict)
    # Working directory, absolute, or relative to the `code` that was sent along. Left out: with colocation the
    # target's, else there, or where there is none the directory of submission.
    cwd: str | None = None
    # Free TCP ports to reserve for each worker, in SLURMFORK_PORTS and as {port}.
    ports: Annotated[int, Meta(ge=0, le=64)] = 0
    # When a worker is ready. Left out: as soon as it is started, or with an engine when its object is made (then only
    # the timeout can be given).
    ready: Ready | None = None
    # Whether a worker that ended is started again.
    restart: Restart = field(default_factory=Restart)
    # How a worker is asked to end.
    stop: Stop = field(default_factory=Stop)
    # Whether it is signalled before the job is ended by its time limit, or preempted. Left out: it is not.
    checkpoint: Checkpoint | None = None
    # end: a failed worker ends the run. ignore: it does not.
    on_failure: Literal["end", "ignore"] = "end"
    # The run ends with this role, and with its exit status. One role at most.
    main: bool = False
    # Devices of its own, or those of another role.
    strategy: Strategy = field(default_factory=Strategy)
    # false: started by `slurmfork fork`. One with devices of its own has them kept for it all the time; a run with such
    # a role does not end because all workers are done: more may come.
    autostart: bool = True

    @property
    def shared(self) -> bool:
        """Whether its engines live in the processes of its target."""
        return self.colocated and not self.strategy.fork

    @property
    def colocated(self) -> bool:
        """Whether this role lives on the devices of another."""
        return self.strategy.type == "colocation"


class Local(Section, kw_only=True, frozen=True, rename="kebab"):
    """What each node of the local backend offers. Left out: what this machine has."""

    # GPUs of each node. Left out: those of this machine.
    gpus_per_node: Count | None = None
    # CPUs of each node, which then limit how many workers it takes. Left out: not limited.
    cpus_per_node: Positive | None = None


class Ray(Section, kw_only=True, frozen=True, rename="kebab"):
    """What to ask Ray for: one bundle a node, of which no two are on one of Ray's nodes."""

    # The address of a running cluster, host:port, or auto for the one on this machine. Left out: RAY_ADDRESS, or where
    # that is not set, a cluster that is started on this machine for the run alone.
    address: str | None = None
    # GPUs of each node. Left out: as few as will do.
    gpus_per_node: Count | None = None
    # CPUs of each node, which then limit how many workers it takes. Left out: what the workers count for, not limited.
    cpus_per_node: Positive | None = None


class Code(Section, kw_only=True, frozen=True):
    """A directory that is sent along: a copy of it in the run directory is where the workers start."""

    # What a text in place of keys and values is.
    short: ClassVar[str] = "path"

    # The directory, relative to the spec; left out: the one that the spec is in.
    path: str = "."
    # Patterns, as in a .gitignore, of what is sent although .gitignore leaves it out.
    include: list[str] = field(default_factory=list)
    # Patterns, as in a .gitignore, of what is not sent, whoever says otherwise.
    exclude: list[str] = field(default_factory=list)
    # More than this is refused, before anything is sent; K, M, G and T are units.
    limit: str = "1G"


class Spec(Section, kw_only=True, frozen=True):
    """A whole spec file."""

    # Letters, digits, - and _; 40 at most. Begins the run id.
    name: str
    # local | slurm | ray; the command line can override it.
    backend: Literal["local", "slurm", "ray"] = "slurm"
    # Nodes; left out: as few as the roles need.
    nodes: Positive | None = None
    # Every long option of sbatch by its own name; true for one that takes no value, a list is joined with
    # commas. And `template`: the file of a batch script template of your own, relative to the spec.
    slurm: dict[str, Any] = field(default_factory=dict)
    # What a node of the local backend offers.
    local: Local = field(default_factory=Local)
    # What a node of the Ray backend is.
    ray: Ray = field(default_factory=Ray)
    # A directory to send along, of which the run gets a copy to work in; relative to the spec.
    code: Code | None = None
    # Shell lines before the agents start, on the first node.
    setup: str = ""
    # Environment of every worker.
    env: dict[str, str] = field(default_factory=dict)
    # Names of variables whose values come from the submitter's environment, by a file that only you can read.
    secrets: list[str] = field(default_factory=list)
    # Whether all that runs on a node is in one PID namespace, which the kernel ends as a whole. namespace: the run
    # fails at once where a node cannot; auto: such a node does without, and says so; none: no node has one.
    isolation: Literal["namespace", "auto", "none"] = "none"
    # true: a job that was preempted, whose node failed, or that came to its time limit is put into the queue again,
    # and comes back as the same run.
    requeue: bool = False
    # What follows when a node is lost. end: the run ends. continue: it goes on without that node's workers, unless
    # one of the main role was there.
    on_node_fail: Literal["end", "continue"] = "end"
    # What is done about what is found on a node before anything is started there, GPUs that others hold, a full
    # /tmp or a wrong clock: warn, it is told; refuse, the run fails at once if it is serious; off, nobody looks.
    preflight: Literal["warn", "refuse", "off"] = "warn"
    # The roles, by name: letters, digits, - and _; 40 at most.
    roles: dict[str, Role]

    def to_json(self) -> bytes:
        """The resolved spec as it is stored in the run directory."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    @classmethod
    def from_json(cls, data: bytes) -> Spec:
        """Read a stored spec back; raises msgspec.ValidationError if it is not one."""
        return msgspec.json.decode(data, type=cls)
