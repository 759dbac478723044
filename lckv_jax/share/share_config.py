"""The settings of `share`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lckv_jax.config import Sources
from lckv_jax.decode.spec import CacheSpec, cache_texts
from lckv_jax.evaluate.decode_path import check_spec
from lckv_jax.model_config import Frozen, NonNegative, Positive
from lckv_jax.share.distances import Metric, Order

Caches = Annotated[tuple[str, ...], BeforeValidator(cache_texts), Field(min_length=1)]


class ShareConfig(Frozen):
    """What `share` searches, measures and trains."""

    layers: NonNegative | None = Field(
        default=None, description="C: how many layers give up their K,V (`--layers`); with sweep: at most, null = all"
    )
    data: Sources = Field(
        default=(),
        description="text to calibrate on (`--data`, once for each); where empty, the run's own validation split",
    )
    order: Order = Field(
        default="dissimilar", description="which pairs are tried first (`--order`); `random` is shuffled by `seed`"
    )
    metric: Metric = Field(
        default="token_l2",
        description="distance of two layers (`--metric`): the norm of each token's head, averaged (the released code), "
        "or one norm of everything (the paper)",
    )
    threshold: float = Field(
        default=0.5,
        ge=-1.0,
        le=1.0,
        description="a pair is kept if the cosine of final hidden states with the unshared model's is above",
    )
    seed: NonNegative = Field(default=0, description="of order=random")
    sentences: Positive = Field(default=30, description="of the calibration, the beginnings of documents")
    tokens: int = Field(default=64, ge=8, description="of a sentence at most, BOS among them")
    files: Sources = Field(
        default=(), description="text to measure on; where empty, what follows the calibration in its text"
    )
    max_tokens: Positive = Field(default=8192, description="measure on so many tokens at most")
    seq_len: int | None = Field(default=None, ge=4, description="tokens of a row; null = data.seq_len of the run")
    batch_size: Positive = Field(default=32, description="rows measured at once")
    passes: str | float = Field(
        default="trained",
        description="over cyclic spans, of trials, text and prompts: `trained`, `exact` or a tolerance such as 1e-2",
    )
    dtype: Literal["float32", "bfloat16", "float64"] | None = Field(
        default=None, description="compute dtype of search and measurement; null = model.dtype of the run"
    )
    cache: Caches = Field(
        default=("full",), description="caches to measure with both maps, such as [full,int8,sinks(4,60)+int8]"
    )
    prompt_tokens: Positive | None = Field(
        default=None,
        description="the first so many tokens of each text are a prompt, which is not scored; for caches that choose "
        "when a prompt ends, such as budget(64,16,snapkv)",
    )
    speed_batch: Positive = Field(default=8, description="rows of the decode steps that are timed")
    speed_repeats: NonNegative = Field(
        default=5,
        description="timings of the decode steps, of which the median counts; before and after take turns; 0 = none",
    )
    sweep: bool = Field(
        default=False,
        description="measure every number of layers with every order instead (`--sweep`); OUT gets no model",
    )
    heal: Positive | None = Field(
        default=None, description="train on for so many steps from the shared model, in OUT/healed (`--heal`)"
    )
    heal_control: bool = Field(
        default=False, description="with heal: as many steps of the unshared model too, in OUT/unshared"
    )
    heal_learning_rate: float | None = Field(
        default=None, gt=0.0, description="with heal: its peak; null = a third of the run's"
    )

    @model_validator(mode="after")
    def _check(self) -> ShareConfig:
        given = self.model_fields_set
        if self.layers is None and not self.sweep:
            raise ValueError("say how many layers give up their K,V, as in --layers 1; or give --sweep for all numbers")
        if self.sweep:
            for name in ("order", "heal", "cache", "prompt_tokens"):
                if name in given:
                    raise ValueError(f"{name} has no effect on --sweep; leave one of them out")
        elif "seed" in given and self.order != "random":
            raise ValueError(
                f"seed={self.seed} has no effect on order={self.order}; add --order random or leave it out"
            )
        if self.order == "random" and "metric" in given:
            raise ValueError(
                "metric has no effect on --order random, which looks at no distance; leave one of them out"
            )
        for name in ("heal_control", "heal_learning_rate"):
            if name in given and self.heal is None:
                raise ValueError(f"{name} needs heal; add, for example, --heal 200")
        for cache in self.cache:
            check_spec(CacheSpec.parse(cache), self.prompt_tokens)
        return self
