"""Code that a run gets a copy of: what belongs to it, what is refused, and that a run works in it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from cluster import Factory
from processes import wait_until
from running import Shell

from slurmfork.code import git, laying, manifest
from slurmfork.code.listing import Listing, listing
from slurmfork.code.manifest import Entry
from slurmfork.code.store import YOUNGEST_S, Store
from slurmfork.code.weight import heaviest
from slurmfork.errors import RunDirError, UsageError
from slurmfork.spec import Code


class Tree:
    """A directory to be sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def write(self, *names: str, text: str = "x\n") -> None:
        for name in names:
            place = self.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def git(self, *arguments: str, where: str = ".") -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
        command = ["git", "-C", str(self.path / where), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    def commit(self) -> str:
        self.git("init", "-q", "-b", "trunk")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "first")
        return self.git("rev-parse", "HEAD")

    def listing(self, **more: object) -> Listing:
        return listing(Code(path=str(self.path), **more))  # type: ignore[arg-type]

    def names(self, **more: object) -> list[str]:
        return [entry.path for entry in self.listing(**more).entries]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "my code")


WITH_AND_WITHOUT_GIT = pytest.mark.parametrize("with_git", [True, False], ids=["git", "no git"])


# --- what belongs to it


@WITH_AND_WITHOUT_GIT
def test_gitignore_files_are_honoured(tree: Tree, with_git: bool) -> None:
    tree.write("a.py", "a.o", "keep.o", "sub/b.py", "sub/b.o", "sub/c.txt", "build/x", "sub/build/y", "naïve name.py")
    tree.write(".gitignore", text="*.o\n!keep.o\n/build/\n# no more\n[z-a]\n!\n")
    tree.write("sub/.gitignore", text="*.txt\n!b.o\n")
    if with_git:
        tree.git("init", "-q")
    wanted = [".gitignore", "a.py", "keep.o", "naïve name.py", "sub/.gitignore", "sub/b.o", "sub/b.py", "sub/build/y"]
    assert tree.names() == wanted


def test_what_is_tracked_belongs_to_it_though_ignored_and_what_was_deleted_does_not(tree: Tree) -> None:
    tree.write("a.py", "gone.py", "data/model.bin")
    tree.commit()
    tree.write(".gitignore", text="data/\n")
    tree.write("new.py", "data/other.bin")
    (tree.path / "gone.py").unlink()
    assert tree.names() == [".gitignore", "a.py", "data/model.bin", "new.py"]


@WITH_AND_WITHOUT_GIT
def test_include_and_exclude(tree: Tree, with_git: bool) -> None:
    tree.write("a.py", "out/lib.so", "out/log.txt", "tests/t.py", "tests/deep/data.bin")
    tree.write(".gitignore", text="out/\n")
    if with_git:
        tree.git("init", "-q")
    assert tree.names(include=["*.so"]) == [".gitignore", "a.py", "out/lib.so", "tests/deep/data.bin", "tests/t.py"]
    assert tree.names(exclude=["tests/"]) == [".gitignore", "a.py"]
    assert tree.names(include=["out/"], exclude=["*.txt", "/tests"]) == [".gitignore", "a.py", "out/lib.so"]
    assert tree.names(exclude=["/*", "!/tests/", "*.bin"]) == ["tests/t.py"]
    assert not [name for name in tree.names(include=["*"]) if name.startswith(".git/")]
    with pytest.raises(UsageError, match=r"code\.exclude: "):
        tree.names(exclude=["!"])


def test_repositories_within_belong_to_it_without_their_git(tree: Tree, tmp_path: Path) -> None:
    library = Tree(tmp_path / "library")
    library.write("lib.py", "sub/more.py")
    library.commit()
    tree.write("a.py")
    tree.git("init", "-q")
    tree.git("submodule", "--quiet", "add", str(library.path), "vendored/lib")
    shutil.copytree(library.path, tree.path / "untracked")
    found = tree.names()
    assert {"vendored/lib/lib.py", "vendored/lib/sub/more.py", "untracked/lib.py"} <= set(found)
    assert not [name for name in found if ".git" in name.split("/")]


def test_a_part_of_a_repository(tree: Tree) -> None:
    tree.write("other.py", "sub/a.py", "sub/a.log", "sub/deep/b.log")
    tree.write(".gitignore", text="*.log\n")
    tree.git("init", "-q")
    tree.path = tree.path / "sub"
    assert tree.names() == ["a.py"]


