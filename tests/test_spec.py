"""The spec reader: what it takes, and that every refusal names its line, its path, and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slurmfork.errors import Problem, SpecError
from slurmfork.spec import Spec
from slurmfork.spec.reader import load, loads
from slurmfork.spec.sbatch import ALLOWED, REFUSED, TEMPLATE
from slurmfork.spec.shape import Shape, node_shape
from slurmfork.spec.yamlnodes import resolve

ROOT = Path(__file__).resolve().parent.parent
SPEC = """\
name: t
roles:
  a:
    command: run
"""


def problems(text: str, **options: object) -> list[Problem]:
    """What is wrong with a text; nothing raised is a failure of the test."""
    with pytest.raises(SpecError) as caught:
        loads(text, file="s.yaml", **options)  # type: ignore[arg-type]
    assert str(caught.value)
    for problem in caught.value.problems:
        assert "\n" not in str(problem)
    return caught.value.problems


def top(lines: str) -> str:
    """A spec with ``lines`` from its line 2 on."""
    return f"name: t\n{lines}\nroles: {{a: {{command: run}}}}\n"


def role(lines: str) -> str:
    """A spec whose role ``a`` has ``lines`` from line 5 on."""
    body = "\n".join("    " + line for line in lines.splitlines())
    return f"{SPEC}{body}\n"


def engine(lines: str) -> str:
    """A spec whose role ``a`` is ``lines`` from line 4 on."""
    body = "\n".join("    " + line for line in lines.splitlines())
    return f"name: t\nroles:\n  a:\n{body}\n"


def shared(own: str, target: str) -> str:
    """A spec with a role ``b``, on line 6, that is to live in the processes of ``a``."""
    return (
        f"name: t\nroles:\n  a:\n    {target}\n    gpus: 1\n"
        f"  b: {{{own}, strategy: {{type: colocation, target: a, fork: false}}}}\n"
    )


def roles(text: str) -> str:
    """A spec with these roles from line 3 on; each line is ``name: {...}`` without its command."""
    lines = [f"  {line}".replace("{", "{command: run, ", 1) for line in text.splitlines()]
    return "name: t\nroles:\n" + "\n".join(lines) + "\n"


# --- what is taken -----------------------------------------------------------------------------------------


def test_an_engine_has_arguments_of_any_kind_and_says_itself_when_it_is_ready() -> None:
    given = "engine: a.b:C\nargs: [1, 2.5, x, [true, null]]\nkwargs: {size: {deep: [1]}}\nready: {timeout: 600}"
    found = loads(engine(given)).roles["a"]
    assert (found.engine, found.command) == ("a.b:C", None)
    assert found.args == [1, 2.5, "x", [True, None]]
    assert found.kwargs == {"size": {"deep": [1]}}
    assert found.ready is not None
    assert (found.ready.notify, found.ready.timeout) == (True, 600)


def test_a_role_may_share_the_processes_of_its_target() -> None:
    found = loads(shared("engine: a:B", "engine: a:B")).roles
    assert (found["a"].shared, found["b"].shared) == (False, True)


def test_smallest() -> None:
    spec = loads(SPEC)
    assert (spec.name, spec.backend, spec.nodes) == ("t", "slurm", None)
    assert spec.roles["a"].command == "run"
    assert spec.roles["a"].replicas == 1
    assert Spec.from_json(spec.to_json()) == spec


def test_scalars_are_yaml_1_2() -> None:
    spec = loads(
        top(
            "slurm: {time: 02:00:00, mem: 0x10, kill-on-invalid-dep: yes, begin: 2024-01-01,"
            " nice: true, hold: false}\n"
            "env: {A: on, B: no, C: 1_000, D: 0o17, E: true, F: 1.50, G: '', H: '5', I: 2024-01-01, J: 1:30}"
        )
    )
    assert spec.slurm == {
        "time": "02:00:00",
        "mem": "0x10",
        "kill-on-invalid-dep": "yes",
        "begin": "2024-01-01",
        "nice": True,
    }
    assert spec.env == {
        "A": "on",
        "B": "no",
        "C": "1_000",
        "D": "0o17",
        "E": "true",
        "F": "1.50",
        "G": "",
        "H": "5",
        "I": "2024-01-01",
        "J": "1:30",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1.", 1.0),
        ("-.5e3", -500.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("", None),
        ("~", None),
        ("Null", None),
        ("TRUE", True),
        ("False", False),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("yes", "yes"),
        ("12:30:45", "12:30:45"),
        ("9" * 60, "9" * 60),
        ("١", "١"),
    ],
)
def test_resolve(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_numbers_of_every_notation() -> None:
    spec = loads(role("replicas: 0x10\ngpus: 0o10\nstop: {grace: 5}\nready: {notify: true, timeout: 1.5e2}"))
    found = spec.roles["a"]
    assert (found.replicas, found.gpus, found.stop.grace) == (16, 8, 5.0)
    assert found.ready is not None
    assert found.ready.timeout == 150.0


def test_command_words_are_text_as_written() -> None:
    spec = loads('name: t\nroles: {a: {command: [run, 5, 0.10, true, "", off, "{port}"], ports: 1}}')
    assert spec.roles["a"].command == ["run", "5", "0.10", "true", "", "off", "{port}"]


def test_lists_of_options_are_joined() -> None:
    assert loads(top("slurm: {mail-type: [END, FAIL], nodelist: [n1, n2]}")).slurm == {
        "mail-type": "END,FAIL",
        "nodelist": "n1,n2",
    }


def test_core_tags_are_taken() -> None:
    spec = loads("name: !!str 5\nnodes: !!int 0x2\nenv: !!map {A: ! b}\nroles: {a: {command: !!seq [x]}}")
    assert (spec.name, spec.nodes, spec.env) == ("5", 2, {"A": "b"})


def test_sections_without_value_are_left_out() -> None:
    spec = loads("name: t\nenv:\nslurm: ~\nsecrets:\nnodes:\nroles: {a: {command: run, restart: , ready: null}}")
    assert (spec.env, spec.slurm, spec.secrets, spec.nodes, spec.roles["a"].ready) == ({}, {}, [], None, None)


def test_every_option_of_sbatch_is_known() -> None:
    for option in sorted(ALLOWED - {TEMPLATE}):
        for value in ("1", "true"):
            try:
                loads(top(f"slurm: {{{option}: {value}}}"))
                break
            except SpecError:
                continue
        else:
            pytest.fail(f"{option} is refused with a value and with true")


@pytest.mark.parametrize("name", ["docs/examples/grpo.yaml", "docs/examples/quickstart.yaml", "docs/examples/ddp.yaml"])
def test_examples(name: str) -> None:
    assert load(ROOT / name).roles


def test_signal_names() -> None:
    assert loads(role("stop: {signal: SIGTERM}")).roles["a"].stop.signal == "TERM"
    assert loads(role("stop: {signal: USR1}")).roles["a"].stop.signal == "USR1"


def test_placeholders_that_are_none_need_no_port() -> None:
    for text in ("echo {{port}}", "echo ${port}", "echo '{\"a\": 1}'", "echo {index} {run_dir}"):
        assert loads(SPEC.replace("run", json.dumps(text))).roles["a"].command == text


def test_template_is_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "site.sh.j2").write_text("x")
    path = tmp_path / "s.yaml"
    path.write_text(top("slurm: {template: site.sh.j2}"))
    assert load(path).slurm["template"] == str(tmp_path / "site.sh.j2")
    path.write_text(top("slurm: {template: other.j2}"))
    with pytest.raises(SpecError, match=r"s\.yaml:2: slurm\.template: there is no file"):
        load(path)


def test_backend_goes_over_the_file() -> None:
    assert loads(SPEC, backend="local").backend == "local"
    (found,) = problems(SPEC, backend="pbs")
    assert (found.file, found.path) == ("--backend", "backend")
    assert "local, slurm, ray" in found.message


# --- what is refused: (text, line, path, part of the message) ----------------------------------------------

LEAVES = [
    (top("nodes: eight"), 2, "nodes", "expected a whole number, got the text 'eight'"),
    (top("nodes: '8'"), 2, "nodes", "expected a whole number, got the text '8'; leave the quotes off"),
    (top("nodes: 1.5"), 2, "nodes", "expected a whole number, got the number 1.5"),
    (top("nodes: true"), 2, "nodes", "expected a whole number, got true"),
    (top("nodes: [1]"), 2, "nodes", "expected a whole number, got a list"),
    (top("nodes: {a: 1}"), 2, "nodes", "expected a whole number, got keys and values"),
    (top("nodes: 0"), 2, "nodes", "must be 1 or more, got 0"),
    (top("nodes: -1"), 2, "nodes", "must be 1 or more, got -1"),
    (top("nodes: 99999999"), 2, "nodes", "must be 1,000,000 or less, got 99999999"),
    (top(f"nodes: {'9' * 5000}"), 2, "nodes", "expected a whole number"),
    (role("gpus: -1"), 5, "roles.a.gpus", "must be 0 or more, got -1"),
    (role("ports: 65"), 5, "roles.a.ports", "must be 64 or less, got 65"),
    (role("stop: {grace: -0.5}"), 5, "roles.a.stop.grace", "must be 0 or more, got -0.5"),
    (role("stop: {grace: .nan}"), 5, "roles.a.stop.grace", "expected a number"),
    (role("ready:\n  tcp: true\n  timeout: 0\nports: 1"), 7, "roles.a.ready.timeout", "must be more than 0"),
    (role("ready:\n  notify: yes"), 6, "roles.a.ready.notify", "expected true or false, got the text 'yes'"),
    (role("main: 1"), 5, "roles.a.main", "expected true or false, got the number 1"),
    (role("main:"), 5, "roles.a.main", "no value"),
    (role("cwd: 5"), 5, "roles.a.cwd", "expected text, got the number 5; put it in quotes"),
    (
        role("restart: on-failure"),
        5,
        "roles.a.restart",
        "expected keys and values, got the text 'on-failure'",
    ),
    (role("restart:\n  policy: sometimes"), 6, "roles.a.restart.policy", "one of never, on-failure, always"),
    (role("on_failure: ignored"), 5, "roles.a.on_failure", "did you mean 'ignore'?"),
    (top("env: [A]"), 2, "env", "expected keys and values, got a list"),
    (top("env:\n  A: 1\n  B: [x]"), 4, "env.B", "expected text, got a list"),
    (top("env:\n  A:"), 3, "env.A", 'no value; write ""'),
    (top("secrets: TOKEN"), 2, "secrets", "expected a list, got the text 'TOKEN'"),
    (top("secrets:\n  - A\n  - {B: c}"), 4, "secrets[1]", "expected text, got keys and values"),
    (top("slurm: [gpu]"), 2, "slurm", "expected keys and values, got a list"),
    (top("slurm: {partition: {a: b}}"), 2, "slurm.partition", "expected text, got keys and values"),
    (top("slurm: {partition: }"), 2, "slurm.partition", "no value"),
    (top("slurm: {nodelist: []}"), 2, "slurm.nodelist", "an empty list"),
    ("name: 5\nroles: {a: {command: run}}", 1, "name", "expected text, got the number 5; put it in quotes"),
    ("name: t\nroles:\n  a: run", 3, "roles.a", "expected keys and values, got the text 'run'"),
    ("name: t\nroles: [a]", 2, "roles", "expected keys and values, got a list"),
    (
        "name: t\nroles:\n  a:\n    command: 5",
        4,
        "roles.a.command",
        "expected text or a list, got the number 5",
    ),
    (
        "name: t\nroles:\n  a:\n    command: {a: b}",
        4,
        "roles.a.command",
        "text or a list, got keys and values",
    ),
    (
        "name: t\nroles:\n  a:\n    command: [run, {port}]\n    ports: 1",
        4,
        "roles.a.command[1]",
        'write "{port}", in quotes',
    ),
    ("name: t\nroles:\n  a:\n    command: [run, ~]", 4, "roles.a.command[1]", 'no value; write ""'),
]
KEYS = [
    (role("replica: 4"), 5, "roles.a.replica", "unknown key 'replica'; did you mean 'replicas'?"),
    (role("Per-Node: 4"), 5, "roles.a.Per-Node", "did you mean 'per_node'?"),
    (role("target: b"), 5, "roles.a.target", "it goes under `strategy:`"),
    (role("zzz: 1"), 5, "roles.a.zzz", "the keys here are command, engine, args, kwargs"),
    (role("stop:\n  signal: INT\n  kill: 5"), 7, "roles.a.stop.kill", "the keys here are signal, grace"),
    (top("partition: gpu"), 2, "partition", "options of sbatch go under `slurm:`"),
    (top("role: {}"), 2, "role", "did you mean 'roles'?"),
    (top("local: {gpus_per_node: 2}"), 2, "local.gpus_per_node", "did you mean 'gpus-per-node'?"),
    ("nodes: 1\nroles: {a: {command: run}}", None, "name", "missing"),
    ("name: t", None, "roles", "missing"),
    ("name: t\nroles:\n  a:\n    gpus: 1", 3, "roles.a.command", "missing"),
    ("name: t\nname: u\nroles: {a: {command: run}}", 2, "name", "is given twice (first on line 1)"),
    (
        "name: t\nroles:\n  a: {command: run}\n  b: {command: run}\n  a: {command: run}",
        5,
        "roles.a",
        "key 'a' is given twice (first on line 3)",
    ),
]
YAML = [
    (top("env:\n\tA: b"), 3, "", "a tab in the indentation"),
    (top("env: &e {A: b}"), 2, "env", "anchors (&e)"),
    (top("env: {A: *e}"), 2, "env.A", "aliases (*e)"),
    (top("env:\n  <<: {A: b}"), 3, "env", "merge keys"),
    (top("env: {A: !secret b}"), 2, "env.A", "tags ('!secret')"),
    (top("env: {A: !!binary b}"), 2, "env.A", "tags ('!!binary')"),
    (top("env: !!str {A: b}"), 2, "env", "tags ('!!str')"),
    (top("nodes: !!int x"), 2, "nodes", "'x' is not of the type"),
    (top("env: {A: !x!y b}"), 2, "", "tags"),
    (SPEC + "---\nname: u\n", 5, "", "second document"),
    (top("env: {1: b}"), 2, "env", "a key must be text; put 1 in quotes"),
    (top("env: {true: b}"), 2, "env", "a key must be text"),
    (top("env: {~: b}"), 2, "env", "a key must be text"),
    (top("? [a]\n: b"), 2, "", "a key must be text, not a list"),
    (top("? {a: b}\n: b"), 2, "", "a key must be text, not a mapping"),
    (top(f"env: {{{'A' * 300}: b}}"), 2, "env", "a key of 300 characters"),
    (top("env: {A: 'b}"), 2, "", "quote that opens here is never closed"),
    (top("env: [A, b\nnodes: 1"), 2, "", "not closed"),
    (top("env: {A: b: c"), 2, "", "not closed"),
    (top("setup: a: b"), 2, "", "a ':' where no key can stand"),
    (top("setup: @x"), 2, "", "cannot begin with '@'"),
    (top("setup: %x"), 2, "", "cannot begin with '%'"),
    (top('setup: "\\q"'), 2, "", "unknown escape"),
    (top("slurm:\n  time: 1\n mem: 1"), 4, "", "check the indentation"),
    (top("- x"), 2, "", "check the indentation"),
    (top('env: {A: "a\\0b"}'), 2, "env.A", "NUL"),
    (top("env: {A: a\0b}"), 2, "", "NUL"),
    (top("env: {A: a\x1bb}"), 2, "", "control character '\\x1b'"),
    (top("env: {A: " + "[" * 60 + "]" * 60 + "}"), 2, None, "nested deeper than 50"),
    ("", 1, "", "the file is empty"),
    ("# nothing\n", 1, "", "the file is empty"),
    ("---\n", 1, "", "the file is empty"),
    ("- a\n", 1, "", "expected keys and values at the top, got a list"),
    ("run\n", 1, "", "expected keys and values at the top, got the text 'run'"),
]
RULES = [
    ("name: a b\nroles: {a: {command: run}}", 1, "name", "is not a name"),
    ("name: " + "x" * 41 + "\nroles: {a: {command: run}}", 1, "name", "40 at most"),
    ("name: t\nroles: {}", 2, "roles", "no roles"),
    ("name: t\nroles:", 2, "roles", "no roles"),
    ("name: t\nroles:\n  ../x: {command: run}", 3, "roles.../x", "is not a role's name"),
    ("name: t\nroles:\n  a/0: {command: run}", 3, "roles.a/0", "is not a role's name"),
    ('name: t\nroles:\n  "a\\nb": {command: run}', 3, "roles.a\\nb", "is not a role's name"),
    (role("replicas: 2\nper_node: 1"), 6, "roles.a.per_node", "exclude each other"),
    (role("autostart: false\nmain: true"), 6, "roles.a.main", "a main role has to start by itself"),
    (role("strategy:\n  target: a"), 6, "roles.a.strategy.target", "only with `type: colocation`"),
    (role("strategy:\n  fork: false"), 6, "roles.a.strategy.fork", "false is for `type: colocation`"),
    ("name: t\nroles:\n  a: {gpus: 1}", 3, "roles.a.command", "missing; a role has a command, or an engine"),
    (role("engine: a.b:C"), 5, "roles.a.engine", "exclude each other"),
    (role("args: [1]"), 5, "roles.a.args", "for roles with an engine"),
    (role("kwargs: {a: 1}"), 5, "roles.a.kwargs", "for roles with an engine"),
    (role("pickle: true"), 5, "roles.a.pickle", "for roles with an engine"),
    (engine("engine: a.b.C"), 4, "roles.a.engine", "write package.module:Class"),
    (engine("engine: a b:C"), 4, "roles.a.engine", "names no class"),
    (engine("engine: 5"), 4, "roles.a.engine", "expected text"),
    (engine("engine: a:B\nargs: {b: 1}"), 5, "roles.a.args", "expected a list"),
    (engine("engine: a:B\nargs: [1, [.nan]]"), 5, "roles.a.args[1][0]", "not a finite number"),
    (engine("engine: a:B\nkwargs: [1]"), 5, "roles.a.kwargs", "expected keys and values"),
    (engine("engine: a:B\nkwargs:\n  b-c: 1"), 6, "roles.a.kwargs.b-c", "no name of an argument"),
    (engine("engine: a:B\nkwargs: {b: " + "x" * 100_001 + "}"), 5, "roles.a.kwargs", "put it in a file"),
    (engine("engine: a:B\nports: 1\nready: {http: /}"), 6, "roles.a.ready.http", "only the timeout can be given"),
    (engine("enigne: a:B\ncommand: x"), 4, "roles.a.enigne", "did you mean 'engine'?"),
    (shared("command: x", "engine: a:B"), 6, "roles.b.strategy.fork", "false needs an `engine`"),
    (shared("engine: a:B", "command: x"), 6, "roles.b.strategy.fork", "a has a command"),
    (shared("engine: a:B, env: {A: b}", "engine: a:B"), 6, "roles.b.env", "not with `fork: false`"),
    (shared("engine: a:B, ports: 2", "engine: a:B"), 6, "roles.b.ports", "not with `fork: false`"),
    (
        shared("engine: a:B", "engine: a:B")
        + "  c: {engine: a:B, strategy: {type: colocation, target: b, fork: false}}",
        7,
        "roles.c.strategy.fork",
        "make a the target",
    ),
    (role("strategy: {type: colocation}"), 5, "roles.a.strategy.target", "missing"),
    (
        role("strategy: {type: colocation, target: a}"),
        5,
        "roles.a.strategy.target",
        "cannot go beside itself",
    ),
    (
        roles("rollout: {}\neval: {strategy: {type: colocation, target: rolout}}"),
        4,
        "roles.eval.strategy.target",
        "there is no role 'rolout'; did you mean 'rollout'?",
    ),
    (
        roles("x: {}\ny: {strategy: {type: colocation, target: x}, per_node: 1}"),
        4,
        "roles.y.per_node",
        "not with colocation",
    ),
    (
        roles(
            "x: {}\na: {strategy: {type: colocation, target: c}}\n"
            "b: {strategy: {type: colocation, target: a}}\nc: {strategy: {type: colocation, target: b}}"
        ),
        4,
        "roles.a.strategy.target",
        "in a circle: a -> c -> b -> a",
    ),
    (
        roles(
            "x: {}\ny: {strategy: {type: colocation, target: x}, autostart: false}\n"
            "z: {strategy: {type: colocation, target: y}}"
        ),
        5,
        "roles.z.strategy.target",
        "y is not started by itself",
    ),
    (
        roles("x: {main: true}\ny: {main: true}"),
        4,
        "roles.y.main",
        "there can be one main role, and x is one",
    ),
    (
        roles("x: {}\ny: {strategy: {type: colocation, target: x}, autostart: false, main: true}"),
        4,
        "roles.y.main",
        "has to start by itself",
    ),
    (role("ready: {}"), 5, "roles.a.ready", "exactly one of notify, http and tcp; it has none"),
    (role("ready: {notify: true, tcp: true}\nports: 1"), 5, "roles.a.ready", "it has notify and tcp"),
    (role("ready:\n  http: health\nports: 1"), 6, "roles.a.ready.http", "begins with /"),
    (role("ready:\n  http: /a b\nports: 1"), 6, "roles.a.ready.http", "no blanks"),
    (role("ready:\n  http: ''\nports: 1"), 6, "roles.a.ready.http", "begins with /"),
    (role("ready:\n  http: /health"), 6, "roles.a.ready.http", "add `ports: 1`"),
    (role("ready:\n  tcp: true"), 6, "roles.a.ready.tcp", "add `ports: 1`"),
    (role("stop: {signal: SIGTRM}"), 5, "roles.a.stop.signal", "did you mean 'TERM'?"),
    (role("stop: {signal: term}"), 5, "roles.a.stop.signal", "did you mean 'TERM'?"),
    (role("stop: {signal: '15'}"), 5, "roles.a.stop.signal", "write TERM"),
    (role("stop: {signal: KILL}"), 5, "roles.a.stop.signal", "cannot be handled"),
    (role("stop: {signal: SIGSTOP}"), 5, "roles.a.stop.signal", "cannot be handled"),
    (role("cwd: runs"), 5, "roles.a.cwd", "is not absolute"),
    (role("env: {A B: c}"), 5, "roles.a.env.A B", "not a variable's name"),
    (role("env: {SLURMFORK_X: c}"), 5, "roles.a.env.SLURMFORK_X", "set by slurmfork itself"),
    (top("env: {1A: c}"), 2, "env.1A", "not a variable's name"),
    (top(f"env: {{A: {'x' * 100_001}}}"), 2, "env.A", "over 100,000 bytes"),
    (top("secrets: [A, B-C]"), 2, "secrets[1]", "not a variable's name"),
    (top("secrets: [SLURMFORK_X]"), 2, "secrets[0]", "set by slurmfork itself"),
    (top("secrets: [A=b]"), 2, "secrets[0]", "only the name goes here"),
    (top("env: {A: b}\nsecrets: [A]"), 3, "secrets[0]", "A is in `env` too"),
    ("name: t\nroles:\n  a:\n    command: []", 4, "roles.a.command", "empty"),
    ("name: t\nroles:\n  a:\n    command: ''", 4, "roles.a.command", "empty"),
    ("name: t\nroles:\n  a:\n    command: ['', x]", 4, "roles.a.command", "empty"),
    ("name: t\nroles:\n  a:\n    command: run {port}", 4, "roles.a.command", "{port} is used, but no ports"),
    ("name: t\nroles:\n  a:\n    command: [run, '--p={ports}']", 4, "roles.a.command", "{ports} is used"),
    (top("slurm: {gpus_per_node: 8}"), 2, "slurm.gpus_per_node", "did you mean 'gpus-per-node'?"),
    (top("slurm:\n  partitions: x"), 3, "slurm.partitions", "did you mean 'partition'?"),
    (top("slurm: {p: x}"), 2, "slurm.p", "long names"),
    (top("slurm: {--time: 5}"), 2, "slurm.--time", "did you mean 'time'?"),
    (top("slurm: {xyzzy: 1}"), 2, "slurm.xyzzy", "sbatch has no option 'xyzzy'; `sbatch --help`"),
    (top("slurm: {partition: true}"), 2, "slurm.partition", "partition needs a value, not true"),
    (top("slurm: {contiguous: 5}"), 2, "slurm.contiguous", "takes no value; write contiguous: true"),
    (top('slurm: {comment: "a\\nb"}'), 2, "slurm.comment", "one line"),
    (top("slurm: {gpus-per-node: many}"), 2, "slurm.gpus-per-node", "'many' is not a number, or type:number"),
    (top("slurm: {gres: 'gpu:a100:x'}"), 2, "slurm.gres", "is not gpu:number"),
    (top("slurm: {gres: 'gpu:8', gpus-per-node: 8}"), 2, "slurm.gres", "asked for twice"),
    (
        role("gpus: 1\n") + "slurm: {gres: 'nvme:1,shard:2'}\n",
        6,
        "slurm.gres",
        "shard:2 is a part of a GPU that others",
    ),
    (role("gpus: 1\n") + "slurm: {gres: 'mps:50'}\n", 6, "slurm.gres", "and the role a needs whole GPUs"),
    (top("slurm: {cpus-per-task: 0}"), 2, "slurm.cpus-per-task", "must be 1 or more"),
    (top("slurm: {cpus-per-task: 4, cpus-per-gpu: 4}"), 2, "slurm.cpus-per-gpu", "asked for twice"),
    (top("slurm: {cpus-per-gpu: x, gres: gpu:2}"), 2, "slurm.cpus-per-gpu", "'x' is not a number"),
    *((top(f"slurm: {{{key}: 1}}"), 2, f"slurm.{key}", f"{key} cannot be set: {why}") for key, why in REFUSED.items()),
]


@pytest.mark.parametrize(
    ("text", "line", "path", "message"),
    [
        pytest.param(*case, id=f"{case[2]}: {case[3][:30]}".encode("ascii", "replace").decode().replace("\n", " "))
        for case in (*LEAVES, *KEYS, *YAML, *RULES)
    ],
)
def test_refused(text: str, line: int | None, path: str | None, message: str) -> None:
    (found,) = problems(text)
    assert message in found.message
    assert found.line == line
    assert found.file == "s.yaml"
    if path is not None:
        assert found.path == path


def test_all_problems_at_once_in_the_order_of_the_file() -> None:
    text = (
        "nodes: eight\nname: t\nslurm: {ntasks: 4, tim: 5}\nroles:\n"
        "  b:\n    command: [x, {port}]\n    replica: 1\n"
        "  a:\n    gpus: -1\n    stop: {signal: XX, grace: no}\n"
    )
    found = problems(text, overrides=["env.A B=1", "nodse=1"])
    assert [(problem.line, problem.path) for problem in found] == [
        (1, "nodes"),
        (3, "slurm.ntasks"),
        (3, "slurm.tim"),
        (6, "roles.b.command[1]"),
        (7, "roles.b.replica"),
        (8, "roles.a.command"),
        (9, "roles.a.gpus"),
        (10, "roles.a.stop.grace"),
        (10, "roles.a.stop.signal"),
        (None, "nodse"),
        (None, "env.A B"),
    ]
    assert [problem.file for problem in found][-2:] == ["--set", "--set"]
    with pytest.raises(SpecError, match=r"^s\.yaml:1: nodes: expected a whole number, got the text 'eight'\n"):
        loads(text, file="s.yaml")


def test_one_mistake_makes_one_problem() -> None:
    """A value that was refused has no further problems follow from it."""
    assert len(problems(role("ports: x\nready: {tcp: true}"))) == 1
    assert len(problems("name: t\nroles:\n  a: {command: 'x {port}', ports: x}")) == 1
    assert len(problems(role("strategy: {type: colocation, target: 5}"))) == 1
    assert len(problems(roles("x: {}\ny: {strategy: {type: colocated, target: x}, autostart: false}"))) == 1
    assert len(problems(top("slurm: {template: 5, gres: [[x]]}"))) == 1


def test_pure_python_parser_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyYAML has no libyaml the lines and words are the same."""
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    for text, line, _, message in (*YAML, *KEYS):
        found = problems(text)[0]
        assert (found.line, message in found.message) == (line, True), text
    assert problems(top('env: {A: "\\ud800"}'))[0].line == 2


