"""A bare engine: for workers that hold nothing by themselves, and get their engines from a controller."""

from __future__ import annotations

import os
from collections.abc import Mapping


class Bare:
    """``engine: slurmfork.engine.bare:Bare`` makes a worker that waits for ``create_engine``."""

    def set_environment(self, environment: Mapping[str, str]) -> None:
        """Set variables of this process; what began before may have read others."""
        os.environ.update(environment)

    def environment(self, *names: str) -> list[str | None]:
        """Variables of this process; None for one that is not set."""
        return [os.environ.get(name) for name in names]