def test_a_directory_that_the_repository_around_it_ignores(tree: Tree) -> None:
    tree.write("work/a.py", "work/a.o")
    tree.write(".gitignore", text="*\n")
    tree.write("work/.gitignore", text="*.o\n")
    tree.git("init", "-q")
    tree.path = tree.path / "work"
    assert tree.names() == [".gitignore", "a.py"]


def test_without_git_a_repository_is_read_all_the_same(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write("sub/a.py", "sub/a.log", "sub/b.tmp")
    tree.write(".gitignore", text="*.log\n")
    tree.commit()
    (tree.path / ".git" / "info" / "exclude").write_text("*.tmp\n")
    monkeypatch.setenv("PATH", "/nonexistent")
    tree.path = tree.path / "sub"
    found = tree.listing()
    assert [entry.path for entry in found.entries] == ["a.py"]
    assert found.record.git is None
    assert "there is no git here" in found.notes[0]


def test_runs_that_live_in_it_do_not_belong_to_it(tree: Tree) -> None:
    tree.write("a.py", "runs/x/run.json")
    assert [entry.path for entry in listing(Code(path=str(tree.path)), [tree.path / "runs"]).entries] == ["a.py"]


# --- links, special files, weight


def test_links_that_stay_inside_are_kept(tree: Tree) -> None:
    tree.write("a.py", "sub/b.py")
    (tree.path / "sub" / "a.py").symlink_to("../a.py")
    (tree.path / "absolute").symlink_to(tree.path / "sub" / "b.py")
    (tree.path / "dangling").symlink_to("nowhere")
    (tree.path / "all").symlink_to("sub")
    links = {entry.path: entry.target for entry in tree.listing().entries if entry.target is not None}
    assert links == {"sub/a.py": "../a.py", "absolute": "sub/b.py", "dangling": "nowhere", "all": "sub"}


def test_links_that_lead_out_are_refused_in_one_line(tree: Tree, tmp_path: Path) -> None:
    tree.write("sub/a.py")
    (tree.path / "sub" / "data").symlink_to("/scratch/data")
    with pytest.raises(UsageError, match=r"sub/data -> /scratch/data; leave them out with `exclude`"):
        tree.listing()
    assert tree.names(exclude=["data"]) == ["sub/a.py"]
    (tree.path / "sub" / "data").unlink()
    (tree.path / "sub" / "up").symlink_to("..")
    (tree.path / "sly").symlink_to("sub/up/../elsewhere")  # by its own words it stays inside
    with pytest.raises(UsageError, match=r"sly -> "):
        tree.listing()


def test_special_files_are_left_out_with_a_word(tree: Tree) -> None:
    tree.write("a.py")
    os.mkfifo(tree.path / "pipe")
    found = tree.listing()
    assert [entry.path for entry in found.entries] == ["a.py"]
    assert found.notes == ["left out of the code, neither file nor link: pipe"]


def test_a_name_that_is_no_utf8_is_refused(tree: Tree) -> None:
    (Path(os.fsdecode(os.fsencode(tree.path) + b"/caf\xe9"))).write_text("x")
    with pytest.raises(UsageError, match=r"caf\\\\xe9.* is no UTF-8"):
        tree.listing()
    assert tree.names(exclude=["caf*"]) == []


def test_too_much_is_refused_with_the_names_of_the_heaviest(tree: Tree) -> None:
    tree.write("a.py")
    for name, size in {"data/raw/big.bin": 600 << 30, "ckpt/one": 11 << 30, "ckpt/two": 9 << 30, "c.bin": 2048}.items():
        tree.write(name)
        os.truncate(tree.path / name, size)  # takes no room
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        tree.listing()
    assert time.monotonic() - began < 20, "it was read"
    said = str(caught.value)
    assert "620 GB in 5 files, more than its limit of 1G" in said
    assert "most of it is data/raw/ (600 GB), ckpt/ (20 GB), c.bin (2.0 KB); leave out" in said
    assert "\n" not in said
    assert tree.names(exclude=["/data/", "/ckpt/"]) == ["a.py", "c.bin"]


def test_the_heaviest_is_named_where_it_parts() -> None:
    weights = {"src/a.py": 1, "src/data/x/one": 50, "src/data/x/two": 49, "docs/d": 5}
    assert heaviest(weights) == [("src/data/x/", 99), ("docs/", 5)]


# --- laying


def test_a_copy_is_as_it_was_and_private(tree: Tree, tmp_path: Path) -> None:
    tree.write("a.py", "sub/deep/b.py", "run.sh", "empty", text="")
    tree.write("run.sh", text="#!/bin/sh\n")
    (tree.path / "run.sh").chmod(0o755)
    (tree.path / "link").symlink_to("sub/deep")
    found = tree.listing()
    assert laying.lay(found.entries, tmp_path / "copy", laying.from_directory(tree.path)) == []
    copy = tmp_path / "copy"
    assert (copy / "link").readlink() == Path("sub/deep")
    modes = {str(path.relative_to(copy)): stat.S_IMODE(path.stat().st_mode) for path in copy.rglob("*")}
    assert (modes["run.sh"], modes["a.py"], modes["sub/deep"]) == (0o700, 0o600, 0o700)
    assert (copy / "run.sh").read_text() == "#!/bin/sh\n"


def test_a_file_that_vanishes_is_told_and_the_others_are_there(tree: Tree, tmp_path: Path) -> None:
    tree.write("a.py", "b.py")
    found = tree.listing()
    (tree.path / "a.py").unlink()
    assert laying.lay(found.entries, tmp_path / "copy", laying.from_directory(tree.path)) == ["a.py"]
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["b.py"]


def test_a_copy_that_fails_leaves_nothing(tree: Tree, tmp_path: Path) -> None:
    tree.write("a.py", "b.py")

    def fill(entry: Entry, descriptor: int) -> None:
        if entry.path == "b.py":
            raise OSError(28, "No space left on device")

    with pytest.raises(RunDirError, match="No space left"):
        laying.lay(tree.listing().entries, tmp_path / "copy", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["my code"]


DIGEST = b"d" * 32


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("../x", digest=DIGEST)],
        [Entry("/etc/x", digest=DIGEST)],
        [Entry("a/../../x", digest=DIGEST)],
        [Entry("a//x", digest=DIGEST)],
        [Entry("", digest=DIGEST)],
        [Entry("a\0b", digest=DIGEST)],
        [Entry("a", digest=b"short")],
        [Entry("a", digest=DIGEST), Entry("a", digest=DIGEST)],
        [Entry("l", target="/etc")],
        [Entry("l", target="../etc")],
        [Entry("a/l", target="b/../../../etc")],
        [Entry("l", target="sub"), Entry("l/x", digest=DIGEST)],
        [Entry("l/x/y", digest=DIGEST), Entry("l", target=".")],
        [Entry("f", digest=DIGEST), Entry("f/x", digest=DIGEST)],
    ],
    ids=repr,
)
def test_a_manifest_that_leads_out_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(UsageError):
        manifest.check(entries)


