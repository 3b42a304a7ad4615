"""Commands: placeholders, quoting, and when a shell is needed; what comes of it is compared with bash itself."""

from __future__ import annotations

import os
import subprocess

import pytest

from slurmfork.agent.command import BadCommand, arguments, fill, fill_shell

VALUES = {"port": "20001", "ports": "20001,20002", "index": "3", "role": "rollout", "run_dir": "/a b/it's"}
ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("--port={port}", "--port=20001"),
        ("{{port}}", "{port}"),
        ("${port}", "${port}"),
        ("{unknown} {} {0} {port", "{unknown} {} {0} {port"),
        ("{ports}:{index}", "20001,20002:3"),
        ('{"port": {port}}', '{"port": 20001}'),
        ("{role!r} { port }", "{role!r} { port }"),
    ],
)
def test_only_exact_names_in_braces_are_filled(text: str, filled: str) -> None:
    assert fill(text, VALUES) == filled


def test_a_port_that_is_not_reserved_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BadCommand, match="ports: 1"):
        arguments(["serve", "{port}"], {"index": "0"}, ENVIRONMENT)


@pytest.mark.parametrize(
    "text",
    [
        "echo {run_dir}",
        'echo "{run_dir}/x"',
        "echo '{run_dir}/x'",
        'echo "a\'{run_dir}"',
        r"echo \'{run_dir}",
    ],
)
def test_values_reach_a_shell_command_whole_however_they_are_quoted(text: str) -> None:
    argv = arguments(fill_shell(text, VALUES), VALUES, ENVIRONMENT)
    printed = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    assert VALUES["run_dir"] in printed


@pytest.mark.parametrize(
    "text",
    [
        "printf %s\\n a 'b c' \"d e\"",
        'printf "%s|" "a\\$b" "c\\"d" \'e\\f\' g\\ h',
        "printf '%s|' a=b x:y 100% @ , + - _ / .",
        "/bin/echo 'a;b|c&d' \"x > y\"",
    ],
)
def test_without_shell_syntax_there_is_no_shell_and_the_same_arguments(text: str) -> None:
    environment = {**ENVIRONMENT}
    argv = arguments(text, {}, environment)
    assert argv[0] != "bash" or "\\$" in text
    ours = subprocess.run(argv, capture_output=True, timeout=30, check=True).stdout
    theirs = subprocess.run(["bash", "-c", text], capture_output=True, timeout=30, check=True).stdout
    assert ours == theirs


@pytest.mark.parametrize("text", ["sleep $((1))0", "env $HOME", "ls *.py", "ls ~", 'env "$HOME"'])
def test_one_command_with_expansions_is_executed_by_the_shell_in_its_own_place(text: str) -> None:
    argv = arguments(text, {}, ENVIRONMENT)
    assert argv[:2] == ["bash", "-c"]
    assert argv[2] in (f"exec {text}", text)
    assert argv[2].startswith("exec ") or "(" in text


@pytest.mark.parametrize(
    "text", ["a && b", "a; b", "a | b", "a > f", "(a)", "a &", "a\nb", "a `b`", "a 'unclosed", "a \\", "# a"]
)
def test_whatever_else_is_left_to_the_shell_as_it_is(text: str) -> None:
    assert arguments(text, {}, ENVIRONMENT) == ["bash", "-c", text]


@pytest.mark.parametrize("text", ["cd /tmp", "X=1 env", "exec sleep 1", "$PROGRAM x", "module load cuda"])
def test_what_only_a_shell_understands_goes_to_one(text: str) -> None:
    environment = {**ENVIRONMENT, "BASH_FUNC_module%%": "() { :; }"}
    assert arguments(text, {}, environment) == ["bash", "-c", text]


def test_a_program_that_does_not_exist_is_not_hidden_in_a_shell() -> None:
    assert arguments("trian.py --fast", {}, ENVIRONMENT) == ["trian.py", "--fast"]


@pytest.mark.parametrize("command", ["", "  ", [], [""]])
def test_an_empty_command_is_refused(command: str | list[str]) -> None:
    with pytest.raises(BadCommand, match="empty"):
        arguments(command, {}, ENVIRONMENT)
