"""`generate`: prompts through the passes into the cache, then token by token in one jitted loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cache import bytes_held
from lckv_jax.decode.capacity import check_fits, memory_told
from lckv_jax.decode.loop import Chosen, Prompts, decode, prefill, unstack, with_room
from lckv_jax.decode.sampling import Sampling, row_keys
from lckv_jax.decode.spec import CacheSpec, grows, slot_specs
from lckv_jax.decode.step import Weights
from lckv_jax.errors import UserError
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes, stop_rule
from lckv_jax.model.transformer import check_dtype

_BUCKET = 256  # columns by which a cache grows: early steps do not read what late ones need
_SEGMENT = 64  # steps between looks at whether every row has ended
_ENDLESS = 2**31 - 1  # columns are counted in int32
_PROMPT_STEP = 16  # prompts are padded to a multiple of it, or of a power of two of up to a 32nd of a long one


class Generated(NamedTuple):
    """What one prompt became: the new tokens, the log-probability of each, and the passes that the prompt took.

    The last token may be a stop token; tokens after it are not there. Log-probabilities are those of the model itself,
    before a temperature or limits of sampling.
    """

    tokens: list[int]
    logprobs: list[float]
    passes: int


def generate(
    params: Params | Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache: CacheSpec | str = "full",
    passes: Passes = "exact",
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    prompt_length: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, at most `max_new_tokens`: `generate_rows` without the rest."""
    rows = generate_rows(
        params,
        config,
        prompts,
        max_new_tokens,
        cache=cache,
        passes=passes,
        sampling=sampling,
        stop=stop,
        prompt_length=prompt_length,
    )
    return [row.tokens for row in rows]


def generate_rows(
    params: Params | Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache: CacheSpec | str = "full",
    passes: Passes = "exact",
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    prompt_length: int = 0,
) -> list[Generated]:
    """Continues all prompts together, as one batch.

    prompts: token ids, with the BOS that the model was trained with; nothing is added. passes: how often a prompt
    passes over cyclic spans (`refine.stop_rule`); the new tokens are exact whatever it is. cache: `CacheSpec.parse`.
    sampling: None = greedy. stop: tokens after which a row ends. What a row becomes does not depend on the others.
    prompt_length: prompts are padded to at least so many tokens, so that batches share compiled programs.
    Raises UserError for an empty prompt, a token that the model does not have, a batch that does not fit, float64
    without JAX_ENABLE_X64, or numbers that are not finite.
    """
    if not prompts:
        return []
    stops = np.array(sorted(stop), np.int32)
    options = _Options(CacheSpec.parse(cache), passes, sampling, stops, prompt_length)
    with memory_told(len(prompts)):
        pieces = list(_pieces(params, config, prompts, max_new_tokens, options, _SEGMENT))
    chosen = jax.tree.map(lambda *xs: np.concatenate(xs, axis=0), *(piece.chosen for piece in pieces))
    rows = zip(chosen.token.T, chosen.logprob.T, chosen.live.T, pieces[0].passes_B)
    return [Generated(token[live].tolist(), logprob[live].tolist(), int(used)) for token, logprob, live, used in rows]


def stream(
    params: Params | Weights,
    config: ModelConfig,
    prompt: Sequence[int],
    max_new_tokens: int | None = None,
    *,
    cache: CacheSpec | str = "full",
    passes: Passes = "exact",
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    every: int = 8,
) -> Iterator[list[int]]:
    """The new tokens of one prompt as they come, `every` at a time; arguments as in `generate_rows`.

    max_new_tokens: None = without end, which only a cache of constant size can do. Raises UserError for one that grows.
    """
    spec = check_cache(config, cache, max_new_tokens)
    options = _Options(spec, passes, sampling, np.array(sorted(stop), np.int32))
    with memory_told(1):
        for piece in _pieces(params, config, [prompt], max_new_tokens, options, every):
            yield piece.chosen.token[piece.chosen.live].tolist()


