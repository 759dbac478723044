"""The device mesh, and where parameters and batches lie on it (the table of dims is in model/axes.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from lckv_jax.config import MeshConfig, ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import MESH_AXES, activation_spec, parameter_spec
from lckv_jax.model.transformer import dim_sizes, parameter_dims


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes data, fsdp and tensor; GSPMD places what the table leaves open.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not fit the {len(devices)} "
            "device(s) of this machine; the sizes must multiply to that number (one of them may be -1), as "
            f"mesh.data={len(devices)} mesh.fsdp=1 mesh.tensor=1 do"
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


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
