"""The plan: placements worked out by hand, refusals with their arithmetic, and what holds for any spec."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmfork.errors import PlanError
from slurmfork.plan import Node, Placement, Request, colocate, plan, request
from slurmfork.spec import Role, Spec, Strategy
from slurmfork.spec.model import Local


def made(nodes: int | None = None, slurm: dict[str, object] | None = None, **roles: Any) -> Spec:
    """A spec of these roles; ``target`` makes one colocated."""
    table = {}
    for name, fields in roles.items():
        target = fields.pop("target", None)
        strategy = Strategy(type="colocation", target=str(target)) if target else Strategy()
        table[name] = Role(command="x", strategy=strategy, **fields)
    return Spec(name="t", nodes=nodes, slurm=slurm or {}, roles=table)


def alike(count: int, gpus: int = 8, cpus: int | None = None) -> list[Node]:
    return [Node(f"n{number}", gpus, cpus) for number in range(count)]


def seats(placements: Sequence[Placement], role: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(placement.node, placement.gpus) for placement in placements if placement.role == role]


def counts(placements: Sequence[Placement], role: str) -> dict[str, int]:
    return dict(Counter(placement.node for placement in placements if placement.role == role))


# --- packing -----------------------------------------------------------------------------------------------


def test_two_roles_share_nodes() -> None:
    placed = plan(made(rollout={"replicas": 4, "gpus": 1}, trainer={"replicas": 2, "gpus": 2}), alike(2, 4))
    assert seats(placed, "trainer") == [("n0", (0, 1)), ("n0", (2, 3))]
    assert seats(placed, "rollout") == [("n1", (0,)), ("n1", (1,)), ("n1", (2,)), ("n1", (3,))]


def test_ranks_as_torchrun_has_them() -> None:
    placed = plan(made(t={"replicas": 6, "gpus": 1}), alike(2, 4))
    assert [(p.worker, p.index, p.rank, p.world_size) for p in placed] == [(f"t/{i}", i, i, 6) for i in range(6)]
    assert [p.node_rank for p in placed] == [0, 0, 0, 0, 1, 1]
    assert [p.local_rank for p in placed] == [0, 1, 2, 3, 0, 1]
    assert [p.local_world_size for p in placed] == [4, 4, 4, 4, 2, 2]


def test_node_rank_counts_the_nodes_of_the_role_only() -> None:
    placed = plan(made(a={"replicas": 1, "gpus": 4}, b={"replicas": 2, "gpus": 3}), alike(3, 4))
    assert [(p.node, p.node_rank) for p in placed if p.role == "b"] == [("n1", 0), ("n2", 1)]


def test_per_node_comes_first_and_everywhere() -> None:
    placed = plan(made(z={"per_node": 1, "gpus": 1}, a={"replicas": 2, "gpus": 3}), alike(2, 4))
    assert seats(placed, "z") == [("n0", (0,)), ("n1", (0,))]
    assert seats(placed, "a") == [("n0", (1, 2, 3)), ("n1", (1, 2, 3))]


def test_unlimited_roles_are_spread() -> None:
    placed = plan(made(a={"replicas": 5}, one={"replicas": 1}, c={"replicas": 4, "cpus": 2}), alike(2, 0))
    assert counts(placed, "a") == {"n0": 3, "n1": 2}
    assert counts(placed, "one") == {"n0": 1}
    assert counts(placed, "c") == {"n0": 2, "n1": 2}


def test_cpus_limit_where_they_are_declared_and_known() -> None:
    spec = made(a={"replicas": 4, "gpus": 1, "cpus": 4})
    assert counts(plan(spec, alike(2, 8, 8)), "a") == {"n0": 2, "n1": 2}
    assert counts(plan(spec, alike(2, 8)), "a") == {"n0": 4}
    undeclared = made(a={"replicas": 4, "gpus": 1})
    assert counts(plan(undeclared, alike(2, 8, 1)), "a") == {"n0": 4}


def test_uneven_nodes() -> None:
    nodes = [Node("small", 2), Node("large", 8), Node("none", 0), Node("mid", 4)]
    placed = plan(made(a={"replicas": 3, "gpus": 4}, b={"replicas": 2, "gpus": 1}), nodes)
    assert counts(placed, "a") == {"large": 2, "mid": 1}
    assert counts(placed, "b") == {"small": 2}


def test_pieces_that_first_fit_does_not_place() -> None:
    sizes = {
        "a": {"replicas": 1, "gpus": 4},
        "b": {"replicas": 2, "gpus": 3},
        "c": {"replicas": 3, "gpus": 2},
    }
    placed = plan(made(**sizes), alike(2, 8))
    assert counts(placed, "a") == {"n0": 1}
    assert counts(placed, "c") == {"n0": 2, "n1": 1}
    assert seats(placed, "b") == [("n1", (0, 1, 2)), ("n1", (3, 4, 5))]


def test_cpus_that_first_fit_does_not_place() -> None:
    """The role with fewer GPUs needs most of a node's CPUs, so it has to be placed first."""
    spec = made(wide={"replicas": 4, "gpus": 2, "cpus": 2}, thick={"replicas": 2, "gpus": 1, "cpus": 12})
    placed = plan(spec, alike(2, 8, 16))
    assert counts(placed, "thick") == {"n0": 1, "n1": 1}
    assert counts(placed, "wide") == {"n0": 2, "n1": 2}


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "nodes", "message"),
    [
        (
            made(rollout={"replicas": 16, "gpus": 1}, trainer={"replicas": 16, "gpus": 2}),
            alike(4),
            "trainer needs 16 × 2 GPUs and rollout 16 × 1 = 48 GPUs; 4 nodes × 8 = 32: 16 too few; "
            "6 such nodes would do",
        ),
        (made(a={"gpus": 1}), alike(1, 0), "a worker of a needs 1 GPU; the largest node has 0"),
        (made(a={"gpus": 16}), alike(4), "a worker of a needs 16 GPUs; the largest node has 8"),
        (made(a={"cpus": 9}), alike(1, 0, 8), "a worker of a needs 9 CPUs; the largest node has 8"),
        (
            made(a={"gpus": 4, "cpus": 9}),
            [Node("g", 8, 8), Node("c", 2, 64)],
            "a worker of a needs 4 GPUs and 9 CPUs; no node has both",
        ),
        (
            made(t={"replicas": 5, "gpus": 3}),
            alike(2),
            "t has 5 workers of 3 GPUs; 2 workers fit on a node of 8 GPUs, so 2 nodes hold 4: 1 too few; "
            "3 such nodes would do",
        ),
        (
            made(m={"per_node": 3, "gpus": 1}, b={"per_node": 2, "gpus": 4}),
            alike(2),
            "on every node b needs 2 × 4 GPUs and m 3 × 1 = 11 GPUs; a node has 8: 3 too few",
        ),
        (
            made(m={"per_node": 1, "gpus": 1}, b={"replicas": 2, "gpus": 8}),
            alike(2),
            "m needs 2 × 1 GPU and b 2 × 8 = 18 GPUs; 2 nodes × 8 = 16: 2 too few",
        ),
        (
            made(a={"replicas": 3, "gpus": 1, "cpus": 8}),
            alike(2, 8, 8),
            "a needs 3 × 8 CPUs = 24 CPUs; 2 nodes × 8 = 16: 8 too few; 3 such nodes would do",
        ),
        (
            made(a={"replicas": 2, "gpus": 5}, b={"replicas": 2, "gpus": 4}),
            [Node("x", 8), Node("y", 8), Node("z", 3)],
            "there is enough in all (2 nodes × 8 + 1 node × 3 = 19 GPUs), but not in pieces of the "
            "right sizes: no place for 2 workers of b (4 GPUs)",
        ),
        (
            made(a={"replicas": 10, "gpus": 1}, s={"gpus": 4, "target": "a"}),
            alike(2),
            "s asks 4 GPUs, those of 4 workers of a on one node; n1 has 2 of them: 2 left over",
        ),
        (
            made(a={"replicas": 8, "gpus": 1}, s={"gpus": 4, "target": "a"}),
            alike(4, 2),
            "4 workers of a share a node, for what goes beside them, and need 4 GPUs; the largest node has 2",
        ),
        (
            made(a={"gpus": 4}, s={"gpus": 6, "target": "a"}),
            alike(1),
            "s asks 6 GPUs, which is no multiple of the 4 of each worker of a",
        ),
        (
            made(a={}, s={"gpus": 1, "target": "a"}),
            alike(1),
            "s asks 1 GPU, but a/0, which it goes beside, has none",
        ),
        (
            made(a={"replicas": 2, "gpus": 1}, s={"replicas": 3, "target": "a"}),
            alike(1),
            "s has replicas: 3, and 2 targets to go beside, which does not come out even; use a multiple",
        ),
        (
            made(a={"replicas": 4, "gpus": 1}, s={"replicas": 3, "gpus": 2, "target": "a"}),
            alike(1),
            "2 groups of 2 targets",
        ),
        (made(a={"target": "b"}, b={"target": "a"}), alike(1), "no order to start these in"),
        (made(a={"target": "gone"}), alike(1), "a beside gone"),
        (made(a={}), [], "no node"),
    ],
)
def test_refused(spec: Spec, nodes: list[Node], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(spec, nodes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- colocation --------------------------------------------------------------------------------------------


def test_beside_each_target_on_its_devices() -> None:
    placed = plan(made(a={"replicas": 3, "gpus": 2}, e={"target": "a"}, f={"target": "e", "gpus": 0}), alike(2, 4))
    assert seats(placed, "e") == seats(placed, "a")
    assert seats(placed, "f") == [("n0", ()), ("n0", ()), ("n1", ())]
    children = [p for p in placed if p.role == "e"]
    assert [(p.target, p.targets) for p in children] == [(f"a/{i}", (f"a/{i}",)) for i in range(3)]
    assert [(p.rank, p.world_size, p.local_rank, p.node_rank) for p in children] == [
        (0, 3, 0, 0),
        (1, 3, 1, 0),
        (2, 3, 0, 1),
    ]


def test_servers_on_the_gpus_of_several() -> None:
    placed = plan(made(actor={"replicas": 64, "gpus": 1}, server={"gpus": 4, "target": "actor"}), alike(8))
    servers = [p for p in placed if p.role == "server"]
    assert len(servers) == 16
    assert [p.gpus for p in servers[:2]] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert servers[3].targets == ("actor/12", "actor/13", "actor/14", "actor/15")
    assert servers[3].target == "actor/12"
    assert counts(placed, "server") == {f"n{i}": 2 for i in range(8)}


def test_groups_are_kept_on_one_node() -> None:
    """First fit alone would part the groups: a 6, z 2 on the first node."""
    spec = made(a={"replicas": 6, "gpus": 1}, z={"replicas": 8, "gpus": 1}, s={"gpus": 4, "target": "z"})
    assert all(count % 4 == 0 for count in counts(plan(spec, alike(2)), "z").values())
    uneven = [Node("x", 6), Node("y", 6)]
    placed = plan(made(z={"replicas": 8, "gpus": 1}, s={"gpus": 4, "target": "z"}), uneven)
    assert counts(placed, "z") == {"x": 4, "y": 4}


def test_groups_of_groups() -> None:
    spec = made(
        a={"replicas": 8, "gpus": 1},
        b={"gpus": 2, "target": "a"},
        c={"gpus": 4, "target": "b"},
        w={"gpus": 2},
    )
    placed = plan(spec, alike(2, 6))
    assert counts(placed, "a") == {"n0": 4, "n1": 4}
    assert [p.targets for p in placed if p.role == "c"] == [("b/0", "b/1"), ("b/2", "b/3")]


def test_children_cycle_over_slices() -> None:
    placed = plan(made(a={"replicas": 2, "gpus": 4}, e={"gpus": 2, "replicas": 6, "target": "a"}), alike(1))
    assert [p.gpus for p in placed if p.role == "e"] == [(0, 1), (2, 3), (0, 1), (4, 5), (6, 7), (4, 5)]
    assert [p.target for p in placed if p.role == "e"] == ["a/0"] * 3 + ["a/1"] * 3


def test_cpus_of_children_are_reckoned_with_the_target() -> None:
    spec = made(a={"replicas": 4, "gpus": 1, "cpus": 2}, e={"target": "a", "cpus": 2})
    assert counts(plan(spec, alike(2, 8, 8)), "a") == {"n0": 2, "n1": 2}
    with pytest.raises(PlanError, match=r"needs 4 CPUs \(2 of them for what goes beside\); the largest node has 3"):
        plan(spec, alike(2, 8, 3))


def test_roles_that_are_forked_later_have_no_place() -> None:
    placed = plan(made(a={"gpus": 1}, e={"target": "a", "autostart": False}), alike(1))
    assert [p.worker for p in placed] == ["a/0"]


@dataclass(frozen=True)
class Runs:
    """A worker that runs, as the head knows it."""

    worker: str
    node: str
    gpus: tuple[int, ...]


def test_fork_beside_running_workers() -> None:
    role = Role(command="x", cpus=3)
    one = colocate("eval", role, [Runs("rollout/3", "n1", (3,))])
    assert [(p.worker, p.node, p.gpus, p.rank, p.world_size, p.cpus) for p in one] == [("eval/0", "n1", (3,), 0, 1, 3)]
    targets = [Runs("rollout/0", "n0", (0,)), Runs("rollout/1", "n1", (0,))]
    placed = colocate("eval", role, targets, count=2)
    assert [(p.target, p.node) for p in placed] == [
        ("rollout/0", "n0"),
        ("rollout/0", "n0"),
        ("rollout/1", "n1"),
        ("rollout/1", "n1"),
    ]
    assert len(colocate("eval", role, targets, replicas=4, count=1)) == 4
    beside_child = colocate("proxy", Role(command="x", gpus=0), one)
    assert (beside_child[0].target, beside_child[0].gpus) == ("eval/0", ())
    with pytest.raises(PlanError, match="nothing to start eval beside"):
        colocate("eval", role, [])


def test_groups_of_workers_that_share_gpus_are_refused() -> None:
    shared = [Runs("e/0", "n0", (0,)), Runs("e/1", "n0", (0,))]
    with pytest.raises(PlanError, match="the next share those"):
        colocate("s", Role(command="x", gpus=2), shared)


# --- request -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (made(a={}), Request(1, 0, 1)),
        (made(a={"replicas": 4, "gpus": 1}, b={"gpus": 2}), Request(1, 6, 6)),
        (made(a={"replicas": 16, "gpus": 1}, b={"replicas": 16, "gpus": 2}), Request(6, 8, 8)),
        (made(3, a={"replicas": 16, "gpus": 1}, b={"replicas": 16, "gpus": 2}), Request(3, 16, 16)),
        (made(2, a={"replicas": 3, "gpus": 1}), Request(2, 2, 2)),
        (made(a={"replicas": 2, "gpus": 16}), Request(2, 16, 16)),
        (made(a={"replicas": 12, "gpus": 1}), Request(2, 6, 6)),
        (made(a={"replicas": 5, "gpus": 3}, slurm={"gpus-per-node": "8"}), Request(3, 8, 6)),
        (made(a={"replicas": 5, "gpus": 3}, slurm={"gres": "gpu:a100:8"}), Request(3, 8, 6)),
        (made(4, {"gpus-per-node": "8"}, a={"replicas": 5, "gpus": 3}), Request(4, 8, 6)),
        (made(a={"replicas": 4, "gpus": 1, "cpus": 8}), Request(1, 4, 32)),
        (made(a={"replicas": 4, "gpus": 1, "cpus": 8}, slurm={"cpus-per-task": "16"}), Request(2, 2, 16)),
        (
            made(a={"replicas": 4, "cpus": 8}, m={"per_node": 1, "cpus": 2}, slurm={"cpus-per-task": "18"}),
            Request(2, 0, 18),
        ),
        (made(a={"replicas": 2, "gpus": 1, "cpus": 2}, e={"target": "a", "cpus": 3}), Request(1, 2, 10)),
        (made(a={"replicas": 2, "gpus": 1}, e={"target": "a"}), Request(1, 2, 2)),
        (made(a={"gpus": 1}, e={"target": "a", "cpus": 9, "autostart": False}), Request(1, 1, 1)),
        (made(a={"replicas": 64, "gpus": 1}, s={"gpus": 4, "target": "a"}), Request(8, 8, 8)),
        (made(m={"per_node": 2, "gpus": 1}), Request(1, 2, 2)),
    ],
)
def test_request(spec: Spec, expected: Request) -> None:
    assert request(spec) == expected


