"""``python -I .../agent/__main__.py``, or ``-m slurmfork.agent``: srun starts the guardian so, one a node."""

import sys

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork.agent.guardian import run

if __name__ == "__main__":
    sys.exit(run())
