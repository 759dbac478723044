"""The device mesh, and where parameters and batches lie on it (the table of dims is in model/axes.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding

from lckv_jax.config import MeshConfig, ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import MESH_AXES, activation_spec, parameter_spec
from lckv_jax.model.transformer import dim_sizes, parameter_dims


def mesh_sizes(config: MeshConfig, devices: int, whose: str, slices: int = 1) -> tuple[int, ...]:
    """The sizes of data, fsdp and tensor on so many devices, -1 being what the others leave.

    whose: the devices, for the message, such as "of this machine". slices: how many `data` must span.
    Raises UserError if the sizes do not multiply to the number of devices, or data is not a multiple of the slices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    given = f"data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}"
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh: {given} does not fit the {devices} device{'s' if devices > 1 else ''} {whose}; the sizes must "
            f"multiply to that number (one of them may be -1), as mesh.data={devices} mesh.fsdp=1 mesh.tensor=1 do"
        )
    if sizes[0] % slices:
        raise UserError(
            f"mesh: {given} makes data={sizes[0]} on the {devices} devices {whose}, which is not a multiple of their "
            f"{slices} slices, and only data may span slices; use mesh.data={slices}, fsdp and tensor multiplying to "
            f"the {devices // slices} devices of one"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes data, fsdp and tensor; GSPMD places what the table leaves open.

    Of TPU slices, which are joined by a slower network, only `data` spans several.
    Raises UserError if the sizes do not multiply to the number of devices, or data is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    processes = len({device.process_index for device in devices})
    whose = "of this machine" if processes == 1 else f"of {processes} processes"
    sizes = mesh_sizes(config, len(devices), whose, number_of_slices(devices))
    return Mesh(arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def number_of_slices(devices: Sequence[Any]) -> int:
    """The TPU slices of these devices; 1 for other devices, whose hosts have a `slice_index` each."""
    return len(set(map(_slice, devices))) if devices[0].platform == "tpu" else 1


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of these sizes, neighbours on the last axis; sizes[0] is a multiple of the TPU slices.

    `jax.make_mesh` would refuse several slices, and hosts of GPUs are slices to it. Any axis may span those: in their
    order, tensor and fsdp span as few of them as they can.
    """
    if devices[0].platform != "tpu":
        grid = np.empty(len(devices), dtype=object)
        grid[:] = sorted(devices, key=_slice)
        return grid.reshape(sizes)
    slices = number_of_slices(devices)
    if slices == 1:
        return create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    inside, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    return create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def _slice(device: Any) -> int:
    index = getattr(device, "slice_index", None)  # None on a topology of one slice
    return 0 if index is None else index


def replicated_dims(config: ModelConfig, mesh: Mesh) -> str:
    """The dims that stay whole although the table splits them: K, if there are too few K/V heads to split."""
    return "K" if config.num_kv_heads % mesh.shape["tensor"] else ""


def check_sizes(config: ModelConfig, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError, with the numbers, if an axis of the mesh does not divide what it splits."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % rows:
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by the {rows} devices that split the batch "
            f"(mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); change one of them"
        )
    names = {"D": "hidden_size", "V": "vocab_size", "N": "num_heads", "F": "intermediate_size"}
    for dim, name in names.items():
        axis = "fsdp" if dim == "D" else "tensor"
        if dim_sizes(config)[dim] % mesh.shape[axis]:
            raise UserError(
                f"model.{name}={dim_sizes(config)[dim]} is not divisible by mesh.{axis}={mesh.shape[axis]}; "
                "change one of them"
            )


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every parameter, in the shape of the parameter tree."""
    whole = replicated_dims(config, mesh)
    return jax.tree.map(lambda dims: NamedSharding(mesh, parameter_spec(dims, whole)), parameter_dims(config))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batch arrays [B, T+1]: rows split, columns whole."""
    return NamedSharding(mesh, activation_spec("BT"))
