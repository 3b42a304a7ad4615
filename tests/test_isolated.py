"""The tests of the agent, and some of whole runs, once more, with all that they start in PID namespaces.

All tests can be run so: ``SLURMFORK_TEST_ISOLATION=namespace``. These are of the parts that everything else is made of.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from namespaced import again, common, may_make_namespaces

HERE = Path(__file__).parent
FILES = {  # and which of their tests
    "test_agent_end.py": "",
    "test_agent_stop.py": "",
    "test_agent_workers.py": "",
    "test_cli_local.py": "status_and_ps_of or test_fork_and_stop",
    "test_engine_ends.py": "started_again",
    "test_local_run.py": "lost_agent_and_guardian or cuts_a_long_stop_short",
    "test_probing.py": "agent_that_was_killed or no_record_names",
}

pytestmark = [
    pytest.mark.skipif(not may_make_namespaces(), reason="no PID namespaces for this user on this machine"),
    pytest.mark.skipif("SLURMFORK_TEST_ISOLATION" in os.environ, reason="all tests are run so already"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("file", FILES)
def test_isolated(file: str) -> None:
    with common() as commons:
        again([], commons, str(HERE / file), "-k", FILES[file], SLURMFORK_TEST_ISOLATION="namespace")
