"""Whole runs on the local backend: how they start and end."""

from __future__ import annotations

from running import Shell


def test_a_failure_that_is_ignored_holds_up_nothing(local: Shell) -> None:
    spec = local.spec(
        """
        name: ignored
        roles:
          flaky: {on_failure: ignore, command: [sh, -c, "exit 3"], ready: {notify: true}}
          steady: {command: [sleep, "1000"]}
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    states = {view["worker"]: (view["state"], view["exit_status"]) for view in local.ps(run_id)}
    assert states == {"flaky/0": ("failed", 3), "steady/0": ("running", None)}
