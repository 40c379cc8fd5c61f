"""Who am I? Literal tables of launchers' variables and SLURM node lists, and helpers in a world of one."""

import socket

import pytest
import torch

from engine.run.start import start_ranks
from tests.in_process import TINY, configure, working_in
from tests.support import refuses, set_variables
from utils.ranks import distributed
from utils.ranks.distributed import World, detect_world
from utils.record.logging import environment_rank

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
STEP = {
    "SLURM_JOB_ID": "41007", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_NODELIST": "gpu[01-08]",
}  # fmt: skip
WORLDS = {
    "plain python": ({}, World()),
    "torchrun": (TORCHRUN, World(3, 4, 1, "torchrun", "node1", 1234)),
    "torchrun's variables by hand": (
        {"RANK": "1", "WORLD_SIZE": "2"},
        World(1, 2, 0, "torchrun", "127.0.0.1", 29500),
    ),
    "torchrun inside a SLURM step": ({**STEP, **TORCHRUN}, World(3, 4, 1, "torchrun", "node1", 1234)),
    "a SLURM step": (STEP, World(5, 8, 1, "slurm", "gpu03", 11007)),
    "a SLURM step of one task": ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World()),
    # sbatch's own shell has the job's variables, and even a rank, but is no step: `python` in it is one process.
    "a SLURM batch shell": (
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_JOB_NODELIST": "gpu[01-08]"},
        World(),
    ),
}  # fmt: skip


def test_the_processes_of_a_job_choose_one_port_and_another_step_another():
    ports = [detect_world({**STEP, **other}).port for other in ({}, {"SLURM_PROCID": "2"}, {"SLURM_STEP_ID": "7"})]
    assert ports[0] == ports[1] != ports[2] and all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize("rank, is_held", [("0", True), ("1", True), ("0", False)])
def test_a_port_of_another_program_or_a_lacking_rank_ends_every_rank(rank, is_held, monkeypatch):
    """Rank 0 cannot listen; the other program takes the connection of rank 1 and never answers."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        if not is_held:
            server.close()
        variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        set_variables(monkeypatch, variables)
        said = rf"^MASTER_ADDR, MASTER_PORT: the ranks cannot meet at 127.0.0.1:{port}: .*; name .* a free port"
        with refuses(said):
            distributed.init_process_group("cpu", timeout_sec=3.0)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu03,gpu04", "gpu03"), ("gpu[03-05,9],x1", "gpu03"), ("gpu[3,7]", "gpu3"),
        ("n1.example.org,n2", "n1.example.org"),
        ("rack[1-2]-node[01-04]", "rack1-node01"), ("gpu[03-05]-ib,x", "gpu03-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes, first):
    assert detect_world({**STEP, "SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize("case", WORLDS)
def test_the_world_of_a_launcher_and_its_rank_before_there_is_a_group(case, monkeypatch):
    environment, world = WORLDS[case]
    for name in set(TORCHRUN) | set(STEP):
        monkeypatch.delenv(name, raising=False)
    set_variables(monkeypatch, environment)
    assert detect_world(environment) == world and environment_rank() == world.rank


def test_ranks_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda value: ["a", "b", "a"])
    with refuses(r"^version: ranks \[1\] differ from rank 0 \('b' against 'a'\); start all"):
        distributed.check_same("version", "a")


def test_a_start_compares_configuration_and_precision(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(distributed, "check_same", lambda *given: compared.append(given))
    for seed in (0, 1):
        config, _ = configure("finetune", [*TINY, "data.root=images", f"seed={seed}"])
        with working_in(tmp_path):
            start_ranks(config)
    names, values = zip(*compared)
    assert names == ("configuration", "runtime.precision") * 2
    assert values[0] != values[2] and values[1] == values[3] == "fp32"


@pytest.mark.parametrize(
    "world, gpus, expected",
    [
        (World(3, 4, 1, "torchrun"), 2, 1),
        (World(5, 8, 1, "slurm"), 4, 1),
        (World(5, 8, 1, "slurm"), 1, 0),  # srun --gpus-per-task=1 shows each process its own GPU
    ],
)
def test_a_rank_takes_the_gpu_of_its_local_rank(world, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.local_device_index(world) == expected
    with refuses(r"^runtime\.device: rank 9 needs GPU 9 of its node"):
        distributed.local_device_index(World(9, 16, 9, "torchrun"))


@pytest.mark.parametrize("backends, failed, leaves", [
    ("cpu:gloo,cuda:nccl", True, False), ("cpu:gloo,cuda:nccl", False, True), ("cpu:gloo", True, True),
])  # fmt: skip
def test_a_failed_rank_does_not_wait_for_its_peers_in_nccl(backends, failed, leaves, monkeypatch):
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    assert distributed.shutdown(failed=failed) and bool(left) == leaves
