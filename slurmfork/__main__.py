"""``python -m slurmfork`` is the command line."""

import sys

from slurmfork.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
