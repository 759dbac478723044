"""What sharing costs and saves: a model before and after, by perplexity, bytes and milliseconds a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
from rich.console import Console

from lckv_jax.decode.bench_programs import Work, generation, plan_work, random_prompts
from lckv_jax.decode.cache import bytes_held, bytes_read_per_step
from lckv_jax.decode.loop import unstack
from lckv_jax.evaluate.cache_quality import CacheReport, measure_caches
from lckv_jax.evaluate.decode_path import Prompt
from lckv_jax.evaluate.perplexity import Report, measure
from lckv_jax.evaluate.rows import Text, text_pieces
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes
from lckv_jax.model_config import ModelConfig

if TYPE_CHECKING:
    from lckv_jax.data.batches import Packing

_SAMPLE = 32  # decode steps that are timed of a cache of one size; a step costs the same anywhere in it


class Model(NamedTuple):
    params: Params
    config: ModelConfig


class Setting(NamedTuple):
    """What both models are measured on, and how.

    passes: of the text all at once, and of prompts. caches: of the decode path. prompt_tokens: of each text, prefilled
    before the caches are measured. batch, repeats: of the decode steps that are timed.
    """

    text: Text
    seq_len: int
    packing: Packing
    batch_size: int
    passes: Passes
    caches: tuple[str, ...]
    prompt_tokens: int | None
    batch: int
    repeats: int


class Quality(NamedTuple):
    """One model's losses. prefill: all tokens at once, by each setting of passes. decode: token by token on the full
    cache. caches: token by token on each of the setting's caches in turn, after the prompts if there are any."""

    prefill: tuple[Report, ...]
    decode: CacheReport
    caches: tuple[CacheReport, ...]


class Cost(NamedTuple):
    """A cache of one row of seq_len tokens: bytes held, bytes that a step reads, and milliseconds a step of `batch`
    rows, the median; None where nothing is timed."""

    held: int
    read: int
    step_ms: float | None


def losses(model: Model, setting: Setting, console: Console | None = None) -> tuple[Report, ...]:
    """The losses of all tokens at once: by the given passes and, where the map is cyclic, by exact ones."""
    config = model.config.model_copy(update={"attention": "auto"})
    settings = tuple(dict.fromkeys((setting.passes, "exact"))) if config.sharing.cyclic else (setting.passes,)
    text, batch_size = setting.text, setting.batch_size
    return tuple(
        measure(
            model.params,
            config,
            text,
            settings,
            setting.seq_len,
            batch_size,
            packing=setting.packing,
            console=console,
        )
    )


def quality(model: Model, setting: Setting, console: Console | None = None) -> Quality:
    """All losses of the model."""
    config, caches = model.config.model_copy(update={"attention": "auto"}), setting.caches
    pieces = text_pieces(setting.text, setting.seq_len, setting.packing)
    decode = partial(measure_caches, model.params, config, pieces, batch_size=setting.batch_size, console=console)
    if setting.prompt_tokens is None:
        full, *others = decode(caches=("full", *(cache for cache in caches if cache != "full")))
        found = {report.cache: report for report in (full, *others)}
        of_caches = [found[cache] for cache in caches]
    else:
        (full,) = decode(caches=("full",))
        of_caches = decode(caches=caches, prompt=Prompt(setting.prompt_tokens, setting.passes))
    return Quality(losses(model, setting, console), full, tuple(of_caches))


def plan(model: ModelConfig, cache: str, setting: Setting) -> Work:
    """Half of seq_len as a prompt, the other half decoded."""
    prompt = max(1, setting.seq_len // 2)
    return plan_work(model, cache, prompt, max(2, setting.seq_len - prompt), setting.passes, None, _SAMPLE)


def costs(models: Sequence[Model], cache: str, setting: Setting) -> list[Cost]:
    """The cost of a cache in each of the models."""
    works = [plan(model.config, cache, setting) for model in models]
    times = _step_ms(models, works, setting) if setting.repeats else [None] * len(models)
    found = []
    for model, work, step_ms in zip(models, works, times):
        specs = work.segments[-1].specs
        held, read = (count(model.config, specs, 1) for count in (bytes_held, bytes_read_per_step))
        found.append(Cost(held, read, step_ms))
    return found


def _step_ms(models: Sequence[Model], works: Sequence[Work], setting: Setting) -> list[float]:
    """Milliseconds a decode step, the median, timed in turn so that whatever else the machine does hits all alike.

    Each runs once before, which compiles.
    """
    weights = [unstack(jax.tree.map(jax.numpy.asarray, model.params), model.config) for model in models]
    prompts = [random_prompts(work, setting.batch, seed=0) for work in works]
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(setting.repeats + 1):
        for work, weight, (tokens_BT, keys_B), of_model in zip(works, weights, prompts, seconds):
            timing = generation(work, weight, tokens_BT, keys_B)
            if repeat:
                of_model.append(timing.decode / work.steps)
    return [1e3 * statistics.median(of_model) for of_model in seconds]
