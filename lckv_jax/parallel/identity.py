"""Which process of a run this one is: told by flags, by variables, or by what JAX knows of the cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lckv_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Flags(NamedTuple):
    """--coordinator, --processes and --process of a command; all or none of them."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class Identity(NamedTuple):
    """A process of a run.

    how: what told it, for people. coordinator: HOST:PORT of process 0; None = JAX finds it out, and the other two
    with it. local_devices: its own of the GPUs that it sees; None = all of them.
    """

    how: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_devices: tuple[int, ...] | None = None


ALONE = Identity("one process alone", None, 1, 0)


def identify(flags: Flags, environ: Mapping[str, str], gpus: int = 0, on_tpu: bool = False) -> Identity:
    """Who this process is: by flags; else by the variables of Kubeflow and of launch/; else by Slurm, Open MPI or TPU.

    gpus: how many this process could see. Under Slurm and Open MPI they are split evenly over the tasks of the node,
    whether there is one task a GPU, one task a node, or anything between; a task that sees one GPU has that one.
    Raises UserError if something is said by halves, or does not fit.
    """
    if any(flag is not None for flag in flags):
        return _explicit("flags", ("--coordinator", "--processes", "--process"), list(flags))
    given = [environ.get(name) or None for name in _VARIABLES]
    if given[1] is not None or given[2] is not None:  # the address alone also serves JAX' own detection
        return _explicit("variables", _VARIABLES, given)
    if "SLURM_STEP_NODELIST" in environ and _number(environ, "SLURM_NTASKS", 1) > 1:
        tasks = _tasks_on_node(environ)
        return Identity("Slurm", local_devices=_share(gpus, tasks, _number(environ, "SLURM_LOCALID", 0)))
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        tasks, rank = (_number(environ, f"OMPI_COMM_WORLD_LOCAL_{name}", 0) for name in ("SIZE", "RANK"))
        return Identity("Open MPI", local_devices=_share(gpus, max(tasks, 1), rank))
    return Identity("TPU") if on_tpu else ALONE


def _explicit(how: str, names: Sequence[str], values: Sequence[str | int | None]) -> Identity:
    missing = [name for name, value in zip(names, values) if value is None]
    if missing:
        raise UserError(f"{how}: {', '.join(names)} go together, and {', '.join(missing)} is missing; give all of them")
    address, *counts = map(str, values)
    if not all(count.isdecimal() for count in counts) or not int(counts[1]) < int(counts[0]):
        raise UserError(f"{how}: {names[1]}={counts[0]} and {names[2]}={counts[1]}; N processes are numbered 0 to N-1")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{how}: {names[0]}={address} is not HOST:PORT, such as 10.0.0.1:8476, the same everywhere")
    return Identity(how, address, int(counts[0]), int(counts[1])) if int(counts[0]) > 1 else ALONE


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Of SLURM_STEP_TASKS_PER_NODE, such as 8(x2),4: the tasks of each node in order."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks[min(_number(environ, "SLURM_NODEID", 0), len(tasks) - 1)]


def _share(gpus: int, tasks: int, rank: int) -> tuple[int, ...] | None:
    """The GPUs of the task `rank` of `tasks` on a node, where each task sees `gpus`; None if there are none."""
    if gpus <= 1 or tasks <= 1:
        return tuple(range(gpus)) or None  # said, since JAX would take the one of the task's own number
    if gpus % tasks:
        raise UserError(
            f"{tasks} tasks on this node see {gpus} GPUs each, which they cannot share evenly; start one task a GPU or "
            "one a node (--ntasks-per-node)"
        )
    each = gpus // tasks
    return tuple(range(rank * each, (rank + 1) * each))


def visible_gpus(environ: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this process may use, without touching them; 0 where JAX is told to leave them alone."""
    if environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def is_on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs that JAX will use."""
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
