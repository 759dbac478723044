"""What `bench` runs: prefill, growing caches and decode of `generate`, and what their compiled programs need."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.decode.cache import bytes_held, bytes_read_per_step
from lckv_jax.decode.capacity import program_bytes
from lckv_jax.decode.codecs import token_bytes
from lckv_jax.decode.loop import Chosen, Loop, Prompts, decode, grow, prefill, prefill_group, room, tiles, with_room
from lckv_jax.decode.sampling import Sampling, row_keys
from lckv_jax.decode.spec import CacheSpec, KiviSpec, SlotSpec, slot_specs
from lckv_jax.decode.step import Weights, decode_weights
from lckv_jax.model.refine import Passes
from lckv_jax.model.transformer import init_params
from lckv_jax.model_config import ModelConfig

_LEAST_BUCKET = 256
_SEGMENTS = 8
_NO_STOPS = np.zeros(0, np.int32)


class Segment(NamedTuple):
    """Decode steps with a cache of one size, and what it keeps. timed: how many of them are run, as one program."""

    specs: tuple[SlotSpec, ...]
    steps: int
    timed: int


class Work(NamedTuple):
    """Prompts of `prompt` tokens through the passes, then the steps of the segments. Prompts have no padding."""

    model: ModelConfig
    passes: Passes
    prompt: int
    segments: tuple[Segment, ...]

    @property
    def steps(self) -> int:
        """Decode steps: one less than new tokens, as prefill gives the first."""
        return sum(segment.steps for segment in self.segments)


def plan_work(
    model: ModelConfig, cache: str, prompt: int, new: int, passes: Passes, bucket: int | None, sample: int | None
) -> Work:
    """One segment for each size of a cache that grows by `bucket` columns, never beyond `prompt` + `new`.

    bucket: None = an eighth of all columns, in multiples of 256. sample: steps to run in each segment; None = all. A
    step costs the same anywhere in a segment, as it reads all cells, whether there are tokens in them or not.
    """
    spec, total = CacheSpec.parse(cache), prompt + new
    bucket = -(-total // (_SEGMENTS * _LEAST_BUCKET)) * _LEAST_BUCKET if bucket is None else bucket
    sizes: list[tuple[tuple[SlotSpec, ...], int]] = []
    columns, left = prompt, new - 1
    while left:
        size = min(-(-(columns + 1) // bucket) * bucket, total)
        specs, steps = slot_specs(model, spec, size, total, prompt=prompt), min(left, size - columns)
        columns, left = columns + steps, left - steps
        if sizes and sizes[-1][0] == specs:  # of rings only
            steps += sizes.pop()[1]
        sizes.append((specs, steps))
    segments = tuple(Segment(specs, steps, min(steps, sample or steps)) for specs, steps in sizes)
    return Work(model.model_copy(update={"attention": "auto"}), passes, prompt, segments)


# ---------------------------------------------------------------- weights


def abstract_weights(config: ModelConfig) -> Weights:
    """Shapes and dtypes of a decoder's weights."""
    return jax.eval_shape(lambda key: decode_weights(init_params(config, key), config), jax.random.key(0))


def random_weights(config: ModelConfig, seed: int) -> Weights:
    """The weights of a fresh model, for measuring speed: norms are 1, everything else normal with `init_std`.

    Made one by one in a decoder's own dtypes, the largest first, so that what making them takes is never the peak.
    """
    key = jax.random.key(seed, impl="rbg")  # fast on accelerators too
    leaves, tree = jax.tree.flatten_with_path(abstract_weights(config))
    made = {}
    for number, (path, leaf) in sorted(enumerate(leaves), key=lambda numbered: -numbered[1][1].size):
        if "norm" in jax.tree_util.keystr(path[-1:]):
            made[number] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            made[number] = _normal(jax.random.fold_in(key, number), config.init_std, leaf.shape, leaf.dtype)
    return jax.tree.unflatten(tree, [made[number] for number in range(len(leaves))])