def check_cache(config: ModelConfig, cache: CacheSpec | str, max_new_tokens: int | None) -> CacheSpec:
    """The cache that is meant. Raises UserError for one that the model cannot have, or that grows without end."""
    spec = CacheSpec.parse(cache)
    slots = slot_specs(config, spec, _ENDLESS)
    if max_new_tokens is None and any(grows(slot) for slot in slots):
        raise UserError(f"cache {spec} grows without end; give max_new_tokens, or a cache such as sinks(4,1020)")
    return spec


class _Options(NamedTuple):
    spec: CacheSpec
    passes: Passes
    sampling: Sampling | None
    stops: np.ndarray
    prompt_length: int = 0


class _Piece(NamedTuple):
    """New tokens [steps, B] on the host, and the passes that each row's prompt took."""

    chosen: Chosen
    passes_B: np.ndarray


def _pieces(
    params: Params | Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None,
    options: _Options,
    segment: int,
) -> Iterator[_Piece]:
    """The first new tokens, then those of up to `segment` steps at a time, until all rows have ended."""
    stop_rule(config, options.passes)  # a misspelt word is told before any work
    check_dtype(config)
    left = _ENDLESS if max_new_tokens is None else max_new_tokens
    if left < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}; give 1 or more")
    tokens_BT, padding_B = _padded_prompts(prompts, config.vocab_size, options.prompt_length)
    config = config.model_copy(update={"attention": "auto"})
    weights = params if isinstance(params, Weights) else unstack(jax.tree.map(jnp.asarray, params), config)
    spec, passes, sampling, stops, _ = options
    keys_B = row_keys(sampling or Sampling(), len(prompts))
    sampling = sampling and sampling.model_copy(update={"seed": 0})  # the keys have it: one program for all seeds
    prompt = columns = tokens_BT.shape[1]
    total = min(columns + left, _ENDLESS)
    at_most = bytes_held(config, slot_specs(config, spec, total, prompt=prompt), 1)
    check_fits(sum(x.nbytes for x in jax.tree.leaves(weights)), at_most, len(prompts))
    specs = slot_specs(config, spec, _bucket(columns + 1), total, prompt=prompt)
    loop, chosen, used = prefill(weights, config, specs, passes, sampling, Prompts(tokens_BT, padding_B, keys_B), stops)
    passes_B = np.asarray(used.passes_B)
    yield _Piece(_on_host(jax.tree.map(lambda x: x[None], chosen)), passes_B)
    left -= 1
    while left and bool(loop.live_B.any()):
        size, before = _bucket(columns + 1), specs
        specs = slot_specs(config, spec, size, total, prompt=prompt)
        loop = loop._replace(cache=with_room(specs, before, loop.cache))
        steps = min(left, segment, size - columns)
        loop, chosen = decode(weights, config, specs, sampling, steps, loop, keys_B, stops)
        yield _Piece(_on_host(chosen), passes_B)
        columns, left = columns + steps, left - steps


def _on_host(chosen: Chosen) -> Chosen:
    """Raises UserError if the model gave numbers that are none."""
    chosen = jax.device_get(chosen)
    if not np.isfinite(chosen.logprob[chosen.live]).all():
        raise UserError("the model's logits are not finite; was it trained to its end? Check it with `evaluate`")
    return chosen


def _bucket(columns: int) -> int:
    return -(-columns // _BUCKET) * _BUCKET


def _padded_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, at_least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] with padding in front, and how much of it each row has."""
    lists = []
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size:
            raise UserError(f"prompt {number} is empty; give it at least one token, such as the tokenizer's BOS")
        if ids.dtype.kind not in "iu":
            raise UserError(f"prompt {number} is no list of token ids, which are integers; encode the text first")
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if wrong.size:
            raise UserError(
                f"prompt {number} has token {ids[wrong[0]]} at place {wrong[0]}, but ids are below {vocab_size}; "
                "encode the text with the model's own tokenizer"
            )
        lists.append(ids)
    longest = max(at_least, *(ids.size for ids in lists))
    step = max(_PROMPT_STEP, (1 << longest.bit_length()) // 64)  # large chunks divide it, and shapes are few
    length = -(-longest // step) * step
    tokens = np.zeros((len(lists), length), np.int32)
    for row, ids in zip(tokens, lists):
        row[length - ids.size :] = ids
    return tokens, np.array([length - ids.size for ids in lists], np.int32)