# --- --set -------------------------------------------------------------------------------------------------


def test_overrides() -> None:
    overrides = [
        "nodes=2",
        "slurm.time=02:00:00",
        "slurm.comment=run #3: the *best*, [sic]",
        "slurm.mail-type=[END, FAIL]",
        "env.B='x'",
        'env.C="a\\tb"',
        "env.D==",
        "roles.a.gpus=3",
        "roles.a.command=[x, 5]",
        "roles.b={command: y, strategy: {type: colocation, target: a}}",
        "roles.a.stop.grace=2",
    ]
    spec = loads(SPEC, overrides=overrides)
    assert spec.nodes == 2
    assert spec.slurm == {"time": "02:00:00", "comment": "run #3: the *best*, [sic]", "mail-type": "END,FAIL"}
    assert spec.env == {"B": "x", "C": "a\tb", "D": "="}
    assert (spec.roles["a"].gpus, spec.roles["a"].command, spec.roles["a"].stop.grace) == (3, ["x", "5"], 2.0)
    assert spec.roles["b"].colocated


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("nodes", "nodes", "expected key=value"),
        ("=4", "", "expected key=value"),
        ("a..b=4", "a..b", "expected key=value"),
        ("nodse=4", "nodse", "did you mean 'nodes'?"),
        ("nodes=x", "nodes", "expected a whole number"),
        ("nodes.x=1", "nodes", "expected a whole number, got keys and values"),
        ("roles.b.gpus=1", "roles.b.gpus", "there is no role 'b'"),
        ("roles.a.gpu=1", "roles.a.gpu", "did you mean 'gpus'?"),
        ("roles.b={gpus: 1}", "roles.b.command", "missing"),
        ("roles.a.command=[x", "roles.a.command", "not closed"),
        ("roles.a.command=[&x y]", "roles.a.command", "anchors"),
        ("env.A=", "env.A", "no value"),
        ("env.A=a\0b", "env.A", "NUL"),
        ("slurm.ntasks=4", "slurm.ntasks", "cannot be set"),
    ],
)
def test_override_refused(override: str, path: str, message: str) -> None:
    (found,) = problems(SPEC, overrides=[override])
    assert (found.path, found.file, found.line) == (path, "--set", None)
    assert message in found.message