@jax.jit(static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, std: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (std * jax.random.normal(key, shape, dtype)).astype(dtype)


# ---------------------------------------------------------------- running


class Timing(NamedTuple):
    """One generation: seconds of prefill and of all decode steps together. finite: whether all log-probabilities are.

    passes_B, residual_B: of the prompts.
    """

    prefill: float
    decode: float
    finite: bool
    passes_B: np.ndarray
    residual_B: np.ndarray


def generation(work: Work, weights: Weights, tokens_BT: jax.Array, keys_B: jax.Array) -> Timing:
    """Prompts [B, T] and their new tokens, greedily and without stops, timed with everything waited for.

    The seconds of a segment of which not all steps are run are scaled to all of them.
    """
    started = time.perf_counter()
    prompts = Prompts(tokens_BT, np.zeros(tokens_BT.shape[0], np.int32), keys_B)
    filled = prefill(weights, work.model, work.segments[0].specs, work.passes, None, prompts, _NO_STOPS)
    loop, chosen, used = jax.block_until_ready(filled)
    del filled  # decode takes the loop's memory over
    prefilled = time.perf_counter()
    pieces: list[Chosen] = [chosen]
    decoding, before = 0.0, work.segments[0].specs
    for specs, steps, timed in work.segments:
        grown_from = time.perf_counter()
        loop = jax.block_until_ready(loop._replace(cache=with_room(specs, before, loop.cache)))
        grown = time.perf_counter()
        loop, chosen = jax.block_until_ready(decode(weights, work.model, specs, None, timed, loop, keys_B, _NO_STOPS))
        decoding += grown - grown_from + (time.perf_counter() - grown) * steps / timed
        pieces.append(chosen)
        before = specs
    finite = all(bool(np.isfinite(piece.logprob).all()) for piece in jax.device_get(pieces))
    return Timing(prefilled - started, decoding, finite, np.asarray(used.passes_B), np.asarray(used.residual_B))


def random_prompts(work: Work, batch: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, T], other ones in each row, and a key for each row."""
    tokens = np.random.default_rng(seed).integers(0, work.model.vocab_size, (batch, work.prompt), np.int32)
    return jnp.asarray(tokens), row_keys(Sampling(), batch)


# ---------------------------------------------------------------- compiling


def compile_needs(work: Work, weights: Weights, batch: int, *, every: bool) -> int:
    """Bytes that the work needs at a batch, weights among them, by compiling its programs.

    weights: arrays or their shapes. every: all programs, so that none is compiled while time is taken; else those that
    need most: prefill, the last segment, and growing the cache before it.
    """
    needs, loop = _prefill_needs(work, weights, batch)
    last, before = len(work.segments) - 1, work.segments[0].specs
    for number, (specs, _, timed) in enumerate(work.segments):
        twice = max([0, *(bytes_held(work.model, (old,), batch) for new, old in zip(specs, before) if new != old)])
        needs = max(needs, tree_bytes(weights) + bytes_held(work.model, specs, batch) + twice)
        loop = loop._replace(cache=jax.eval_shape(lambda cache, specs=specs: grow(specs, cache), loop.cache))
        if every or number == last:
            lowered = decode.lower(weights, work.model, specs, None, timed, loop, _abstract_keys(batch), _NO_STOPS)
            needs = max(needs, program_bytes(lowered.compile()))
        before = specs
    return needs


def _prefill_needs(work: Work, weights: Weights, batch: int) -> tuple[int, Loop]:
    """Bytes of the prefill of `batch` prompts, whose program is compiled, and the shapes of what it gives."""
    rows, chunk = tiles(work.model, batch, work.prompt)
    tokens_BT = jax.ShapeDtypeStruct((rows, work.prompt), jnp.int32)
    prompts = Prompts(tokens_BT, np.zeros(rows, np.int32), _abstract_keys(rows))  # pyright: ignore[reportArgumentType]
    settings = (work.model, work.segments[0].specs, work.passes, None, chunk, True)
    needs = program_bytes(prefill_group.lower(weights, *settings, prompts, _NO_STOPS).compile())
    part = prefill_group.eval_shape(weights, *settings, prompts, _NO_STOPS)
    loop, _, _ = jax.eval_shape(lambda part: room(part, batch), part)
    return needs + (tree_bytes(loop) if rows < batch else 0), loop  # other rows wait while some are computed


def _abstract_keys(batch: int) -> Any:
    return jax.eval_shape(lambda: row_keys(Sampling(), batch))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, which may be shapes, of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------- bytes by formula


def read_per_step(work: Work, batch: int) -> float:
    """Bytes of the cache that a decode step reads, on average over all of them."""
    total = sum(bytes_read_per_step(work.model, specs, batch) * steps for specs, steps, _ in work.segments)
    return total / work.steps


def written_per_step(work: Work, batch: int) -> int:
    """Bytes of keys, values and scales that a decode step writes: one token in each slot."""
    model = work.model
    codecs = ("raw" if isinstance(spec, KiviSpec) else spec.codec for spec in work.segments[0].specs)
    return batch * sum(token_bytes(codec, model.num_kv_heads, model.head_dim, model.dtype) for codec in codecs)
