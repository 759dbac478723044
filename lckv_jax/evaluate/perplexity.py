"""`evaluate`: log-probabilities, perplexity and bits per byte of text, by the trained passes and exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console

from lckv_jax.checkpoint import load
from lckv_jax.config import ModelConfig, Sources, read_overrides
from lckv_jax.decode.spec import CacheSpec, cache_texts
from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import CacheReport, cache_table, measure_caches
from lckv_jax.evaluate.decode_path import Prompt, check_spec, decode_lists
from lckv_jax.evaluate.position_plot import check_format, draw_positions
from lckv_jax.evaluate.progress import telling
from lckv_jax.evaluate.rows import Batch, Text, groups, list_batch, read_text, text_batches, text_pieces
from lckv_jax.evaluate.statistics import perplexity_of
from lckv_jax.model.kernels import choose_backend
from lckv_jax.model.layers import Params
from lckv_jax.model.loss import IGNORED, token_nll
from lckv_jax.model.refine import Passes, stop_rule
from lckv_jax.model_config import Frozen, Positive

if TYPE_CHECKING:
    from lckv_jax.data.batches import Packing

_token_nll = jax.jit(token_nll, static_argnames=("config", "passes", "chunk"))


# ---------------------------------------------------------------- score


def score(
    params: Params,
    config: ModelConfig,
    token_lists: Sequence[Sequence[int]],
    *,
    passes: Passes = "exact",
    cache: CacheSpec | str | None = None,
) -> list[np.ndarray]:
    """Log-probability of each token after the first, given those before it: for each list an array [length - 1].

    token_lists: each is one text of any length, with its BOS where the model was trained with one; nothing is added. A
    list of fewer than two tokens gives an empty array. Positions run on beyond those that the model was trained on.
    passes: `trained`, `exact` or a tolerance (see `refine.stop_rule`). Results are float32, or the compute dtype if
    that is wider, and depend on no other list but by rounding, as the shape of a batch decides the order of sums. The
    attention kernel is that of `auto` for each length, whatever the model was trained with.
    cache: what a decoder keeps (see `CacheSpec.parse`); each token then goes through one decode step, from an empty
    cache, which is exact for every map. None = all tokens at once.
    Raises UserError for a token that the model does not have, for a cache that chooses its tokens when a prompt ends,
    and for other than exact passes with a cache.
    """
    stop_rule(config, passes)  # a misspelt word is told before any work
    if cache is not None and passes != "exact":
        raise UserError(f"passes={passes} with a cache: a decode step is exact by itself; leave out passes, or cache")
    config = config.model_copy(update={"attention": "auto"})
    lists = [_check_tokens(number, tokens, config.vocab_size) for number, tokens in enumerate(token_lists)]
    params = jax.tree.map(jax.numpy.asarray, params)
    dtype = np.promote_types(np.float32, np.float64 if config.dtype == "float64" else np.float32)
    scores = [np.zeros(0, dtype)] * len(lists)
    if cache is not None:
        for number, row in decode_lists(params, config, lists, CacheSpec.parse(cache)).items():
            scores[number] = row
        return scores
    for length, numbers in groups([len(tokens) for tokens in lists]):
        nll, _ = _token_nll(params, config, list_batch([lists[n] for n in numbers], length), passes=passes)
        for number, row in zip(numbers, np.asarray(nll)):
            scores[number] = -row[: len(lists[number]) - 1]
    return scores


def _check_tokens(number: int, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    ids = np.asarray(tokens) if len(tokens) else np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"list {number} is no list of token ids, which are integers; encode the text first")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        raise UserError(
            f"list {number} has token {ids[wrong[0]]} at place {wrong[0]}, but ids are below {vocab_size}; "
            "encode the text with the model's own tokenizer"
        )
    return ids.astype(np.int32)


# ---------------------------------------------------------------- evaluate


def as_passes(value: Any) -> Any:
    """One or several settings of `passes` as a tuple. Raises ValueError for a number that is no tolerance."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    values = tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values)
    if wrong := [v for v in values if isinstance(v, float) and v >= 1.0]:
        raise ValueError(
            f"a number is a tolerance such as 1e-2, not how many passes are made; {wrong[0]:g} is too large"
        )
    return values


