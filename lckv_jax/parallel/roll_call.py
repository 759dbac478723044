"""`processes`: who is there, with which devices, and whether they can compute together."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lckv_jax.config import MeshConfig, ProcessesConfig
from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.parallel.identity import Flags
from lckv_jax.parallel.mesh import make_mesh

_BYTES = 4 * 2**20  # of the timed collective, on each device


def roll_call(flags: Flags, config: ProcessesConfig) -> None:
    """Prints what was detected, the devices of each process, the mesh, and a collective's result and time.

    Raises UserError as `processes.start` does, and if the collective gives a wrong number.
    """
    began = time.monotonic()
    identity = processes.start(flags, config)
    told = processes.gather("roll call", json.dumps(_about_me()))
    say = print if processes.index() == 0 else lambda *_: None
    say(f"detected: {identity.how}; {processes.count()} process(es), met in {time.monotonic() - began:.1f} s")
    for number, text in enumerate(told):
        about = json.loads(text)
        say(f"  process {number}: {about['host']} (pid {about['pid']}), {about['devices']}")
    mesh = make_mesh(MeshConfig())
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"devices: {jax.device_count()} {jax.devices()[0].platform}, mesh with the defaults: {shape}")
    seconds = _add_up(NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    number = jax.device_count()
    say(f"collective: the sum of 1 to {number} over all devices is {number * (number + 1) // 2}, as it should be;")
    say(f"  an all-reduce of {_BYTES / 2**20:g} MiB a device takes {1e3 * seconds:.1f} ms")
    processes.wait_for_all("roll call")


def _about_me() -> dict[str, object]:
    devices = jax.local_devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    ids = ", ".join(str(device.id) for device in devices)
    return {"host": socket.gethostname(), "pid": os.getpid(), "devices": f"{len(devices)} device(s): {kinds} ({ids})"}


def _add_up(sharding: NamedSharding) -> float:
    """Seconds of an all-reduce in which every device adds its number, compiled before; raises UserError if it errs."""
    size, number = _BYTES // 4, sharding.mesh.size

    def row(index: Any) -> np.ndarray:
        return np.full((1, size), index[0].indices(number)[0] + 1, np.float32)

    numbers = jax.make_array_from_callback((number, size), sharding, row)
    add_up = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    total, times = add_up(numbers), []
    for _ in range(3):
        started = time.monotonic()
        jax.block_until_ready(add_up(numbers))
        times.append(time.monotonic() - started)
    expected = number * (number + 1) / 2
    if not np.all(np.asarray(total.addressable_data(0)) == expected):
        raise UserError(
            f"process {processes.index()}: the sum over all devices is {float(total[0])}, not {expected}; a link or a "
            "device is broken"
        )
    return min(times)
