"""``python .../engine/__main__.py``: an agent starts the host of an engine so, as a plain Python of the user's.

What the user's own programs can import, so can the host: PYTHONPATH holds, and the working directory comes first, as
with ``python -m``; but only after our own modules are there, which nothing in it can then be taken for.
"""

import os
import sys

if not __package__:
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (light)
    if sys.path and os.path.abspath(sys.path[0]) == here:  # noqa: PTH100
        del sys.path[0]
    sys.path.append(here.rsplit("/", 2)[0])

from slurmfork.engine.host import main

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    sys.exit(main())