class EvaluateConfig(Frozen):
    """What `evaluate` reads and how; everything else comes from the checkpoint."""

    files: Sources = Field(default=(), description="text to score; where empty, the run's own validation split")
    passes: Annotated[tuple[str | float, ...], BeforeValidator(as_passes), Field(min_length=1)] = Field(
        default=("trained", "exact"),
        description="`trained` (m + b), `exact`, or a tolerance such as 1e-2; one report each",
    )
    seq_len: Positive | None = Field(default=None, description="tokens of a row; null = data.seq_len of the run")
    batch_size: Positive = Field(default=8, description="rows scored at once")
    max_tokens: Positive | None = Field(default=None, description="score only so many tokens, the first; null = all")
    out: str | None = Field(default=None, description="also write the numbers as JSON to this file")
    packing: Literal["masked", "joined"] | None = Field(
        default=None,
        description="documents of a row: `masked` never see each other, `joined` are one text; null = data.packing of "
        "the run",
    )
    cache: Annotated[tuple[str, ...], BeforeValidator(cache_texts)] = Field(
        default=(),
        description="predict token by token on these caches instead, such as full or [full,sinks(4,60)+int8]; one "
        "report each",
    )
    prompt_tokens: Positive | None = Field(
        default=None,
        description="with cache: the first so many tokens of each text of a row are a prompt, which is not scored; "
        "`passes` are then those of the prompt",
    )
    by_position: Positive | None = Field(
        default=None, description="with cache: also tell the perplexity of every so many positions"
    )
    plot: str | None = Field(default=None, description="with by_position: draw it into this .png, .svg or .pdf file")

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        for name, value, needed, other in (
            ("prompt_tokens", self.prompt_tokens, self.cache, "cache=full"),
            ("by_position", self.by_position, self.cache, "cache=full"),
            ("plot", self.plot, self.by_position, "by_position=256"),
        ):
            if value is not None and not needed:
                raise ValueError(f"{name} needs {other.partition('=')[0]}; add, for example, {other}")
        if self.cache and "passes" in self.model_fields_set and (self.prompt_tokens is None or len(self.passes) > 1):
            raise ValueError(
                "with cache, passes are those of the prompts: give one, with prompt_tokens; or leave passes out, as "
                "decoding is exact by itself"
            )
        for cache in self.cache:
            check_spec(CacheSpec.parse(cache), self.prompt_tokens)
        if self.plot is not None:
            check_format(self.plot)
        return self


class Report(NamedTuple):
    """What one setting of `passes` gave.

    tokens: those predicted. nats: the mean of their -log p. bits_per_byte: its sum over ln 2 and the bytes of the text.
    mean_passes, max_passes: of the rows. residual: the largest relative K,V change of the last pass. seconds: without
    compilation.
    """

    passes: Passes
    tokens: int
    nats: float
    perplexity: float
    bits_per_byte: float | None
    mean_passes: float
    max_passes: int
    residual: float
    seconds: float
    tokens_per_second: float


def evaluate(checkpoint: str, overrides: Sequence[str]) -> None:
    """Prints the perplexity and bits per byte of text under a checkpoint, by each of the wanted `passes`.

    checkpoint: a run folder or RUN/checkpoints/STEP. overrides: of EvaluateConfig, such as `files=texts/*.txt`.
    The text is laid out as in training: documents packed in rows of seq_len, none of whose predicted tokens are shared.
    Each token is predicted once, from what its row shows before it; EOS too, but not BOS (with data.packing=joined BOS
    too, but for the very first). Bits per byte are the nats of all of them over ln 2 and the UTF-8 bytes of the
    documents.
    Raises UserError for everything that the user can mend, and if a loss is not finite.
    """
    wanted = read_overrides(EvaluateConfig, overrides, "evaluate")
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    params, run, tokenizer = load(checkpoint, report=say)  # the parameters that `load` holds to be those to evaluate
    for passes in wanted.passes:
        stop_rule(run.model, passes)
    settings = tuple(dict.fromkeys(wanted.passes))[: None if run.model.sharing.cyclic else 1]
    out, plot = (None if path is None else _writable(path) for path in (wanted.out, wanted.plot))
    text = read_text(run, wanted.files, wanted.max_tokens, tokenizer)
    seq_len, packing = wanted.seq_len or run.data.seq_len, wanted.packing or run.data.packing
    size = "" if text.bytes is None else f" ({text.bytes:,} bytes)"
    averaged = ", averaged parameters" if run.train.ema_decay else ""
    say(f"{checkpoint}{averaged}: {text.what}, {len(text.tokens):,} tokens{size} in rows of {seq_len}")
    model = run.model.model_copy(update={"attention": "auto"})  # that of the training may not run here
    if wanted.cache:
        reports = _measure_caches(wanted, params, model, text, seq_len, packing, console)
        if plot is not None:
            draw_positions(reports, plot, trained=run.data.seq_len)
        lines = cache_table(reports)
    else:
        say(choose_backend(model, seq_len=seq_len)[1])
        reports = measure(params, model, text, settings, seq_len, wanted.batch_size, packing=packing, console=console)
        lines = _table(run.model, reports)
    for line in lines:
        say(line)
    if out is not None:
        facts = {"checkpoint": checkpoint, "text": text.what, "bytes": text.bytes, "seq_len": seq_len}
        facts |= {"packing": packing, "prompt_tokens": wanted.prompt_tokens, "sharing": str(run.model.sharing)}
        _write(out, {**facts, "reports": [plain(report) for report in reports]})
    for path in (out, plot):
        if path is not None:
            say(f"wrote {path}")


def _measure_caches(
    wanted: EvaluateConfig,
    params: Params,
    model: ModelConfig,
    text: Text,
    seq_len: int,
    packing: Packing,
    console: Console,
) -> list[CacheReport]:
    passes = wanted.passes[0] if "passes" in wanted.model_fields_set else "exact"
    return measure_caches(
        params,
        model,
        text_pieces(text, seq_len, packing),
        wanted.cache,
        wanted.batch_size,
        prompt=Prompt(wanted.prompt_tokens, passes) if wanted.prompt_tokens else None,
        by_position=wanted.by_position,
        text_bytes=None if wanted.prompt_tokens else text.bytes,
        console=console,
    )


