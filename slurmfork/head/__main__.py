"""``python -I .../head/__main__.py --run-dir DIR -- LAUNCHER...``: the batch script starts the head so."""

import sys

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork.head.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
