"""The configuration of `evaluate --suite`: what is measured, read from YAML with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from lckv_jax.config import MeshConfig, Sources, Strings, build_config, read_tree
from lckv_jax.decode.spec import CacheSpec, cache_texts
from lckv_jax.errors import UserError
from lckv_jax.evaluate.decode_path import check_spec
from lckv_jax.evaluate.perplexity import as_passes
from lckv_jax.evaluate.windows import check_stride
from lckv_jax.model_config import Frozen, Positive


def _single_passes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        raise ValueError("one setting holds for all of a suite, such as passes=exact; run it again for another")
    return as_passes(value)[0]


def _entries(value: Any) -> Any:
    """A name alone, without settings, is an entry with the defaults."""
    if not isinstance(value, dict):
        raise ValueError("each entry has a name, as in perplexity: {books: {files: books/*.txt}}")
    return {name: {} if entry is None else entry for name, entry in value.items()}


Name = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=100)]  # of a file, too


class PerplexityEntry(Frozen):
    """Perplexity and bits per byte of a text by sliding windows."""

    files: Sources = Field(default=(), description="text to score; where empty, the run's own validation split")
    seq_len: Positive | None = Field(default=None, description="tokens of a window; null = data.seq_len of the run")
    stride: Positive | None = Field(
        default=None,
        description="tokens that each window predicts anew, from more than seq_len - stride tokens; null = seq_len: "
        "windows do not overlap",
    )
    max_tokens: Positive | None = Field(default=None, description="score only so many tokens, the first; null = all")
    batch_size: Positive = Field(default=8, description="rows scored at once")
    by_position: Positive | None = Field(
        default=None, description="also tell the perplexity of every so many positions in a window"
    )
    by_document: bool = Field(default=False, description="also tell that of each document")

    @model_validator(mode="after")
    def _check(self) -> PerplexityEntry:
        if self.stride is not None and self.seq_len is not None:
            check_stride(self.stride, self.seq_len)
        return self


class DecodeEntry(Frozen):
    """Perplexity of a text token by token, on caches that keep more or less."""

    cache: Annotated[tuple[str, ...], BeforeValidator(cache_texts), Field(min_length=1)] = Field(
        description="what the cache keeps, such as full or [full,sinks(4,60)+int8] (see docs/generate.md)"
    )
    prompt_tokens: Positive | None = Field(
        default=None, description="the first so many tokens of each text of a row are a prompt, which is not scored"
    )
    files: Sources = Field(default=(), description="text to score; where empty, the run's own validation split")
    seq_len: Positive | None = Field(default=None, description="tokens of a row; null = data.seq_len of the run")
    max_tokens: Positive | None = Field(default=None, description="score only so many tokens, the first; null = all")
    batch_size: Positive = Field(default=8, description="rows decoded at once")
    by_position: Positive | None = Field(
        default=None, description="also tell the perplexity of every so many positions in a row"
    )

    @model_validator(mode="after")
    def _check(self) -> DecodeEntry:
        for cache in self.cache:
            check_spec(CacheSpec.parse(cache), self.prompt_tokens)
        return self


class TasksConfig(Frozen):
    """Zero-shot tasks through lm-evaluation-harness."""

    names: Strings = Field(default=(), description="tasks, such as hellaswag or lambada_openai (see docs/evaluate.md)")
    data: str | None = Field(
        default=None,
        description="folder of the .jsonl files that the tasks in configs/eval/ name, which may begin with ~ or a "
        "$VARIABLE; null = the current one. Tasks of the harness' hub need none",
    )
    limit: Positive | None = Field(default=None, description="items of each task, the first ones; null = all")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of what a task draws, such as few-shot examples")
    max_length: Positive | None = Field(
        default=None, description="tokens that an item may have, before it is cut from the left; null = data.seq_len"
    )
    batch_tokens: Positive = Field(default=4096, description="tokens of a batch, with its padding")


class SuiteConfig(Frozen):
    """What is measured, how exactly, and where the results go."""

    out: str | None = Field(
        default=None,
        description="folder of the results, and of finished entries; null = RUN/evaluations/SUITE-STEP",
    )
    passes: Annotated[str | float, BeforeValidator(_single_passes)] = Field(
        default="trained", description="`trained` (m + b), `exact`, or a tolerance such as 1e-2; also of prompts"
    )
    perplexity: Annotated[dict[Name, PerplexityEntry], BeforeValidator(_entries)] = Field(
        default={}, description="by sliding windows: the settings of each entry by its name"
    )
    tasks: TasksConfig = Field(default=TasksConfig(), description="zero-shot tasks")
    decode: Annotated[dict[Name, DecodeEntry], BeforeValidator(_entries)] = Field(
        default={}, description="on caches: the settings of each entry by its name"
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="how devices split the work")

    @model_validator(mode="after")
    def _check(self) -> SuiteConfig:
        if not (self.perplexity or self.tasks.names or self.decode):
            raise ValueError("there is nothing to measure; give perplexity, tasks.names or decode")
        if self.out is not None and "://" in self.out:
            raise ValueError(f"out={self.out} is a bucket; give a local or mounted folder")
        return self


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """The suite in the YAML file `path`, changed by overrides such as `tasks.limit=200`.

    Raises UserError with one sentence: which file, which key, what is wrong and the mend.
    """
    tree = read_tree(path, overrides, SuiteConfig)
    if "model" in tree or "maps" in tree:
        raise UserError(
            f"{path}: is no suite but a config of {'bench' if 'maps' in tree else 'train'}; give one with perplexity, "
            "tasks or decode, such as those in configs/suites/"
        )
    return build_config(SuiteConfig, tree, str(path), overrides)
