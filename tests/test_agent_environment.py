"""What a worker finds in its environment, and what an agent makes of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from slurmfork.agent import environment, node
from slurmfork.agent.environment import inherited, of_worker
from slurmfork.agent.grant import granted
from slurmfork.agent.node import Node, here
from slurmfork.errors import UsageError
from slurmfork.messages import Device
from slurmfork.orders import Order
from slurmfork.rundir import RunDir


def a_node(*devices: Device, amd: bool = False, **variables: str) -> Node:
    return Node(
        name="n7",
        run_id="demo-abcdef",
        rundir=RunDir(Path("/runs/demo-abcdef")),
        heads=(("127.0.0.1", 1),),
        devices=devices,
        environment=variables,
        amd=amd,
        variables=granted(variables).variables,
    )


def worker_environment(node: Node, **fields: object) -> dict[str, str]:
    order = Order(worker="rollout/3", command=["x"], cwd="/", **fields)  # type: ignore[arg-type]
    return of_worker(
        node,
        order,
        base=inherited(node.environment),
        ports=[20001, 20002],
        socket=Path("/s/agent.sock"),
        scratch=Path("/s/t/rollout-3"),
        notify=None,
    )


def test_a_worker_is_told_who_and_where_it_is() -> None:
    found = worker_environment(a_node(4, 5, 6, 7), devices=[1, 3], target="actor/3", env={"RANK": "3"})
    assert found == {
        "TMPDIR": "/s/t/rollout-3",
        "RANK": "3",
        "SLURMFORK_RUN_ID": "demo-abcdef",
        "SLURMFORK_RUN_DIR": "/runs/demo-abcdef",
        "SLURMFORK_NODE": "n7",
        "SLURMFORK_WORKER": "rollout/3",
        "SLURMFORK_ROLE": "rollout",
        "SLURMFORK_INDEX": "3",
        "SLURMFORK_PORTS": "20001,20002",
        "SLURMFORK_AGENT": "/s/agent.sock",
        "SLURMFORK_TARGET": "actor/3",
        "CUDA_VISIBLE_DEVICES": "5,7",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_what_would_mislead_it_is_withheld_and_what_tells_of_the_job_stays() -> None:
    misleading = [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        "SLURM_NPROCS",
        "SLURM_STEP_ID",
        "SLURM_STEPID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_TASK_PID",
        "SLURM_CPU_BIND_LIST",
        "PMI_RANK",
        "PMIX_RANK",
        "OMPI_COMM_WORLD_RANK",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "SLURMFORK_HEAD",
        "SLURMFORK_GUARDIAN_GRACE",
        "NOTIFY_SOCKET",
        "SLURMFORK_TARGET",
        "SLURMFORK_LOCAL_DEVICES",
        "HIP_VISIBLE_DEVICES",
    ]
    useful = [
        "SLURM_JOB_ID",
        "SLURM_NODEID",
        "SLURM_JOB_NODELIST",
        "OMPI_MCA_btl",
        "PATH",
        "SLURM_CPUS_ON_NODE",
        "MY_RANK",
    ]
    assert sorted(inherited(dict.fromkeys(misleading + useful, "1"))) == sorted(useful)


def test_later_words_win_the_order_over_the_node_and_ours_over_the_order() -> None:
    found = worker_environment(a_node(A="node", B="node"), env={"B": "order", "SLURMFORK_WORKER": "liar/0"})
    assert (found["A"], found["B"], found["SLURMFORK_WORKER"]) == ("node", "order", "rollout/3")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, "1"),
        ({"LOCAL_WORLD_SIZE": "1"}, None),
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "6"}, "6"),
    ],
)
def test_threads_are_limited_as_torchrun_does(env: dict[str, str], expected: str | None) -> None:
    assert worker_environment(a_node(), env=env).get("OMP_NUM_THREADS") == expected


def test_without_devices_none_are_visible() -> None:
    assert worker_environment(a_node(0, 1))["CUDA_VISIBLE_DEVICES"] == ""


def test_the_other_vendors_variables_are_sliced_where_the_node_has_them() -> None:
    found = worker_environment(a_node(2, 3, ZE_AFFINITY_MASK="2,3", ROCR_VISIBLE_DEVICES="2,3"), devices=[1])
    assert found["CUDA_VISIBLE_DEVICES"] == found["ZE_AFFINITY_MASK"] == found["ROCR_VISIBLE_DEVICES"] == "3"


def test_on_amd_cudas_variable_counts_within_what_rocr_leaves() -> None:
    found = worker_environment(a_node(4, 5, 6, amd=True, ROCR_VISIBLE_DEVICES="4,5,6"), devices=[1, 2])
    assert found["ROCR_VISIBLE_DEVICES"] == "5,6"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_device_that_was_not_granted_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"device 2 .* granted 2"):
        environment.slice_of((0, 1), [2])


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, (0, 3)),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a,GPU-2b"}, ("MIG-1a", "GPU-2b")),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ()),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"ROCR_VISIBLE_DEVICES": "1"}, (1,)),
        ({"ZE_AFFINITY_MASK": "0.0,0.1"}, ("0.0", "0.1")),
        ({"SLURMFORK_LOCAL_DEVICES": "1,2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (1, 2)),
        ({"SLURMFORK_LOCAL_DEVICES": "", "CUDA_VISIBLE_DEVICES": "0"}, ()),
        ({"GPU_DEVICE_ORDINAL": "2,3"}, (2, 3)),
        ({"SLURM_STEP_GPUS": "2,3", "SLURM_GPUS_ON_NODE": "2"}, (2, 3)),
        ({"SLURM_STEP_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, (0, 1)),
        ({}, ()),
    ],
)
def test_granted_devices_are_read_as_they_are_given(variables: dict[str, str], devices: tuple[Device, ...]) -> None:
    assert granted(variables).devices == devices


def test_a_program_that_knows_opencl_alone_gets_its_own_where_that_is_all_that_slurm_says() -> None:
    found = worker_environment(a_node(2, 3, GPU_DEVICE_ORDINAL="2,3"), devices=[1])
    assert found["GPU_DEVICE_ORDINAL"] == "3"
    both = a_node(2, 3, GPU_DEVICE_ORDINAL="0,1", CUDA_VISIBLE_DEVICES="2,3")
    assert "GPU_DEVICE_ORDINAL" not in worker_environment(both, devices=[1])


def test_slurms_own_numbers_are_taken_where_it_names_devices_to_nobody(tmp_path: Path) -> None:
    said = {"SLURM_STEP_GPUS": "2,3", "SLURM_GPUS_ON_NODE": "2"}
    (tmp_path / "nvidia0").touch()  # another's, that can be opened: so ours are not counted from 0
    found = granted(said, places=tmp_path)
    assert found.devices == (2, 3)
    assert found.notes[0].endswith("by Slurm's own numbers they are 2,3")


def test_amd_s_devices_are_told_by_their_driver_where_slurm_names_no_vendor(tmp_path: Path) -> None:
    (tmp_path / "kfd").touch()
    found = granted({"SLURM_STEP_GPUS": "1", "SLURM_GPUS_ON_NODE": "1"}, places=tmp_path)
    assert (found.amd, found.devices, found.variables) == (True, (1,), ("ROCR_VISIBLE_DEVICES",))


@pytest.mark.parametrize("given", [{"SLURM_SHARDS_ON_NODE": "2"}, {"SLURMFORK_SHARES": "mps:50"}])
def test_a_part_of_a_gpu_is_no_device_of_a_workers_own_and_all_see_it(given: dict[str, str]) -> None:
    found = granted({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "1", **given})
    assert (found.devices, found.shared) == ((), (1,))
    assert "no GPU is whole" in found.notes[0]
    node = a_node(CUDA_VISIBLE_DEVICES="1")
    assert worker_environment(replace(node, shared=found.shared))["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("cgroups", "guarantee"),
    [
        ("0::/system.slice/n1_slurmstepd.scope/job_1/step_0/user/task_0\n", "cgroup"),
        ("0::/system.slice/n1_slurmstepd.scope/s4WSM853WAW100/step_0/user/task_0\n", "cgroup"),
        ("9:freezer:/slurm/uid_0/job_4/step_0\n4:memory:/slurm/uid_0/job_4/step_0/task_0\n0::/\n", "cgroup"),
        ("9:freezer:/\n4:memory:/slurm/uid_0/job_4/step_0/task_0\n0::/\n", "rings"),
        ("0::/user.slice/user-1000.slice/session-1.scope\n", "rings"),
        ("", "rings"),
    ],
)
def test_the_guarantee_is_read_from_the_cgroup_that_slurm_kills_by(cgroups: str, guarantee: str) -> None:
    assert node._guarantee(cgroups) == guarantee


def test_an_environment_that_no_head_made_is_refused(tmp_path: Path) -> None:
    good = {
        "SLURMFORK_RUN_ID": "a-bcdefg",
        "SLURMFORK_RUN_DIR": str(tmp_path),
        "SLURMFORK_HEAD": "[::1]:5,10.0.0.1:6",
    }
    found = here(good)
    assert found.heads == (("::1", 5), ("10.0.0.1", 6))
    assert found.cpus == len(os.sched_getaffinity(0))
    for name, value in (("RUN_ID", "../x"), ("RUN_DIR", "relative"), ("HEAD", ""), ("HEAD", "host")):
        with pytest.raises(UsageError, match=f"SLURMFORK_{name}"):
            here({**good, f"SLURMFORK_{name}": value})