# --- the store


def test_the_store_is_private_and_checks_what_it_gives(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    digest = store.put(b"content")
    assert store.copy(digest) == b"content"
    assert store.missing([(digest, 7), (b"x" * 32, 7), (digest, 8)]) == [1, 2]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (store.path, store.place(digest))] == [0o700, 0o600]
    store.place(digest).write_bytes(b"kontent")
    with pytest.raises(RunDirError, match="was damaged, and is removed; submit again"):
        store.copy(digest)
    with pytest.raises(RunDirError, match="is gone since it was sent"):
        store.copy(digest)


def test_a_store_that_somebody_else_could_write_to_is_not_looked_at(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    empty = store.put(b"")
    store.place(empty).unlink()
    os.mkfifo(store.place(empty))  # of no size either, and to open it waits for ever
    store.path.chmod(0o777)
    with pytest.raises(RunDirError, match="is not a directory that only you can write to"):
        store.missing([(empty, 0)])
    assert Store(tmp_path / "none").missing([(empty, 0)]) == [0]


def test_what_was_not_asked_for_is_pruned_and_what_was_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    old, asked, new = (store.put(data) for data in (b"old", b"asked", b"new"))
    half = store.writer()
    half.feed(b"half")
    for place in (store.place(old), store.place(asked), *(store.path / "incoming").iterdir()):
        os.utime(place, (time.time() - 2 * YOUNGEST_S,) * 2)
    assert store.missing([(asked, 5)]) == []
    assert store.prune(0) == (2, 7)
    assert store.missing([(old, 3), (asked, 5), (new, 3)]) == [0]


# --- runs

SPEC = """
name: code
backend: local
setup: pwd > setup.txt
code: {path: my code, exclude: [secret.txt]}
roles:
  a: {command: [sh, -c, "pwd; cat setup.txt; ./tool; ls; sleep 1000"]}
  b: {command: [pwd], cwd: sub}
"""


def test_a_run_works_in_its_copy(local: Shell, tree: Tree) -> None:
    tree.write("sub/b.py", "secret.txt")
    tree.write("tool", text="#!/bin/sh\necho tool says hello\n")
    (tree.path / "tool").chmod(0o755)
    commit = tree.commit()
    tree.write("new.py")
    tree.write("sub/b.py", text="changed\n")
    run_id = local.ready(local.spec(SPEC))
    code = local.root / run_id / "code"
    tree.write("sub/b.py", text="after the submit\n")
    assert (code / "sub" / "b.py").read_text() == "changed\n"
    said = (local.root / run_id / "logs" / "a-0.log").read_text().split("\n")
    assert said[:3] == [str(code), str(code), "tool says hello"]
    assert "secret.txt" not in said
    assert (local.root / run_id / "logs" / "b-0.log").read_text() == f"{code}/sub\n"
    record = json.loads((local.root / run_id / "run.json").read_text())["code"]
    assert record["git"] == {
        "commit": commit,
        "branch": "trunk",
        "dirty": True,
        "changed": [" M sub/b.py", "?? new.py"],
    }
    assert local.status(run_id)["code"]["source"] == str(tree.path)
    line = next(line for line in local.call("status", run_id).stdout.splitlines() if line.startswith("code:"))
    assert line.endswith(f"{tree.path} at {commit[:12]} on trunk, and 2 changes: sub/b.py, new.py")


def test_a_clean_tree_is_told_as_one(tree: Tree) -> None:
    tree.write("a.py")
    commit = tree.commit()
    assert git.facts(tree.path) == git.GitRecord(commit=commit, branch="trunk", dirty=False)
    tree.git("checkout", "-q", "--detach")
    tree.git("mv", "a.py", "b.py")
    facts = git.facts(tree.path)
    assert (facts.branch, facts.changed) == (None, ["R  b.py"])


def test_what_is_refused_leaves_nothing(local: Shell, tree: Tree) -> None:
    tree.write("a.py", text="x" * 3000)
    done = local.call("submit", str(local.spec(SPEC)), "--set", "code.limit=1K")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("slurmfork: code: ")
    assert done.stderr.count("\n") == 1
    assert list(local.root.glob("*")) == []


def test_mistakes_are_told_with_their_lines(local: Shell, tree: Tree) -> None:
    spec = local.spec("name: x\ncode: {path: nowhere, limit: much}\nroles: {a: {command: [x]}}\n")
    errors = json.loads(local.call("validate", "--json", str(spec)).stdout)["errors"]
    assert [(error["path"], error["line"]) for error in errors] == [("code.path", 2), ("code.limit", 2)]
    spec = local.spec("name: x\ncode: nowhere\nroles: {a: {command: [x], cwd: sub}}\n")
    assert "code.path: there is no directory" in local.call("validate", str(spec)).stderr
    assert local.call("validate", str(spec), "--set", f"code={tree.path}").returncode == 0
    spec = local.spec(f"name: x\ncode: {tree.path}\nroles: {{a: {{command: [x]}}}}\n")
    assert local.call("validate", str(spec), "--set", "code.limit=5G").returncode == 0


@pytest.mark.slurm
@pytest.mark.timeout(180)
def test_a_job_works_in_its_copy(minicluster: Factory, tree: Tree, tmp_path: Path) -> None:
    cluster = minicluster(nodes=2, gpus=0)
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    tree.write("sub/b.py")
    spec = shell.spec(
        """
        name: code
        code: {path: my code}
        setup: echo from setup >> setup.txt
        roles:
          a: {per_node: 1, command: [sh, -c, "pwd; cat setup.txt; sleep 1000"]}
        nodes: 2
        """
    )
    run_id = shell.ready(spec)
    for index in (0, 1):
        log = shell.root / run_id / "logs" / f"a-{index}.log"
        wait_until(lambda log=log: log.exists() and log.read_text().count("\n") == 2, "both lines")  # type: ignore[misc]
        assert log.read_text() == f"{shell.root / run_id / 'code'}\nfrom setup\n"
    shell.end()