def test_override_mends_the_file() -> None:
    assert loads(top("nodes: many"), overrides=["nodes=3"]).nodes == 3


# --- files -------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    cases = {
        tmp_path / "none.yaml": "cannot be read: No such file",
        tmp_path: "is a directory",
        tmp_path / "a\0b": "cannot be read",
    }
    for path, message in cases.items():
        with pytest.raises(SpecError) as caught:
            load(path)
        assert message in str(caught.value)
        assert caught.value.problems[0].file == os.fspath(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SPEC)
    path.chmod(0)
    with pytest.raises(SpecError, match="cannot be read: Permission denied"):
        load(path)


def test_encoding(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SPEC.replace("\n", "\r\n").encode())
    assert load(path).name == "t"
    path.write_bytes(SPEC.encode() + b"# \xff\n")
    with pytest.raises(SpecError, match=r":5: is not UTF-8"):
        load(path)


def test_large_files_are_refused_without_parsing(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"[" * 10_000_000)
    began = time.monotonic()
    with pytest.raises(SpecError, match="larger than 1,000,000 bytes"):
        load(path)
    assert time.monotonic() - began < 5
    with pytest.raises(SpecError, match="larger than 1,000,000 bytes"):
        loads("x" * 1_000_001)


@pytest.mark.parametrize(
    "text",
    ["[" * 999_000, "{a: " * 200_000, "- " * 400_000, "a:\n" * 300_000, "? " * 400_000, "'" * 999_999],
    ids=["brackets", "braces", "dashes", "keys", "question marks", "quotes"],
)
def test_hostile_text_is_refused_in_time(text: str) -> None:
    with pytest.raises(SpecError):
        loads(text)