def _writable(out: str) -> Path:
    """The path of a file to write, whose folder is made; a wrong one is told before the work, not after it."""
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another file") from error
    return path


def plain(value: Any) -> Any:
    """Named tuples as mappings, and null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        return [*map(plain, value)] if names is None else dict(zip(names, map(plain, value)))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, numbers: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the numbers are above") from error


def measure(
    params: Params,
    config: ModelConfig,
    text: Text,
    settings: Sequence[Passes],
    seq_len: int,
    batch_size: int,
    *,
    packing: Packing = "masked",
    console: Console | None = None,
) -> list[Report]:
    """One report for each of the settings of `passes`, all of them on the same batches.

    console: shown how far it is. Raises UserError if a loss is not finite.
    """
    steps: dict[Passes, Any] = {}
    parts: dict[Passes, list[_Part]] = {passes: [] for passes in settings}
    total = len(text.tokens) - 1
    with telling(console, total) as tell:
        for number, batch in enumerate(text_batches(text, seq_len, batch_size, packing), 1):
            for passes in settings:
                if passes not in steps:
                    steps[passes] = _token_nll.lower(params, config, batch, passes=passes).compile()
                parts[passes].append(_measured(steps[passes], params, batch, passes))
            tell(min(total, number * seq_len * batch_size))
    return [_report(passes, parts[passes], text.bytes) for passes in settings]


class _Part(NamedTuple):
    """What one batch gave."""

    nats: float
    tokens: int
    passes_B: np.ndarray
    residual_B: np.ndarray
    seconds: float


def _measured(step: Any, params: Params, batch: Batch, passes: Passes) -> _Part:
    counts_BT = batch["labels"][:, 1:] != IGNORED
    started = time.monotonic()
    nll_BT, rows = jax.device_get(step(params, batch))
    seconds = time.monotonic() - started
    if not np.isfinite(nll_BT).all():
        raise UserError(
            f"passes={_name(passes)}: the loss is not finite; the parameters of this checkpoint are of no use, "
            "evaluate an earlier one"
        )
    real_B = counts_BT.any(axis=1)  # other rows fill up the batch
    nats, count = float(nll_BT.sum(dtype=np.float64)), int(counts_BT.sum())
    return _Part(nats, count, rows["passes"][real_B], rows["residual"][real_B], seconds)


def _report(passes: Passes, parts: Sequence[_Part], text_bytes: int | None) -> Report:
    tokens, seconds = sum(part.tokens for part in parts), sum(part.seconds for part in parts)
    total = math.fsum(part.nats for part in parts)
    nats = total / tokens
    passes_made = np.concatenate([part.passes_B for part in parts])
    return Report(
        passes=passes,
        tokens=tokens,
        nats=nats,
        perplexity=perplexity_of(nats),
        bits_per_byte=total / math.log(2) / text_bytes if text_bytes else None,
        mean_passes=float(passes_made.mean()),
        max_passes=int(passes_made.max()),
        residual=float(max(part.residual_B.max(initial=0.0) for part in parts)),
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 1),
    )


def _table(config: ModelConfig, reports: Sequence[Report]) -> Iterator[str]:
    """The reports in lines of at most 80 columns."""
    exact = next((report for report in reports if report.passes == "exact"), None)
    columns = {"perplexity": 11, "nats/token": 11, "bits/byte": 10, "made (max)": 12, "residual": 10, "tok/s": 9}
    yield f"{'passes':<16}" + "".join(f"{name:>{width}}" for name, width in columns.items())
    for report in reports:
        name = _name(report.passes) if config.sharing.cyclic else "any"
        if report.passes == "trained" and config.sharing.cyclic:
            name += f" ({config.no_grad_passes} + {config.grad_passes})"
        bits = "unknown" if report.bits_per_byte is None else f"{report.bits_per_byte:.4f}"
        made = f"{report.mean_passes:.1f} ({report.max_passes})"
        yield (
            f"{name:<16}{report.perplexity:>11,.3f}{report.nats:>11.5f}{bits:>10}{made:>12}{report.residual:>10.1e}"
            f"{report.tokens_per_second:>9,.0f}"
        )
    for report in reports:
        if exact is not None and report is not exact:
            yield (
                f"{_name(report.passes)} - exact: perplexity {report.perplexity - exact.perplexity:+.4f}, "
                f"nats/token {report.nats - exact.nats:+.2e}"
            )
    if not config.sharing.cyclic:
        yield f"no layer of the map {config.sharing} reads above itself: one pass is exact, whatever `passes` says"
    seconds = ", ".join(f"{report.seconds:.1f} s" for report in reports)
    yield f"{reports[0].tokens:,} tokens predicted in {seconds} (compilation left out)"


def _name(passes: Passes) -> str:
    return passes if isinstance(passes, str) else f"tolerance {passes:g}"
