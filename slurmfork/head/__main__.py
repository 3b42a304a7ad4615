"""``python -I .../head/__main__.py --run-dir DIR -- LAUNCHER...``: the batch script starts the head so."""

import os
import sys

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork.head.main import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # threads that hang with a disk are not waited for
