"""The batch script: what it says, that no value breaks out of its place, and how it ends under bash."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import wait_until
from rendering import HOSTILE, LINE_BREAKS, Stage, checked, make_spec, script_of

from slurmfork import process
from slurmfork.backends.slurm_options import seconds
from slurmfork.errors import SpecError
from slurmfork.plan import Request

GOLDEN = Path(__file__).with_name("golden")
TYPICAL = {
    "slurm": {"partition": "gpu", "time": "02:00:00", "exclusive": True, "comment": 'it\'s 50 % "done"'},
    "setup": "module load cuda\nexport HF_HOME='/scratch/hf'\n",
}


# --- what it says


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_golden(tmp_path: Path, backend: str) -> None:
    text = script_of(make_spec(backend, **TYPICAL))
    checked(text, tmp_path)
    path = GOLDEN / f"batch-{backend}.sh"
    if os.environ.get("SLURMFORK_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"set SLURMFORK_WRITE_GOLDEN=1 to rewrite {path.name}, and read the difference"


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_rendering_is_pure(backend: str) -> None:
    spec = make_spec(backend, **TYPICAL)
    assert script_of(spec) == script_of(spec)


def directives(**slurm: object) -> list[str]:
    lines = script_of(make_spec(slurm=slurm)).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_all_directives_stand_before_the_first_command() -> None:
    lines = script_of(make_spec(**TYPICAL)).splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < first


def test_own_options_come_out_and_take_the_place_of_the_derived() -> None:
    found = directives(**{"job-name": "mine", "gpus-per-node": "a100:4", "cpus-per-gpu": 8, "nice": True})
    assert {"--job-name=mine", "--gpus-per-node=a100:4", "--cpus-per-gpu=8", "--nice"} <= set(found)
    assert not [one for one in found if one.startswith(("--cpus-per-task", "--job-name=grpo"))]
    assert sum(one.startswith("--gpus-per-node") for one in found) == 1


@pytest.mark.parametrize(("gres", "asked"), [("nvme:1", True), ("gpu:a100:8", False), ("gpu", False)])
def test_other_gres_do_not_stand_for_the_gpus_that_roles_need(gres: str, asked: bool) -> None:
    found = directives(gres=gres)
    assert ("--gpus-per-node=8" in found) == asked
    assert f"--gres={gres}" in found


def test_lists_are_joined_and_false_is_left_out() -> None:
    found = directives(nodelist=["n1", "n2"], exclusive=False, qos=None)
    assert "--nodelist=n1,n2" in found
    assert not [one for one in found if one.startswith(("--exclusive", "--qos"))]


@pytest.mark.parametrize(
    ("limit", "warning"),
    [("02:00:00", 60), ("10", 60), ("5", 30), ("1", 6), (90, 60), ("0:10", 1), ("2-0", 60)],
)
def test_a_time_limit_is_announced_in_time(limit: object, warning: int) -> None:
    assert f"--signal=B:USR1@{warning}" in directives(time=limit)


@pytest.mark.parametrize("limit", [None, "UNLIMITED", "infinite", "0"])
def test_without_a_limit_nothing_is_announced(limit: object) -> None:
    assert not [one for one in directives(time=limit) if one.startswith("--signal")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-2", 93_600),
        ("1-2:30", 95_400),
        ("1-02:30:15", 95_415),
        ("unlimited", None),
        ("soon", None),
    ],
)
def test_forms_of_a_time_limit(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


def test_percent_signs_of_the_run_directory_are_no_patterns_of_slurms() -> None:
    assert "#SBATCH --output=/a/100%%j/batch.log\n" in script_of(make_spec(), Path("/a/100%j"))


@pytest.mark.parametrize("name", ["array", "wrap", "output", "gpus-per-task", "ntasks", "requeue", "signal"])
def test_options_that_would_break_the_script_are_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        script_of(make_spec(slurm={name: "1"}))
    assert [problem.path for problem in caught.value.problems] == [f"slurm.{name}"]


@pytest.mark.parametrize("value", [*LINE_BREAKS.values(), "a\0b", "x" * 9000, {"a": 1}, 1j])
def test_what_no_directive_can_hold_is_refused_by_name(value: object) -> None:
    with pytest.raises(SpecError, match=r"slurm\.comment") as caught:
        script_of(make_spec(slurm={"comment": value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "--x", "wrap=x", "", "ümlaut", "x\ny", "Comment"])
def test_what_is_no_name_of_an_option_is_refused(name: str) -> None:
    with pytest.raises(SpecError):
        script_of(make_spec(slurm={name: "1"}))


def test_a_run_directory_that_slurm_cannot_write_to_is_refused() -> None:
    for name in ("back\\slash", "new\nline"):
        with pytest.raises(SpecError, match="--root"):
            script_of(make_spec(), Path("/shared") / name)


def test_no_secret_is_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    for backend in ("slurm", "local"):
        assert "hf_very_secret" not in script_of(make_spec(backend, secrets=["HF_TOKEN"]))


# --- no value breaks out


def hostile(kinds: dict[str, str], canary: Path) -> dict[str, str]:
    return {kind: text.replace("CANARY", str(canary)) for kind, text in kinds.items()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_options_leave_a_sound_script(tmp_path: Path, kind: str) -> None:
    text = hostile(HOSTILE, tmp_path / "canary")[kind]
    slurm = {"comment": text, "job-name": text, "partition": text}
    if kind == "long":
        with pytest.raises(SpecError, match="longer than"):
            script_of(make_spec(slurm=slurm))
        slurm = dict.fromkeys(slurm, text[:1000])
    checked(script_of(make_spec(slurm=slurm)), tmp_path, values=True)


@pytest.mark.parametrize("kind", [*HOSTILE, *LINE_BREAKS])
@pytest.mark.parametrize("field", ["name", "run_id", "python", "package", "run_dir"])
def test_hostile_places_leave_a_sound_script(tmp_path: Path, field: str, kind: str) -> None:
    text = hostile({**HOSTILE, **LINE_BREAKS}, tmp_path / "canary")[kind]
    spec = make_spec("local", name=text if field == "name" else "grpo")
    given = {"package": Path(text), "run_dir": Path(text)}.get(field, text)
    script = script_of(spec, **({field: given} if field != "name" else {}))
    checked(script, tmp_path, values=True)


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "long"])
@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_hostile_values_arrive_and_run_nothing(tmp_path: Path, backend: str, kind: str) -> None:
    """In every place at once: as name, option and id, and in the paths of interpreter, package and run."""
    canary = tmp_path / "canary"
    text = hostile(HOSTILE, canary)[kind]
    name = text.replace("/", "_").replace("\\", "_") if backend == "slurm" else text.replace("/", "_")
    stage = Stage(tmp_path, name[:200])
    slurm = {"comment": text, "partition": text, "job-name": text}
    done = stage.run(make_spec(backend, name=text, slurm=slurm), run_id=text)
    assert done.returncode == 0, done.stderr
    assert stage.seen["env"]["SLURMFORK_RUN_ID"] == text
    assert stage.seen["env"]["SLURMFORK_RUN_DIR"] == str(stage.run_dir)
    program, *options, parent, dashes = stage.seen["argv"][:6]
    assert program == str(stage.package / "head" / "__main__.py")
    assert options == ["--run-dir", str(stage.run_dir), "--parent"]
    assert parent.isdecimal()
    assert dashes == "--"
    assert not canary.exists()
    assert not list(tmp_path.glob("**/canary"))


@pytest.mark.parametrize("kind", LINE_BREAKS)
def test_line_breaks_in_paths_run_nothing(tmp_path: Path, kind: str) -> None:
    text = LINE_BREAKS[kind].replace("CANARY", "canary")
    stage = Stage(tmp_path, text.replace("/", "_"))
    assert stage.run(make_spec("local", name=text), run_id=text).returncode == 0
    assert stage.seen["env"]["SLURMFORK_RUN_ID"] == text
    assert not list(tmp_path.glob("**/canary"))


@pytest.mark.parametrize("value", ["a\0b", "\udcff"])
def test_what_no_script_can_hold_is_refused(value: str) -> None:
    with pytest.raises(SpecError, match="cannot hold"):
        script_of(make_spec("local"), python=value)


# --- the setup lines


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_what_setup_exports_reaches_the_head(tmp_path: Path, backend: str) -> None:
    setup = "export A=\"x\n  y'\"\nf() { export B=$1; }\nf '$(b)'\ncd /\nexport C=END_OF_SETUP\n"
    stage = Stage(tmp_path)
    assert stage.run(make_spec(backend, setup=setup)).returncode == 0
    env = stage.seen["env"]
    assert (env["A"], env["B"], env["C"], stage.seen["cwd"]) == ("x\n  y'", "$(b)", "END_OF_SETUP", "/")
    assert "SLURMFORK_NODE" not in env  # it would rename every agent


@pytest.mark.parametrize(
    ("setup", "status"),
    [
        ("false", 1),
        ("no_such_command_here", 127),
        ("true\n(exit 7)", 7),
        ("set -e\n(exit 5)\ntrue", 5),
        ("set -euo pipefail\necho $undefined\ntrue", 1),
        ("exit 3", 3),
        ("return 4", 4),
        ("exit 0", 143),
        ("if true; then", 2),
        ("echo 'unclosed", 2),
        ("trap - EXIT\ntrap 'echo mine' TERM USR1\nfalse", 1),
    ],
)
@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_failing_setup_fails_the_run_and_says_so(tmp_path: Path, backend: str, setup: str, status: int) -> None:
    stage = Stage(tmp_path)
    done = stage.run(make_spec(backend, setup=setup))
    assert done.returncode == stage.status == status
    assert not stage.started
    assert f"setup lines ended with status {status}" in done.stderr.strip().splitlines()[-1]
    assert len(stage.swept) == 1


@pytest.mark.parametrize(
    "setup",
    [
        "false\ntrue",
        "cat <<X\nunfinished",
        "set -eu; set -o pipefail; set -f; IFS=x; true",
        "read -r line || true",
        "cat",
        "unset PATH_THAT_IS_NOT_THERE; # a comment at the end",
        "status=1; python=no; package=no; run_dir=no; node=no; launcher=no",
        "# a comment only",
        "shopt -s nullglob failglob nocasematch",
    ],
)
def test_setup_that_ends_well_lets_the_run_go_on(tmp_path: Path, setup: str) -> None:
    stage = Stage(tmp_path)
    done = stage.run(make_spec("slurm", setup=setup), env={"HEAD_STATUS": "9"})
    assert (done.returncode, stage.status) == (9, 9), done.stderr
    assert stage.started


def test_what_setup_leaves_in_the_background_carries_the_tag(tmp_path: Path) -> None:
    """Bound to the run, so that the sweep ends it."""
    setup = "sleep 60 </dev/null >/dev/null 2>&1 & echo $! >pid\n"
    stage = Stage(tmp_path)
    assert stage.run(make_spec(setup=setup)).returncode == 0
    found = process.identify(int((stage.home / "pid").read_text()))
    assert found is not None
    try:
        assert found in process.tagged("grpo-abc234", "n1")
    finally:
        process.send(found, signal.SIGKILL)


def test_a_signal_during_setup_ends_the_run_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    setup = "bash -c 'echo $$ >pid.new; mv pid.new pid; exec sleep 100' </dev/null >/dev/null 2>&1"
    batch = stage.start(make_spec(setup=setup))
    wait_until((stage.home / "pid").exists, "the setup lines")
    sleeper = process.identify(int((stage.home / "pid").read_text()))
    assert sleeper is not None
    try:
        batch.send_signal(signal.SIGUSR1)  # the warning of the time limit ends nothing
        with pytest.raises(subprocess.TimeoutExpired):
            batch.wait(timeout=0.5)
        batch.send_signal(signal.SIGTERM)
        _, errors = batch.communicate(timeout=60)
        assert process.alive(sleeper)  # nobody waited for it; the sweep, a stand-in here, would have ended it
    finally:
        process.send(sleeper, signal.SIGKILL)
    assert stage.status == 143
    assert "no agent was started" in errors


# --- the head, and the end


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_the_heads_status_is_the_scripts(tmp_path: Path, backend: str) -> None:
    stage = Stage(tmp_path)
    done = stage.run(make_spec(backend), env={"HEAD_STATUS": "7"})
    assert done.returncode == stage.status == 7
    assert stage.swept == [["--run-dir", str(stage.run_dir), "--grace", "2"]]


def test_signals_go_to_the_head_and_do_not_hide_its_status(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    batch = stage.start(make_spec(), env={"HEAD_AWAITS": "SIGUSR1 SIGTERM SIGTERM", "HEAD_STATUS": "5"})
    wait_until(lambda: stage.started, "the head")
    batch.send_signal(signal.SIGUSR1)  # bash may lose one of two signals that come at once
    wait_until((stage.run_dir / "told.SIGUSR1").exists, "the warning")
    while batch.poll() is None:  # Slurm sends SIGTERM several times; how many arrive is not certain
        batch.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    batch.communicate(timeout=30)
    assert batch.returncode == stage.status == 5


def test_a_head_that_was_killed_is_told_by_its_status(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    batch = stage.start(make_spec("local"), env={"HEAD_AWAITS": "SIGTERM"})
    wait_until(lambda: stage.started, "the head")
    os.kill(stage.seen["pid"], signal.SIGKILL)
    batch.communicate(timeout=30)
    assert batch.returncode == stage.status == 137
    assert len(stage.swept) == 1


def test_the_local_launcher(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run(make_spec("local"), request=Request(nodes=3, gpus_per_node=2, cpus_per_node=1))
    nodes = [str(stage.python), "-I", str(stage.package / "backends" / "local_nodes.py")]
    launcher, sweep = stage.launcher_and_sweep
    assert launcher == [*nodes, "--nodes", "3", "--gpus", "2"]
    done = subprocess.run([*sweep, "local1", "echo", "a b"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "a b --node local1\n"


def test_the_slurm_launcher(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.run(make_spec())
    launcher, sweep = stage.launcher_and_sweep
    assert launcher[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--overlap", "--mem=0"} <= set(launcher)
    assert {"--kill-on-bad-exit=0", "--wait=0", "--export=ALL", "--input=none"} <= set(launcher)
    assert "--no-kill" not in launcher
    assert launcher[-3:] == [str(stage.python), "-I", str(stage.package / "agent" / "__main__.py")]
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*sweep, "n2", "echo", "a b"], env=env, capture_output=True, text=True, timeout=30, check=True
    )
    words = done.stdout.splitlines()
    assert words[-4:] == ["echo", "a b", "--node", "n2"]
    assert {"--nodelist=n2", "--nodes=1", "--overlap", "--gres=none", "--export=ALL"} <= set(words)


def test_the_environment_is_scrubbed_for_srun(tmp_path: Path) -> None:
    harmful = {
        "SLURM_CPU_BIND": "q",
        "SLURM_CPU_BIND_LIST": "0x1",
        "SLURM_MEM_BIND_TYPE": "none",
        "SRUN_CPUS_PER_TASK": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_TRES_PER_TASK": "cpu:1",
        "SLURM_MEM_PER_CPU": "1",
        "SLURM_EXCLUSIVE": "",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_NTASKS": "64",
        "SLURM_KILL_BAD_EXIT": "1",
        "SLURMFORK_NODE": "outer",
        "SLURMFORK_WORKER": "outer/1",
    }
    kept = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CLUSTER_NAME": "c", "SLURM_GPUS_ON_NODE": "8"}
    stage = Stage(tmp_path)
    stage.run(make_spec(), env={**harmful, **kept})
    env = stage.seen["env"]
    assert not set(harmful) & set(env)
    assert {name: env[name] for name in kept} == kept
    assert env["SLURM_JOB_ID"] == "1"
    assert env["SLURM_OOM_KILL_STEP"] == "0"


def test_a_run_directory_that_the_node_does_not_see(tmp_path: Path) -> None:
    missing = tmp_path / "not-there"
    script = tmp_path / "batch.sh"  # Slurm gives the script to the node, wherever it was
    script.write_text(script_of(make_spec(), missing))
    env = {**os.environ, "SLURMD_NODENAME": "n7"}
    argv = ["bash", str(script)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    told = f"slurmfork: node n7 cannot take part: it does not see the run directory {missing}; "
    assert done.stderr == f"{told}put it on the shared file system with --root\n"
    assert not missing.exists()


def test_what_an_earlier_attempt_left_is_not_this_ones(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for name in ("batch.status", "end.json", "head.json"):
        (stage.run_dir / name).write_text("old")
    stage.run(make_spec(setup="ls $SLURMFORK_RUN_DIR >listing"))
    assert not {"batch.status", "end.json", "head.json"} & set((stage.home / "listing").read_text().split())


# --- templates of a user's own


def user_template(tmp_path: Path, text: str, name: str = "my.sh.j2") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["my.sh.j2", "sbatch.sh.j2"])
def test_a_template_extends_ours(tmp_path: Path, name: str) -> None:
    text = "export OWN={{ spec.name | sh }}\n{{ super() }}\n"
    text = '{% extends "sbatch.sh.j2" %}\n{% block setup %}\n' + text + "{% endblock %}\n"
    stage = Stage(tmp_path)
    done = stage.run(make_spec(setup="export SPEC=1"), template=user_template(tmp_path, text, name))
    assert done.returncode == 0, done.stderr
    assert (stage.seen["env"]["OWN"], stage.seen["env"]["SPEC"]) == ("grpo", "1")
    checked((stage.run_dir / "batch.sh").read_text(), tmp_path)


def test_the_spec_names_a_template(tmp_path: Path) -> None:
    (tmp_path / "part.j2").write_text("# from {{ run_id | sh }}\n")
    path = user_template(tmp_path, '#!/bin/bash\n{% include "part.j2" %}\n{{ request.nodes }}\n')
    assert script_of(make_spec(slurm={"template": str(path)})) == "#!/bin/bash\n# from grpo-abc234\n2\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a\n{% if %}\n", 2, "Expected an expression"),
        ("a\nb\n{{ spec.nmae | sh }}\n", 3, "nmae"),
        ("a\n{{ nothing }}\n", 2, "'nothing' is undefined"),
        ("a\n{{ nothing | sh }}\n", 2, "'nothing' is undefined"),
        ("a\n{{ run_id }}\n", 2, "needs a filter"),
        ("a\n{{ run_id | upper }}\n", 2, "needs a filter"),
        ("a\n{{ run_id | shell }}\n", 2, "No filter named 'shell'"),
        ("a\n\n{{ 1 / 0 }}\n", 3, "ZeroDivisionError"),
        (
            '{% extends "sbatch.sh.j2" %}\n{% block setup %}\n{{ spec.roles.x.y | sh }}\n{% endblock %}',
            3,
            "x",
        ),
        ("#SBATCH --comment={{ 'a\\nb' | sbatch_value }}", 1, "line break"),
        ('{% extends "nothing.j2" %}', None, "there is no template nothing.j2"),
    ],
)
def test_faults_of_a_template_are_told_in_one_line_with_the_place(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    path = user_template(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        script_of(make_spec(), template=path)
    told = str(caught.value)
    assert words in told
    assert "\n" not in told
    assert told.startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"there is no template {tmp_path}/none.j2"):
        script_of(make_spec(), template=tmp_path / "none.j2")
    with pytest.raises(SpecError, match="cannot be read"):
        script_of(make_spec(), template=tmp_path)


def test_a_macro_and_a_block_may_be_put_in_again(tmp_path: Path) -> None:
    text = (
        "{% macro twice(x) %}{{ x | sh }} {{ x | sh }}{% endmacro %}"
        "\n#!{% block a %}{{ twice(run_id) }}{% endblock %}{{ self.a() }}\n"
    )
    made = script_of(make_spec(), template=user_template(tmp_path, text))
    assert made == "#!" + "grpo-abc234 grpo-abc234" * 2 + "\n"


def test_a_script_that_slurm_would_not_take(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not begin with #!"):
        script_of(make_spec(), template=user_template(tmp_path, "hostname\n"))
