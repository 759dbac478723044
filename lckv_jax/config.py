"""The configuration of a run: frozen pydantic models, read from YAML with `a.b=c` overrides, written as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lckv_jax.config_text import apply_override, first_sentence, origin, read_yaml
from lckv_jax.errors import UserError
from lckv_jax.model_config import Frozen, ModelConfig, NonNegative, Positive

Model = TypeVar("Model", bound=BaseModel)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _as_pairs(value: Any) -> Any:
    return tuple(_as_tuple(pair) for pair in value) if isinstance(value, (list, tuple)) else value


def _as_sources(value: Any) -> Any:
    entries = value if isinstance(value, (list, tuple)) else (value,)
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Schedule = Annotated[tuple[tuple[NonNegative, Positive], ...], BeforeValidator(_as_pairs)]


class SourceConfig(Frozen):
    """Text of one kind; a plain string in a list of sources is its `path`."""

    path: str = Field(
        description="`builtin` (Python's own source), a glob of text, .jsonl[.gz|.zst] or .parquet files, or "
        "`tfds:FOLDER[:SPLIT]`, a TensorFlow Datasets folder prepared as array_record"
    )
    field: str = Field(
        default="text", description="the jsonl field, parquet column or TFDS feature that holds the text"
    )
    weight: float | None = Field(
        default=None, gt=0.0, le=1.0, description="share of the training tokens; all sources have one, or none has"
    )


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


class DataConfig(Frozen):
    """Where the text comes from, how it becomes tokens, and the shape of a batch."""

    sources: Sources = Field(
        default=(SourceConfig(path="builtin"),),
        description="text to train on: paths, or mappings {path, field, weight}; without weights one after the other, "
        "each token once an epoch",
    )
    validation: Sources = Field(
        default=(), description="text to validate on; where empty, `validation_fraction` of the sources is held out"
    )
    tokenizer: str = Field(
        default="train",
        description="`train` a sentencepiece BPE on the sources, `bytes`, or the path of a sentencepiece .model or a "
        "tokenizer.json",
    )
    folder: str = Field(default="data/builtin", description="prepared shards live here; prepared once, then only read")
    validation_fraction: float = Field(
        default=0.02, gt=0.0, lt=1.0, description="share of documents held out, by hash of name"
    )
    packing: Literal["masked", "joined"] = Field(
        default="masked",
        description="documents in one row: `masked` never see each other; `joined` are one text (no mask, positions "
        "run on)",
    )
    seq_len: Positive = Field(default=512, description="T: tokens of a row")
    batch_size: Positive = Field(default=8, description="B: rows of a global batch, all micro-batches together")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        weights = [source.weight for source in self.sources if source.weight is not None]
        if weights and len(weights) < len(self.sources):
            raise ValueError("sources: some have a weight and some have none; give each one, or none")
        if weights and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(f"sources: the weights add up to {sum(weights):.6g}; change them to add up to 1")
        if any(source.weight is not None for source in self.validation):
            raise ValueError("validation: its sources have no weight; all of their text is read")
        return self


class OptimizerConfig(Frozen):
    """The update rule and its learning rate; norms and biases are not decayed."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = Field(
        default="adamw", description="`muon` updates matrices and leaves embeddings, head, norms and biases to AdamW"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="after a linear warm-up; `wsd` (warmup-stable-decay) falls linearly over the last `decay_fraction`",
    )
    learning_rate: float = Field(default=1e-3, gt=0.0, description="peak learning rate")
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0, description="final over peak learning rate")
    warmup_steps: NonNegative = Field(default=20, description="steps of the linear rise from 0")
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0, description="wsd only: share of the steps that decay")
    b1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the first moment (momentum)")
    b2: float = Field(default=0.95, ge=0.0, lt=1.0, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0.0, description="decoupled, of matrices only, times the learning rate")
    clip_norm: float | None = Field(default=1.0, gt=0.0, description="global gradient norm; null = no clipping")


class TrainConfig(Frozen):
    """How long, and what happens on the way."""

    steps: Positive = Field(description="optimiser updates")
    accumulation: Positive = Field(default=1, description="micro-batches a step, each batch_size / accumulation rows")
    z_loss: float = Field(default=0.0, ge=0.0, description="weight of the squared log-normaliser")
    loss_chunk: Positive = Field(default=256, description="positions of a row whose logits are held at once")
    no_grad_passes_schedule: Schedule = Field(
        default=(),
        description="[[n, m], ...]: m once n updates are made, instead of model.no_grad_passes; never recompiles",
    )
    ema_decay: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="of an average of the parameters, for evaluation; 0 = none"
    )
    skip_spikes: float = Field(
        default=0.0,
        ge=0.0,
        description="leave out updates whose loss or gradient norm lies this many standard deviations above the mean "
        "of the last spike_window steps; 0 = only those that are not finite",
    )
    spike_window: int = Field(
        default=128, ge=2, description="steps that skip_spikes looks back; it waits for half of them"
    )
    log_every: Positive = Field(default=5, description="steps between printed lines (metrics.jsonl has every step)")
    eval_every: Positive = Field(default=100, description="steps between validations")
    eval_batches: Positive = Field(default=8, description="validation batches")
    save_every: Positive = Field(default=100, description="steps between checkpoints")
    save_minutes: float | None = Field(default=None, gt=0.0, description="also save when so long ago; null = never")
    keep: Positive = Field(default=2, description="newest checkpoints kept")
    keep_best: NonNegative = Field(
        default=1, description="checkpoints with the lowest validation loss kept beside them"
    )

    @field_validator("no_grad_passes_schedule")
    @classmethod
    def _check_schedule(cls, schedule: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        steps = [step for step, _ in schedule]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError("starts with step 0 and its steps ascend, as in [[0, 2], [1000, 7]]")
        return schedule


class MetricsConfig(Frozen):
    """What a run tells beside metrics.jsonl and the progress line."""

    tensorboard: bool = Field(default=False, description="event files in OUT/tensorboard (needs tensorboardX)")
    wandb: str | None = Field(default=None, description="Weights & Biases project (needs wandb); null = none")
    peak_flops: float | None = Field(
        default=None,
        ge=0.0,
        description="FLOP/s of one device in the compute dtype, for MFU; null = known devices by name; 0 = no MFU",
    )
    layer_gradient_norms: bool = Field(default=False, description="gradient norm of each layer in metrics.jsonl")
    profile: Annotated[tuple[Positive, Positive] | None, BeforeValidator(_as_tuple)] = Field(
        default=None, description="[first, last] step of a profiler trace in OUT/profile"
    )

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, profile: tuple[int, int] | None) -> tuple[int, int] | None:
        if profile is not None and profile[0] > profile[1]:
            raise ValueError(f"[first, last] step, but {profile[0]} is after {profile[1]}")
        return profile