def test_request_of_the_local_backend() -> None:
    spec = Spec(
        name="t",
        backend="local",
        local=Local(gpus_per_node=2, cpus_per_node=4),
        slurm={"gpus-per-node": "8"},
        roles={"a": Role(command="x", replicas=4, gpus=1)},
    )
    assert request(spec) == Request(2, 2, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (made(2, {"gpus-per-node": "8"}, a={"replicas": 17, "gpus": 1}), "2 nodes × 8 = 16: 1 too few"),
        (made(a={"gpus": 9}, slurm={"gpus-per-node": "8"}), "needs 9 GPUs; the largest node has 8"),
        (made(a={"cpus": 9}, slurm={"cpus-per-task": "8"}), "needs 9 CPUs; the largest node has 8"),
        (made(a={"gpus": 1, "cpus": 9}, slurm={"cpus-per-task": "8"}, nodes=1), "needs 9 CPUs; the largest"),
        (made(a={"replicas": 1_000_000, "gpus": 8}), "at least 1,000,000 nodes of 8 GPUs"),
    ],
)
def test_request_refused(spec: Spec, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        request(spec)
    assert message in str(caught.value)


# --- properties --------------------------------------------------------------------------------------------

SOME_CPUS = st.none() | st.integers(0, 6)


@st.composite
def primaries(draw: st.DrawFn) -> dict[str, Role]:
    found = {}
    for name in draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)):
        many = draw(st.integers(1, 6))
        count = {"per_node": min(many, 2)} if draw(st.integers(0, 4)) == 0 else {"replicas": many}
        gpus, autostart = draw(st.none() | st.integers(0, 4)), draw(st.booleans())
        found[name] = Role(command="x", gpus=gpus, cpus=draw(SOME_CPUS), autostart=autostart, **count)
    return found


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any mix of roles with devices of their own and colocated ones, in any order."""
    roles = draw(primaries())
    for name in draw(st.lists(st.sampled_from("uvwxyz"), max_size=3, unique=True)):
        target = draw(st.sampled_from(sorted(roles)))
        gpus = draw(st.none() | st.integers(0, 4))
        strategy = Strategy(type="colocation", target=target)
        autostart = roles[target].autostart and draw(st.booleans())
        replicas = draw(st.none() | st.integers(1, 6))
        roles[name] = Role(
            command="x",
            strategy=strategy,
            gpus=gpus,
            cpus=draw(SOME_CPUS),
            replicas=replicas,
            autostart=autostart,
        )
    order = draw(st.permutations(sorted(roles)))
    nodes = draw(st.none() | st.integers(1, 4))
    slurm = {"gpus-per-node": str(draw(st.integers(0, 8)))} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        slurm["cpus-per-task"] = str(draw(st.integers(1, 16)))
    return Spec(name="t", nodes=nodes, slurm=slurm, roles={name: roles[name] for name in order})


NODES = st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(1, 24)), min_size=1, max_size=5).map(
    lambda sizes: [Node(f"n{number}", gpus, cpus) for number, (gpus, cpus) in enumerate(sizes)]
)


def check(spec: Spec, nodes: Sequence[Node], placed: Sequence[Placement]) -> None:
    """Everything that must be true of a plan."""
    by_worker = {p.worker: p for p in placed}
    assert len(by_worker) == len(placed)
    size = {node.name: node for node in nodes}
    taken: dict[str, list[int]] = defaultdict(list)
    cpus: dict[str, int] = Counter()
    groups: dict[str, list[Placement]] = defaultdict(list)
    for p in placed:
        role = spec.roles[p.role]
        groups[p.role].append(p)
        cpus[p.node] += role.cpus or 0
        assert all(0 <= gpu < size[p.node].gpus for gpu in p.gpus)
        assert len(set(p.gpus)) == len(p.gpus)
        if role.colocated:
            targets = [by_worker[name] for name in p.targets]
            assert p.target == p.targets[0]
            assert {target.role for target in targets} == {role.strategy.target}
            assert {target.node for target in targets} == {p.node}
            devices = [gpu for target in targets for gpu in target.gpus]
            assert len(p.gpus) == (len(devices) if role.gpus is None else role.gpus)
            assert set(p.gpus) <= set(devices)
        else:
            assert len(p.gpus) == (role.gpus or 0)
            assert list(p.gpus) == list(range(p.gpus[0], p.gpus[0] + len(p.gpus))) if p.gpus else True
            taken[p.node] += p.gpus
    for node, used in taken.items():
        assert len(set(used)) == len(used), "a GPU was given to two workers"
        assert len(used) <= size[node].gpus
    for name, used_cpus in cpus.items():
        limit = size[name].cpus
        assert limit is None or used_cpus <= limit or not _counted(spec)
    for name, role in spec.roles.items():
        check_role(name, role, nodes, groups.get(name, []))


def _counted(spec: Spec) -> bool:
    """Whether the CPUs of what is colocated are known before packing: not beside per_node roles."""
    return not any(role.colocated and role.autostart and role.cpus for role in spec.roles.values()) or not any(
        role.per_node for role in spec.roles.values()
    )


def check_role(name: str, role: Role, nodes: Sequence[Node], group: list[Placement]) -> None:
    if role.colocated and not role.autostart:
        assert not group
        return
    if role.per_node is not None:
        assert Counter(p.node for p in group) == {node.name: role.per_node for node in nodes}
    elif not role.colocated or role.replicas is not None:
        assert len(group) == (role.replicas or 1)
    assert [p.index for p in group] == [p.rank for p in group] == list(range(len(group)))
    assert {p.world_size for p in group} == {len(group)}
    order = [node.name for node in nodes]
    positions = [order.index(p.node) for p in group]
    assert positions == sorted(positions), "ranks do not grow with the nodes"
    used = sorted(set(positions))
    assert [p.node_rank for p in group] == [used.index(position) for position in positions]
    for node in set(positions):
        here = [p for p, position in zip(group, positions, strict=True) if position == node]
        assert [p.local_rank for p in here] == list(range(len(here)))
        assert {p.local_world_size for p in here} == {len(here)}


@settings(max_examples=300, deadline=None)
@given(specs(), NODES, st.randoms(use_true_random=False))
def test_a_plan_is_right_or_refused(spec: Spec, nodes: list[Node], chance: random.Random) -> None:
    names = list(spec.roles)
    chance.shuffle(names)
    shuffled = Spec(name="t", slurm=spec.slurm, nodes=spec.nodes, roles={name: spec.roles[name] for name in names})
    try:
        placed = plan(spec, nodes)
    except PlanError as error:
        with pytest.raises(PlanError, match=f"^{re.escape(str(error))}$"):
            plan(shuffled, nodes)
        return
    check(spec, nodes, placed)
    assert plan(shuffled, nodes) == placed


@settings(max_examples=300, deadline=None)
@given(specs())
def test_what_is_requested_suffices(spec: Spec) -> None:
    try:
        asked = request(spec)
    except PlanError:
        return
    nodes = [Node(f"n{number}", asked.gpus_per_node, asked.cpus_per_node) for number in range(asked.nodes)]
    check(spec, nodes, plan(spec, nodes))
    assert asked.cpus_per_node >= 1
    assert spec.nodes in (None, asked.nodes)
    if "gpus-per-node" in spec.slurm:
        assert asked.gpus_per_node == int(spec.slurm["gpus-per-node"])


@settings(max_examples=200, deadline=None, derandomize=True)  # packing is hard; no promise is made
@given(st.lists(st.integers(1, 4), min_size=1, max_size=7), st.integers(1, 3), st.integers(4, 8))
def test_nothing_is_refused_that_another_order_would_fit(sizes: list[int], nodes: int, gpus: int) -> None:
    """GPUs alone: what one of 30 random orders of first fit places is placed."""
    spec = made(**{f"r{number}": {"gpus": size} for number, size in enumerate(sizes)})
    chance = random.Random(0)
    fits = any(first_fit(chance.sample(sizes, len(sizes)), nodes, gpus) for _ in range(30))
    if fits:
        assert len(plan(spec, alike(nodes, gpus))) == len(sizes)


def first_fit(sizes: Sequence[int], nodes: int, gpus: int) -> bool:
    free = [gpus] * nodes
    for size in sizes:
        home = next((number for number, left in enumerate(free) if left >= size), None)
        if home is None:
            return False
        free[home] -= size
    return True


def test_large_runs_are_planned_quickly() -> None:
    """128 nodes of 8 GPUs with a child beside each, and a thousand nodes that do not suffice."""
    roles = {
        "rollout": {"replicas": 768, "gpus": 1},
        "actor": {"replicas": 256, "gpus": 1},
        "e": {"target": "rollout"},
    }
    placed = plan(made(**roles), alike(128))
    assert len(placed) == 768 + 256 + 768
    with pytest.raises(PlanError, match="too few"):
        plan(
            made(**{f"r{i}": {"replicas": 1000, "gpus": 1 + i % 8, "cpus": i} for i in range(12)}),
            alike(1000, 8, 64),
        )
