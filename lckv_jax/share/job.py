"""One call of `share`: its model, its texts, and the search on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from lckv_jax.checkpoint import Loaded, load_step
from lckv_jax.decode.generate import check_cache
from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import longer_than_prompts
from lckv_jax.evaluate.rows import text_pieces
from lckv_jax.model.refine import stop_rule
from lckv_jax.model.transformer import check_dtype
from lckv_jax.share.calibration import Texts, read_texts
from lckv_jax.share.distances import Order
from lckv_jax.share.kvsharer import Result, search
from lckv_jax.share.measures import Model, Setting
from lckv_jax.share.report import trial_line
from lckv_jax.share.share_config import ShareConfig


class Job(NamedTuple):
    """What is shared, where to, and how. model: with the compute dtype wanted."""

    checkpoint: str
    target: Path
    wanted: ShareConfig
    loaded: Loaded
    model: Model
    texts: Texts
    console: Console

    @property
    def say(self) -> Callable[[str], None]:
        return partial(self.console.print, markup=False, highlight=False, soft_wrap=True)


def load_job(checkpoint: str, target: Path, wanted: ShareConfig, console: Console) -> Job:
    """The model and the texts. Raises UserError for settings that the model cannot serve or the texts."""
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    loaded = load_step(checkpoint, report=say)
    run = loaded.config
    config = run.model if wanted.dtype is None else run.model.model_copy(update={"dtype": wanted.dtype})
    check_dtype(config)
    stop_rule(config, wanted.passes)
    for cache in wanted.cache:
        check_cache(config, cache, 1)
    texts = read_texts(
        run,
        loaded.tokenizer,
        wanted.data,
        wanted.files,
        sentences=wanted.sentences,
        tokens=wanted.tokens,
        max_tokens=wanted.max_tokens,
    )
    job = Job(checkpoint, target, wanted, loaded, Model(loaded.params, config), texts, console)
    _check_prompts(job)
    own = "" if wanted.data else " (no --data was given)"
    say(f"{checkpoint}, step {loaded.step}: map {config.sharing}")
    say(f"calibration: {wanted.sentences} sentences of at most {wanted.tokens} tokens of {texts.what}{own}")
    say(f"held-out: {len(texts.held_out.tokens):,} tokens of {texts.held_out.what}")
    return job


def _check_prompts(job: Job) -> None:
    """Raises UserError, before anything is searched or written, if no held-out text is longer than a prompt."""
    setting = setting_of(job)
    try:
        longer_than_prompts(text_pieces(setting.text, setting.seq_len, setting.packing), setting.prompt_tokens or 0)
    except UserError as error:  # packing is no setting of share
        raise UserError(
            str(error).replace("fewer, a larger seq_len, or packing=joined", "fewer, or a larger seq_len")
        ) from error


def run_search(job: Job, layers: int, order: Order, seed: int) -> tuple[Result, float]:
    """What the search finds, and the seconds that it takes, compilation among them; tells of every trial."""
    wanted, started = job.wanted, time.monotonic()
    result = search(
        job.model.params,
        job.model.config,
        job.texts.tokens_BT,
        layers,
        order=order,
        metric=wanted.metric,
        threshold=wanted.threshold,
        valid_BT=job.texts.valid_BT,
        seed=seed,
        passes=wanted.passes,
        report=lambda trial: job.say(f"  {trial_line(trial)}"),
    )
    return result, time.monotonic() - started


def setting_of(job: Job) -> Setting:
    """On what and how both models are measured."""
    wanted, data = job.wanted, job.loaded.config.data
    return Setting(
        text=job.texts.held_out,
        seq_len=wanted.seq_len or data.seq_len,
        packing=data.packing,
        batch_size=wanted.batch_size,
        passes=wanted.passes,
        caches=wanted.cache,
        prompt_tokens=wanted.prompt_tokens,
        batch=wanted.speed_batch,
        repeats=wanted.speed_repeats,
    )