class MeshConfig(Frozen):
    """Sizes of the device mesh; one of them may be -1 = what is left."""

    data: int = Field(default=-1, description="batch split, parameters copied (the axis that spans slices)")
    fsdp: int = Field(default=1, description="batch split, parameters split")
    tensor: int = Field(default=1, description="heads, MLP and vocabulary split")

    @model_validator(mode="after")
    def _check(self) -> MeshConfig:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            sizes_text = f"data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
            raise ValueError(f"{sizes_text}: each axis is a positive size, and at most one is -1")
        return self


class ProcessesConfig(Frozen):
    """How long the processes of a run wait for each other before they end, all of them."""

    initialize_seconds: float = Field(default=300.0, gt=0.0, description="for all processes to come, at the start")
    heartbeat_seconds: float = Field(
        default=60.0, ge=1.0, description="without a sign of life from a process: it is taken for dead"
    )
    shutdown_seconds: float = Field(default=30.0, ge=1.0, description="for all processes to end, at the end")
    hang_seconds: float | None = Field(
        default=None,
        gt=0.0,
        description="without a step: stacks are printed and the process ends; 10 times as long where it compiles, "
        "validates, saves or restores; null = 20 times the median step, at least 300, or no limit for one process",
    )


class RunConfig(Frozen):
    """Everything that a run depends on."""

    out: str = Field(description="folder of the run: checkpoints, metrics, plots")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the initial weights and the order of the data")
    model: ModelConfig = Field(description="sizes, sharing map and passes")
    data: DataConfig = Field(default=DataConfig(), description="text, tokens and batches")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="update rule and learning rate")
    train: TrainConfig = Field(description="how long, and what happens on the way")
    init_from: str | None = Field(
        default=None,
        description="run, checkpoint or imported model whose parameters the run starts from, converted where "
        "model.sharing differs; null = random",
    )
    init_how: Literal["mean", "own"] = Field(
        default="mean",
        description="K/V projections of an owner that init_from converts: `mean` over the layers that read it, or its "
        "`own`",
    )
    metrics: MetricsConfig = Field(default=MetricsConfig(), description="what is told")
    mesh: MeshConfig = Field(default=MeshConfig(), description="how devices split the work")
    processes: ProcessesConfig = Field(default=ProcessesConfig(), description="how long processes wait for each other")
    allow_changes: Strings = Field(
        default=(), description="fields that may differ from the checkpoint at resume, such as optimizer.learning_rate"
    )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of train.steps="
                f"{self.train.steps}; warm up for fewer steps, such as optimizer.warmup_steps={self.train.steps // 10}"
            )
        if self.data.batch_size % self.train.accumulation:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not a multiple of train.accumulation="
                f"{self.train.accumulation}; change one of them"
            )
        for name, folder in (("out", self.out), ("data.folder", self.data.folder)):
            if "://" in folder:
                raise ValueError(f"{name}={folder} is a bucket; give a local or mounted folder")
        if Path(self.out) == Path(self.data.folder):
            raise ValueError(f"out and data.folder are both {self.out}; give each a folder of its own")
        return self


# ---------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration in the YAML file `path`, changed by overrides such as `train.steps=10`.

    Raises UserError with one sentence: which file, which key, what is wrong and the mend.
    """
    return build_config(RunConfig, read_tree(path, overrides, RunConfig), str(path), overrides)


def read_tree(path: str | Path, overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """The tree in the YAML file `path`, changed by overrides; not yet checked, but for being one of keys of `model`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be read as a config: {reason}") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a YAML mapping with the keys {', '.join(model.model_fields)}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def read_overrides(model: type[Model], overrides: Sequence[str], where: str) -> Model:
    """`model` made of overrides such as `batch_size=4` alone; errors as in `load_config`."""
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    return build_config(model, tree, where, overrides)


def build_config(model: type[Model], tree: Any, where: str, overrides: Sequence[str] = ()) -> Model:
    """`model` made of plain data; every mistake becomes a UserError that begins with `where`, or with the override, of
    those that are in `tree`, that is to blame."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin(error, where, overrides)}: {first_sentence(model, error)}") from error


def config_json(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain JSON data, readable by `build_config`."""
    return json.loads(config.model_dump_json())