# --- shape -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slurm", "gpus", "cpus"),
    [
        ("{}", None, None),
        ("{gpus-per-node: 8}", 8, None),
        ("{gpus-per-node: a100:8}", 8, None),
        ("{gpus-per-node: 'a100:4,h100:2'}", 6, None),
        ("{gpus-per-node: 0}", 0, None),
        ("{gres: gpu:8}", 8, None),
        ("{gres: gpu:a100:8}", 8, None),
        ("{gres: 'gres:gpu:2'}", 2, None),
        ("{gres: gpu}", 1, None),
        ("{gres: gpu:a100}", 1, None),
        ("{gres: gpu:3g.20gb:2}", 2, None),
        ("{gres: ['gpu:a100:2', 'nvme:1', 'gpu:v100:1']}", 3, None),
        ("{gres: nvme:1}", None, None),
        ("{gres: gpu_mem:80}", None, None),
        ("{cpus-per-task: 16}", None, 16),
        ("{cpus-per-gpu: 4, gpus-per-node: 8}", 8, 32),
        ("{cpus-per-gpu: 4}", None, None),
    ],
)
def test_shape(slurm: str, gpus: int | None, cpus: int | None) -> None:
    assert node_shape(loads(top(f"slurm: {slurm}"))) == Shape(None, gpus, cpus)


