"""`generate CHECKPOINT`: text for one prompt, for a file of prompts, or for what is typed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from lckv_jax.checkpoint import load
from lckv_jax.config import read_overrides
from lckv_jax.decode.generate import check_cache, generate_rows, stream
from lckv_jax.decode.loop import unstack
from lckv_jax.decode.sampling import Sampling
from lckv_jax.decode.spec import CacheSpec
from lckv_jax.decode.step import Weights
from lckv_jax.errors import UserError
from lckv_jax.model.refine import stop_rule
from lckv_jax.model_config import Frozen, ModelConfig, Positive

if TYPE_CHECKING:
    from lckv_jax.data.tokenizer import Tokenizer


class GenerateConfig(Frozen):
    """What `generate` continues and how; everything else comes from the checkpoint."""

    prompt: str | None = Field(default=None, description="text to continue; without `prompt` and `file` you type it")
    file: str | None = Field(
        default=None, description="prompts: a .jsonl with the field `prompt`, else text with one prompt a line"
    )
    out: str | None = Field(
        default=None, description="with `file`: write jsonl with the fields prompt, text, tokens, logprobs to it"
    )
    max_new_tokens: Positive | None = Field(
        default=128, description="tokens at most; null = without end, for a cache that does not grow"
    )
    cache: str = Field(
        default="full",
        description="what the cache keeps: POLICY+CODEC of full, window(tokens), sinks(first,tokens), "
        "budget(tokens,recent,snapkv) (or pyramidkv, h2o) and raw, int8, int4, "
        "kivi(bits,group,residual); such as sinks(4,1020)+int8",
    )
    passes: str | float = Field(
        default="exact", description="of the prompt over cyclic spans: `trained`, `exact` or a tolerance such as 1e-2"
    )
    sampling: Sampling | None = Field(
        default=None, description="how tokens are drawn, as in sampling.temperature=0.8; null = always the likeliest"
    )
    batch_size: Positive = Field(default=8, description="prompts of a file continued at once")


def generate_text(checkpoint: str | Path, overrides: Sequence[str]) -> None:
    """Prints how the model of a run or checkpoint goes on; `overrides` as in `GenerateConfig`.

    Text comes as it is made; a document's end ends it. From a file all prompts are continued, and jsonl goes to `out`
    or is printed. Raises UserError for what the user can mend.
    """
    config = read_overrides(GenerateConfig, [_verbatim(override) for override in overrides], "generate")
    if config.prompt is not None and config.file is not None:
        raise UserError("generate: prompt and file are both given; leave one out")
    if config.out is not None and config.file is None:
        raise UserError("generate: out is for the prompts of a file; give file, or redirect what is printed")
    CacheSpec.parse(config.cache)  # a misspelt one is told before anything is loaded
    prompts = None if config.file is None else _read_prompts(Path(config.file).expanduser())
    params, run, tokenizer = load(checkpoint, report=partial(print, file=sys.stderr))
    if tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer; put the one that it was trained with there")
    check_cache(run.model, config.cache, config.max_new_tokens)
    stop_rule(run.model, config.passes)
    trained = max(run.data.seq_len, run.model.max_position_embeddings or 0)
    weights = unstack(params, run.model)
    del params  # the decoder has its own
    if prompts is not None:
        _continue_all(weights, run.model, tokenizer, prompts, config, trained)
        return
    for prompt in [config.prompt] if config.prompt is not None else _typed():
        _continue_one(weights, run.model, tokenizer, prompt, config, trained)


def _verbatim(override: str) -> str:
    """A prompt is text as it stands, not YAML: `prompt=class A:` is no mapping."""
    name, equals, value = override.partition("=")
    return f"prompt={json.dumps(value)}" if name == "prompt" and equals else override


def _typed() -> Iterator[str]:
    """Lines as they are typed, until the end of input."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _tell_length(tokens: int, trained: int) -> None:
    """Says that a prompt is longer than the rows of the training, `trained` tokens."""
    if tokens > trained:
        print(
            f"note: a prompt of {tokens:,} tokens, but rows of the training had {trained:,}; it takes a while, less "
            "with passes=trained",
            file=sys.stderr,
        )


def _continue_one(
    weights: Weights, model: ModelConfig, tokenizer: Tokenizer, prompt: str, config: GenerateConfig, trained: int
) -> None:
    """Prints the prompt and its continuation as it comes; a character only when all of its bytes are there."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    _tell_length(len(ids), trained)
    pieces = stream(
        weights,
        model,
        ids,
        config.max_new_tokens,
        cache=config.cache,
        passes=config.passes,
        sampling=config.sampling,
        stop=[tokenizer.eos_id],
    )
    print(prompt, end="", flush=True)
    start, told = 0, len(ids)  # of what is decoded again, for a piece of a word has no text of its own; of what is new
    try:
        for piece in pieces:
            ids += piece
            before, text = tokenizer.decode(ids[start:told]), tokenizer.decode(ids[start:])
            if not text.endswith("\ufffd"):  # the first bytes of a character
                print(text[len(before) :], end="", flush=True)
                start, told = told, len(ids)
    except KeyboardInterrupt:
        print(flush=True)  # what is said of it begins a line
        raise
    print(tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:told])) :])


def _continue_all(
    weights: Weights, model: ModelConfig, tokenizer: Tokenizer, prompts: list[str], config: GenerateConfig, trained: int
) -> None:
    if config.max_new_tokens is None:
        raise UserError("generate: max_new_tokens=null is for a single prompt; give a number for a file")
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts]
    _tell_length(max(map(len, ids)), trained)
    lines = []
    for first in range(0, len(prompts), config.batch_size):
        batch = slice(first, first + config.batch_size)
        sampling = config.sampling
        if sampling is not None:  # seeds go round, as in `row_keys`
            sampling = sampling.model_copy(update={"seed": (sampling.seed + first) % 2**32})
        rows = generate_rows(
            weights,
            model,
            ids[batch],
            config.max_new_tokens,
            cache=config.cache,
            passes=config.passes,
            sampling=sampling,
            stop=[tokenizer.eos_id],
        )
        for text, row in zip(prompts[batch], rows):
            told = {"prompt": text, "text": tokenizer.decode(row.tokens), "tokens": row.tokens}
            lines.append(json.dumps(told | {"logprobs": [round(x, 6) for x in row.logprobs]}, ensure_ascii=False))
        print(f"{first + len(rows)} of {len(prompts)} prompts", file=sys.stderr)
    if config.out is None:
        print("\n".join(lines))
    else:
        _write(Path(config.out).expanduser(), "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.partial")
        partial_path.write_text(text, encoding="utf-8")
        os.replace(partial_path, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another `out`") from error


def _read_prompts(path: Path) -> list[str]:
    try:
        # not splitlines: that also ends lines at form feeds and at U+2028, which may stand inside a prompt
        lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path}: cannot be read: {reason}; name a UTF-8 file of prompts") from error
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{path}, line {n}") for n, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); each line is an object with the field `prompt`") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        has = f"it has {', '.join(record)}" if isinstance(record, dict) else f"it is {line[:40]}"
        raise UserError(f"{where}: has no text in the field `prompt`; {has}")
    return record["prompt"]
