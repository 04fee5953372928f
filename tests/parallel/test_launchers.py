"""Every launcher's variables, as torchrun, SLURM 22.05, Open MPI 5.0, MPICH 4.0 and DeepSpeed 0.19 set them."""

import pytest

from parallel.errors import LaunchError
from parallel.launchers import FIRST_PORT, PORTS, Launch, MeetingPoint, detect, expand_counts, expand_hosts

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
DEEPSPEED |= {"MASTER_ADDR": "n01", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n02",
}
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"RANK": "3", "LOCAL_RANK": "1", "SIZE": "4", "LOCAL_SIZE": "2"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in OPEN_MPI.items()} | {"PMIX_NAMESPACE": "prterun-n01-1234@1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def facts(launch: Launch) -> tuple:
    return launch.rank, launch.local_rank, launch.world_size, launch.local_world_size, launch.launcher


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, (5, 1, 8, 4, "torchrun")),
        (DEEPSPEED, (5, 1, 8, 4, "deepspeed")),
        (SRUN, (3, 1, 4, 2, "srun")),
        (OPEN_MPI, (3, 1, 4, 2, "mpirun")),
        (HYDRA, (3, 1, 4, 2, "mpirun")),
        (SRUN | TORCHRUN, (5, 1, 8, 4, "torchrun")),  # torchrun inside srun, whose task it is
        (SRUN | {"SLURM_PROCID": "1"} | OPEN_MPI, (3, 1, 4, 2, "mpirun")),  # srun has started Open MPI's daemon
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "17.0"}, (3, 1, 4, 2, "srun")),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.17.0"}, (3, 1, 4, 2, "srun")),  # srun --mpi=pmix
        (BATCH, (0, 0, 1, 1, "one process in SLURM job 17, not started by srun")),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, (0, 0, 1, 1, "one process in SLURM job 17, not started by srun")),
        ({"HOME": "/root"}, (0, 0, 1, 1, "one process")),
    ],
)
def test_the_rank_is_the_innermost_launchers(environment, expected):
    assert facts(detect(environment)) == expected


def test_all_tasks_of_a_step_meet_at_one_place_and_one_of_them_serves():
    """However ranks are dealt out: with --distribution=arbitrary rank 0 may be on the last node."""
    for ranks in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 3, 1, 0)):  # by node and local rank
        launches = [
            detect(SRUN | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(place // 2), "SLURM_LOCALID": str(place % 2)})
            for place, rank in enumerate(ranks)
        ]
        points = [launch.meeting_point for launch in launches]
        assert {(point.host, point.port) for point in points} == {("n01", points[0].port)}
        assert [point.serves for point in points] == [True, False, False, False]
        assert FIRST_PORT <= points[0].port < FIRST_PORT + PORTS
    assert detect(SRUN | {"SLURM_STEP_ID": "1"}).meeting_point.port != points[0].port


def test_a_step_on_a_part_of_the_job():
    part = {"SLURM_STEP_NODELIST": "n02", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3"}
    launch = detect(SRUN | part | {"SLURM_NODEID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"})
    assert facts(launch) == (2, 2, 3, 3, "srun") and launch.meeting_point.host == "n02"


@pytest.mark.parametrize("environment", [SRUN, OPEN_MPI, HYDRA, TORCHRUN], ids=["srun", "openmpi", "hydra", "torchrun"])
def test_an_address_that_is_given_counts(environment):
    given = {"MASTER_ADDR": "login", "MASTER_PORT": "29500"}
    assert detect(environment | given).meeting_point == MeetingPoint("login", 29500, serves=False)


def test_on_one_node_mpirun_needs_no_address():
    alone = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    first = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    points = [detect(OPEN_MPI | alone | further).meeting_point for further in ({}, first)]
    assert points[0].host == "127.0.0.1" and points[0].port == points[1].port
    assert [point.serves for point in points] == [False, True]
    assert detect(OPEN_MPI).meeting_point is None  # several nodes: rank 0 tells the others over MPI


@pytest.mark.parametrize(
    ("further", "own"),
    [
        ({}, False),
        ({"SLURM_GPUS_PER_NODE": "2"}, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu:8,gres/gpu:1"}, True),
        ({"SLURM_GPU_BIND": "single:1"}, True),
        ({"SLURM_GPU_BIND": "closest"}, False),
    ],
    ids=str,
)
def test_whether_each_task_sees_its_own_gpu(further, own):
    assert detect(SRUN | further).own_device == own


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 is not below SLURM_STEP_TASKS_PER_NODE=2"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "SLURM_STEP_TASKS_PER_NODE='2' .* says nothing of node 1"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two' .* 'two' is no count"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[01"}, r"SLURM_STEP_NODELIST='n\[01' .* is no list of hosts"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_ID but no SLURM_STEP_NODELIST"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_STEP_ID but no SLURM_LOCALID: start with srun"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=3 is not below OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_RANK": "0"}, "PMI_RANK but no MPI_LOCALRANKID: start with mpirun"),
        (SRUN | {"MASTER_ADDR": "n01"}, "MASTER_ADDR but no MASTER_PORT: export both"),
        (SRUN | {"MASTER_PORT": "1"}, "MASTER_PORT but no MASTER_ADDR: export both"),
    ],
)
def test_what_does_not_fit_is_named(environment, text):
    with pytest.raises(LaunchError, match=text):
        detect(environment)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n01", ["n01"]),
        ("n[01-02,05],m1", ["n01", "n02", "n05", "m1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("tux[0-1]-ib", ["tux0-ib", "tux1-ib"]),
        ("a,b[3]", ["a", "b3"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["n[01-02", "n01]", "n[]", "a,,b", ",a", "n[x-y]", "n[1-2]]"])
def test_what_is_no_list_of_hosts(text):
    with pytest.raises(ValueError):
        expand_hosts(text)


def test_counts_per_node():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("8") == [8]
