"""Which process this is: flags before variables before clusters; GPUs split over the tasks of a node."""

import pytest

from lckv_jax.errors import UserError
from lckv_jax.parallel.identity import ALONE, Flags, Identity, identify, is_on_tpu, visible_gpus

ADDRESS = "10.0.0.1:8476"
VARIABLES = {"JAX_COORDINATOR_ADDRESS": ADDRESS, "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_nothing_said_is_one_process_alone():
    assert identify(Flags(), {}) == ALONE


def test_flags_come_before_variables_and_variables_before_slurm():
    flags = Flags("host:1", 2, 1)
    assert identify(flags, VARIABLES | SLURM) == Identity("flags", "host:1", 2, 1)
    assert identify(Flags(), VARIABLES | SLURM) == Identity("variables", ADDRESS, 4, 3)
    assert identify(Flags(), SLURM).how == "Slurm"
    assert identify(Flags(), OMPI).how == "Open MPI"
    assert identify(Flags(), {}, on_tpu=True).how == "TPU"


def test_the_address_alone_leaves_the_rest_to_the_cluster():
    assert identify(Flags(), {"JAX_COORDINATOR_ADDRESS": ADDRESS} | SLURM).how == "Slurm"


def test_one_process_needs_no_others():
    assert identify(Flags(ADDRESS, 1, 0), {}) == ALONE
    assert identify(Flags(), SLURM | {"SLURM_NTASKS": "1"}) == ALONE
    assert identify(Flags(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) == ALONE  # a batch script, no srun


@pytest.mark.parametrize(
    ("environ", "gpus", "devices"),
    [
        (SLURM, 0, None),
        (SLURM, 1, (0,)),  # --gpus-per-task=1: each sees its own as number 0
        (SLURM, 2, (1,)),  # one task a GPU, all visible
        (SLURM, 8, (4, 5, 6, 7)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, 8, tuple(range(8))),  # one a node
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NODEID": "1"}, 4, (1,)),
        (OMPI, 4, (2, 3)),
    ],
)
def test_tasks_of_a_node_share_its_gpus(environ, gpus, devices):
    assert identify(Flags(), environ, gpus).local_devices == devices


@pytest.mark.parametrize(
    ("flags", "environ", "gpus", "words"),
    [
        (Flags("host:1", 2), {}, 0, "--process is missing"),
        (Flags("host:1", 2, 2), {}, 0, "numbered 0 to N-1"),
        (Flags("host", 2, 1), {}, 0, "is not HOST:PORT"),
        (Flags(), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, 0, "JAX_COORDINATOR_ADDRESS is missing"),
        (Flags(), VARIABLES | {"JAX_PROCESS_ID": "one"}, 0, "numbered 0 to N-1"),
        (Flags(), SLURM, 5, "2 tasks on this node see 5 GPUs"),
    ],
)
def test_what_is_said_by_halves_is_refused(flags, environ, gpus, words):
    with pytest.raises(UserError, match=words):
        identify(flags, environ, gpus)


def test_gpus_are_counted_as_cuda_would():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,2,3"}) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}) == 0
    assert not is_on_tpu({"JAX_PLATFORMS": "cpu"})
