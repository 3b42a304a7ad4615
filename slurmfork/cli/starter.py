"""The starter spec that `slurmfork init` writes: small, commented, and able to run on a laptop as it is."""

from __future__ import annotations

TEXT = """\
# A spec for slurmfork: which processes run on which share of the nodes.
#
#   slurmfork validate {file}            check it
#   slurmfork plan {file}                see which worker goes where
#   slurmfork run {file} -b local        try it on this machine
#   slurmfork submit {file}              submit it, and get the prompt back

name: {name:<23} # letters, digits, - and _; run ids begin with it
backend: {backend:<20} # local: this machine; slurm: a job. --backend overrides it

nodes: 1                      # left out: as few as the roles need

slurm:                        # every long option of sbatch, by its own name
  time: "00:10:00"
  # partition: gpu
  # account: my-account
  # gpus-per-node: 8

# setup: |                    # shell lines before anything starts, on the first node
#   module load cuda

env:                          # for every worker
  GREETING: hello

# secrets: [HF_TOKEN]         # names; the values come from your environment, never from this file

roles:
  rollout:                    # a named group of identical workers: rollout/0 and rollout/1
    replicas: 2
    gpus: 0                   # for each worker; 1 where there are GPUs
    # ports: 1                # free ports to reserve for it: {{port}} in the command, $SLURMFORK_PORTS
    # ready: {{tcp: true}}      # ready when that port answers; or {{notify: true}}, or {{http: /health}}
    restart: {{policy: on-failure, max: 3}}
    stop: {{signal: TERM, grace: 10}}        # then SIGKILL, to the worker and all below it
    command: |                # a string for the shell, or a list: [python, rollout.py]
      while sleep 2; do echo "$GREETING from $SLURMFORK_WORKER, rank $RANK of $WORLD_SIZE"; done

  trainer:
    gpus: 0
    main: true                # the run ends with it, and with its exit status
    command: |
      for step in 1 2 3 4 5 6 7 8 9 10; do echo "step $step"; sleep 1; done

  eval:                       # started when you ask for it: slurmfork fork last eval
    strategy: {{type: colocation, target: rollout}}  # beside each rollout worker, on the same GPUs
    autostart: false
    on_failure: ignore        # its failure does not end the run
    command: [sh, -c, 'echo "evaluating beside $SLURMFORK_TARGET"; sleep 3']
"""


def text(file: str, name: str, backend: str) -> str:
    """The starter spec for a file and a name."""
    return TEXT.format(file=file, name=name, backend=backend)
