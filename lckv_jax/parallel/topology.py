"""Hardware by name, such as v5e-16, to compile for where it is not."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from lckv_jax.config import MeshConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import MESH_AXES
from lckv_jax.parallel.mesh import mesh_sizes

GIB = 2**30


class Topology(NamedTuple):
    """Devices by name. platform: tpu, gpu or cpu. layout: of the chips of a slice as libtpu names it, such as v5e:4x4;
    "" for fake devices. slices: TPU slices. hbm: usable bytes of one chip; None where that is not known."""

    name: str
    platform: str
    devices: int
    layout: str = ""
    slices: int = 1
    hbm: int | None = None


class _Chip(NamedTuple):
    """hbm: what libtpu lets a program use of one chip. number: what the N of v5e-N counts for each chip: cores on v5p,
    chips elsewhere. layouts: those that N names."""

    hbm: int
    number: int
    layouts: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_CHIPS = {
    "v5e": _Chip(int(15.75 * GIB), 1, _FLAT),
    "v5p": _Chip(int(95.74 * GIB), 2, _CUBES),
    "v6e": _Chip(int(31.25 * GIB), 1, _FLAT),
}
_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<kind>[a-z]\w*)(?:-(?P<number>\d+)|:(?P<layout>\d+(?:x\d+)+))")


def parse_topology(name: str) -> Topology:
    """The hardware of a name: v5e-16 (as the cloud names slices), v5e:4x4 (the layout of their chips), 2xv5e-16 (two
    slices), gpu-16 or cpu-16 (fake devices).

    Raises UserError with names that are near.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None or (found["kind"] not in _CHIPS and found["kind"] not in ("cpu", "gpu")):
        raise _unknown(name)
    slices = int(found["slices"] or 1)
    if found["kind"] in ("cpu", "gpu"):
        if not found["number"] or found["slices"] or not int(found["number"]):
            raise _unknown(name)
        return Topology(name, found["kind"], int(found["number"]))
    chip = _CHIPS[found["kind"]]
    layout = found["layout"] or next((x for x in chip.layouts if _number(chip, x) == int(found["number"])), None)
    chips = 0 if layout is None else _chips(layout)
    if layout is None or not slices * chips or layout.count("x") != chip.layouts[0].count("x"):
        raise _unknown(name)
    return Topology(name, "tpu", slices * chips, f"{found['kind']}:{layout}", slices, chip.hbm)


def _chips(layout: str) -> int:
    return math.prod(map(int, layout.split("x")))


def _number(chip: _Chip, layout: str) -> int:
    return chip.number * _chips(layout)


def _unknown(name: str) -> UserError:
    known = [f"{kind}-{_number(chip, layout)}" for kind, chip in _CHIPS.items() for layout in chip.layouts]
    near = difflib.get_close_matches(name.lower(), known, 3, 0.5)
    mend = f"; did you mean {' or '.join(near)}?" if near else ""
    return UserError(
        f"--topology {name}: there is no such hardware{mend} (known: v5e-N and v6e-N of N chips, v5p-N of N/2, as in "
        "v5e-16 or v5e:4x4; 2xv5e-16 of two slices; cpu-N and gpu-N of N fake devices)"
    )


def abstract_mesh(config: MeshConfig, topology: Topology) -> AbstractMesh:
    """The mesh of a topology without its devices. Raises UserError as `make_mesh` does."""
    sizes = mesh_sizes(config, topology.devices, f"of {topology.name}", topology.slices)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for; accelerators that are there are left alone.

    jax must not have used any device yet. Nothing can be computed, and no array made, on TPUs that are only described.
    Raises UserError if libtpu is not installed, or refuses the layout.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.platform != "tpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"--topology {topology.name}: the compiler for TPUs is not installed; "
            'pip install "jax[tpu]", best in an environment of its own'
        )
    # libtpu would ask the cloud what machine this is, warn of every answer that it does not get, and refuse to be
    # loaded twice on a machine, because it could compute there
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    slices: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if topology.layout.endswith(":1x1") else {}  # by default 2 x 2 chips
    try:
        return topologies.get_topology_desc(topology.layout, "tpu", **slices, **hosts).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology.name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