def test_shape_of_local_nodes() -> None:
    text = top("nodes: 3\nslurm: {gpus-per-node: 8, cpus-per-task: 64}")
    assert node_shape(loads(text, backend="local")) == Shape(3, 8, None)
    with_local = text.replace("nodes: 3", "nodes: 3\nlocal: {gpus-per-node: 2, cpus-per-node: 4}")
    assert node_shape(loads(with_local, backend="local")) == Shape(3, 2, 4)
    assert node_shape(loads(with_local)) == Shape(3, 8, 64)


# --- properties --------------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert loads(text).roles


WORDS = [
    "name",
    "nodes",
    "roles",
    "slurm",
    "env",
    "a",
    "command",
    "gpus",
    "strategy",
    "type",
    "target",
    "ready",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(WORDS) | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_data_is_read_or_refused(data: object) -> None:
    text = json.dumps(
        {"name": "t", "roles": {"a": {"command": "x"}}, **(data if isinstance(data, dict) else {"x": data})}
    )
    with contextlib.suppress(SpecError):
        spec = loads(text)
        assert Spec.from_json(spec.to_json()) == spec


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)


@given(st.dictionaries(st.from_regex(r"\A[A-Z][A-Z_]{0,8}\Z"), PRINTABLE, max_size=4))
def test_env_values_come_through(env: dict[str, str]) -> None:
    text = json.dumps({"name": "t", "env": env, "roles": {"a": {"command": "x"}}}, ensure_ascii=False)
    assert loads(text).env == env


# --- imports and docs --------------------------------------------------------------------------------------


def imported(module: str) -> set[str]:
    """All modules that importing one brings with it."""
    script = f"import sys; old = set(sys.modules); import {module}; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_is_light() -> None:
    """The reader is on the way of every command: nothing but YAML and msgspec may come with it."""
    heavy = ["aiohttp", "jinja2", "paramiko", "cryptography", "rich", "click", "asyncio", "ssl", "difflib"]
    assert imported("slurmfork.spec.reader").isdisjoint(heavy)


def test_agents_do_not_import_the_reader() -> None:
    assert imported("slurmfork.messages").isdisjoint(["yaml", "slurmfork.spec.reader"])


def test_the_page_is_fresh_and_its_example_is_a_spec() -> None:
    checked = [sys.executable, str(ROOT / "scripts" / "specdoc"), "--check"]
    done = subprocess.run(checked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "spec.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    spec = loads(example)
    assert set(spec.roles) == {"rollout", "trainer", "monitor", "reference", "eval"}
    for field in msgspec.structs.fields(Spec):
        assert f"`{field.encode_name}`" in page
