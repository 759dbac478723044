"""The configuration of `bench`: what is measured, read from YAML with overrides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from lckv_jax.config import build_config, read_tree
from lckv_jax.decode.spec import CacheSpec, cache_texts, slot_specs
from lckv_jax.errors import UserError
from lckv_jax.model.refine import stop_rule
from lckv_jax.model_config import Frozen, ModelConfig, Positive
from lckv_jax.sharing import KVSharing


def _caches(value: Any) -> tuple[str, ...]:
    try:
        return cache_texts(value)
    except UserError as error:
        raise ValueError(str(error).removeprefix("cache: ")) from error


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) else (value,)


def _pairs(value: Any) -> Any:
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in _listed(value))


def _batches(value: Any) -> Any:
    batches = _listed(value)
    for batch in batches:
        if batch != "largest" and (type(batch) is not int or batch < 1):
            raise ValueError(
                f"a batch is a positive number of rows or `largest`, as in batches=[1,8,largest], got {batch!r}"
            )
    return batches


def _lengths(value: Any) -> Any:
    pairs = _pairs(value)
    for pair in pairs:
        known = isinstance(pair, tuple) and len(pair) == 2 and all(type(length) is int for length in pair)
        if not known or pair[0] < 1 or pair[1] < 2:
            raise ValueError(
                "each is [prompt, new tokens], a prompt of at least 1 token and at least 2 new ones, as in "
                f"lengths=[[64,64]], got {list(pair) if isinstance(pair, tuple) else pair!r}"
            )
    return pairs


def _maps(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        raise ValueError(
            "each map has a name, as in maps.yoco=yoco, or maps: {standard: standard, yoco: yoco} in the file, "
            f"got {value!r}"
        )
    return value


def _texts(maps: dict[str, Any]) -> dict[str, str]:
    return {name: str(sharing) for name, sharing in maps.items()}


class BenchConfig(Frozen):
    """What is measured, and where the results go."""

    out: str = Field(description="folder of the results: one JSON for each cell, results.json, plots")
    model: ModelConfig = Field(description="sizes; its weights are random, and `maps` says who shares keys and values")
    maps: Annotated[dict[str, Any], BeforeValidator(_maps), PlainSerializer(_texts)] = Field(
        min_length=1, description="name: sharing map or family; one that is `standard` is what others are compared with"
    )
    caches: Annotated[tuple[str, ...], BeforeValidator(_caches), Field(min_length=1)] = Field(
        default=("full",), description="what the cache keeps, such as full or sinks(4,1020)+int8 (see docs/generate.md)"
    )
    lengths: Annotated[
        tuple[tuple[Positive, Annotated[int, Field(ge=2)]], ...], BeforeValidator(_lengths), Field(min_length=1)
    ] = Field(description="[[prompt, new], ...]: tokens of each row's prompt, and new ones, at least 2")
    batches: Annotated[tuple[Positive | Literal["largest"], ...], BeforeValidator(_batches), Field(min_length=1)] = (
        Field(default=(1, 8, "largest"), description="rows; `largest` = as many as the memory holds")
    )
    passes: Annotated[tuple[str | float, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        default=("trained",), description="of prompts over cyclic spans: trained, exact or a tolerance such as 1e-2"
    )
    repeats: int = Field(default=5, ge=5, description="generations that are timed, after two that are not")
    bucket: Positive | None = Field(
        default=None,
        description="columns by which a cache grows, each a program: small ones read less and compile longer; null = "
        "an eighth of prompt and new tokens, in multiples of 256",
    )
    sample: Positive | None = Field(
        default=None,
        description="decode steps run with a cache of one size, whose time stands for all steps with it; null = all",
    )
    memory_gb: float | None = Field(
        default=None, gt=0.0, description="memory in 1e9 bytes that may be used, to stand for a smaller card"
    )
    peers: bool = Field(default=False, description="also measure transformers, with the standard map and a full cache")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of weights and prompts")

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: ModelConfig) -> ModelConfig:
        if "sharing" in model.model_fields_set:
            raise ValueError("sharing is what `maps` is for, as in maps: {standard: standard, mine: lckv(warmup=2)}")
        return model

    @field_validator("maps")
    @classmethod
    def _parse_maps(cls, maps: dict[str, Any], info: ValidationInfo) -> dict[str, KVSharing]:
        if "model" not in info.data:
            raise ValueError("cannot be read before model is right")
        parsed = {}
        for name, spec in maps.items():
            try:
                parsed[name] = KVSharing.parse(spec, info.data["model"].num_layers)
            except UserError as error:
                raise ValueError(f"{name}: {str(error).removeprefix('sharing: ')}") from error
        return parsed

    @model_validator(mode="after")
    def _check(self) -> BenchConfig:
        for passes in self.passes:
            stop_rule(self.model, passes)  # pyright: ignore[reportArgumentType]
        for sharing, cache, (prompt, new) in itertools.product(self.maps.values(), self.caches, self.lengths):
            model = self.model.model_copy(update={"sharing": sharing})
            slot_specs(model, CacheSpec.parse(cache), prompt + new, prompt=prompt)
        if "://" in self.out:
            raise ValueError(f"out={self.out} is a bucket; give a local or mounted folder")
        return self


def load_bench_config(path: str | Path, overrides: Sequence[str] = ()) -> BenchConfig:
    """The configuration in the YAML file `path`, changed by overrides such as `batches=[1,8]`.

    Raises UserError with one sentence: which file, which key, what is wrong and the mend.
    """
    tree = read_tree(path, overrides, BenchConfig)
    if "train" in tree and "maps" not in tree:
        raise UserError(
            f"{path}: is no config of bench but one of train; give one with maps and lengths, such as "
            "those in configs/bench/"
        )
    return build_config(BenchConfig, tree, str(path), overrides)
