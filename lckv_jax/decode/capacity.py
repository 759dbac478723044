"""How many rows fit: by formula, and by what compiled programs say they need."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

from lckv_jax.errors import UserError

_CLOSE = 0.01  # a batch is as good as the largest if it is so near to it
_MOST_PROBES = 12


class Limit(NamedTuple):
    """Bytes that programs may take, and in words where that is from. emulated: nothing but our arithmetic holds it."""

    bytes: int
    what: str
    emulated: bool


def memory_limit(cap_bytes: int | None) -> Limit:
    """The memory of the first device: what its allocator has; on a CPU half of what is available; never above the cap.

    A cap is held by the allocator too where the process was started with a memory fraction to match; a CPU has none.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        limit = stats["bytes_limit"]
        if cap_bytes is None:
            return Limit(limit, "the device's allocator", False)
        return Limit(min(limit, cap_bytes), "a cap, held by the allocator", False)
    if cap_bytes is not None:
        return Limit(cap_bytes, "a cap, emulated by what compiled programs need", True)
    return Limit(available_bytes() // 2, "half of the machine's available memory", True)


def available_bytes() -> int:
    """Memory of this machine that processes can still have."""
    return _meminfo("MemAvailable")


def total_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # a Mac has no /proc


def _meminfo(name: str) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def check_fits(weight_bytes: int, row_bytes: int, batch: int) -> None:
    """Raises UserError if weights and the caches of `batch` rows alone are more than the memory there is."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit") or total_bytes()
    if weight_bytes + batch * row_bytes > limit:
        fit = max(0, (limit - weight_bytes) // row_bytes)
        mend = f"give at most {fit} at once" if fit else "give a cache that keeps less, or fewer new tokens"
        raise UserError(
            f"a batch of {batch} does not fit: weights of {weight_bytes / 1e9:.2f} GB and a cache of "
            f"{batch * row_bytes / 1e9:.2f} GB, but the device has {limit / 1e9:.2f} GB; {mend}"
        )


@contextmanager
def memory_told(batch: int) -> Iterator[None]:
    """Makes a UserError of the device's memory being full."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"a batch of {batch} does not fit: the device's memory is full; give fewer prompts at once, fewer new "
            "tokens or a cache that keeps less"
        ) from error


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of a compiled program while it runs: arguments, temporaries, and outputs that take no argument's place.

    The compiler's own `memory_analysis`; whatever else is held meanwhile is not in it.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{jax.default_backend()} does not tell the memory of its programs")
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return held + analysis.temp_size_in_bytes


def batch_by_formula(limit_bytes: int, weight_bytes: int, row_bytes: int) -> int:
    """(M - W) / bytes of the cache of one row: the batch of a decoder that needs nothing else, at least 1."""
    return max(1, (limit_bytes - weight_bytes) // row_bytes)


def largest_batch(needs: Callable[[int], int], limit_bytes: int, guess: int) -> tuple[int, int]:
    """The largest batch, to 1 %, whose `needs(batch)` bytes are within the limit, and those; (0, needs(1)) if none is.

    needs: grows with the batch and is dear, as it compiles: nearly affine, so that lines through what is known lead
    there in few calls; where they do not, what lies between a batch that fits and one that does not is halved.
    guess: where to look after a batch of 1.
    """
    known = {1: needs(1)}
    if known[1] > limit_bytes:
        return 0, known[1]
    fits, above, batch = 1, math.inf, max(2, guess)
    for _ in range(_MOST_PROBES):
        known[batch] = needs(batch)
        fits = max(b for b, size in known.items() if size <= limit_bytes)
        above = min((b for b, size in known.items() if size > limit_bytes), default=math.inf)
        if above - fits <= max(1, _CLOSE * fits):
            break
        near = sorted(known, key=lambda b: abs(known[b] - limit_bytes))[:2]
        slope = (known[near[1]] - known[near[0]]) / (near[1] - near[0])
        meets = near[0] + (limit_bytes - known[near[0]]) / slope if slope > 0 else math.inf
        if fits in near and fits <= meets < (1 + _CLOSE) * fits + 1:
            break
        batch = int(min(meets, 8 * fits if above == math.inf else above))
        if not fits < batch < above:
            batch = 2 * fits if above == math.inf else int(fits + above) // 2
    return fits, known[fits]
