"""The configuration of a run: frozen pydantic models, read from YAML with `a.b=c` overrides, written as JSON."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lckv_jax.errors import UserError
from lckv_jax.sharing import Flops, KVSharing

Model = TypeVar("Model", bound=BaseModel)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _as_pairs(value: Any) -> Any:
    return tuple(_as_tuple(pair) for pair in value) if isinstance(value, (list, tuple)) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Schedule = Annotated[tuple[tuple[NonNegative, Positive], ...], BeforeValidator(_as_pairs)]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class RopeScaling(_Frozen):
    """Rotary frequencies for contexts beyond the trained one, as in Hugging Face's `rope_scaling`."""

    type: Literal["linear", "llama3"]
    factor: float = Field(ge=1.0)
    low_freq_factor: float = Field(default=1.0, gt=0.0, description="llama3 only")
    high_freq_factor: float = Field(default=4.0, gt=0.0, description="llama3 only")
    original_max_position_embeddings: Positive = Field(default=8192, description="llama3 only")

    @model_validator(mode="after")
    def _check_bands(self) -> RopeScaling:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


class ModelConfig(_Frozen):
    """A decoder-only transformer of the Llama form whose layers share keys and values."""

    vocab_size: Positive = Field(description="V: number of token ids")
    hidden_size: Positive = Field(description="D: model width")
    intermediate_size: Positive = Field(description="F: MLP width")
    num_layers: Positive = Field(description="L: number of layers")
    num_heads: Positive = Field(description="N: query heads")
    num_kv_heads: Positive = Field(description="K: key/value heads; divides num_heads")
    head_dim: Positive = Field(description="H: head size; even, independent of the width")
    sharing: Annotated[
        KVSharing, PlainSerializer(str, return_type=str), Field(description="sharing map or family, see sharing.py")
    ] = Field(default="standard", validate_default=True)  # pyright: ignore[reportAssignmentType]
    window: Positive = Field(
        default=4096, description="sliding window of layers marked `s`, in tokens, itself included"
    )
    strict_everywhere: bool = Field(
        default=False, description="every layer reads strictly earlier tokens (`force_nodiag`)"
    )
    no_grad_passes: NonNegative = Field(default=7, description="m: passes over a cyclic span without gradient")
    grad_passes: Positive = Field(default=2, description="b: passes with gradient")
    start: Literal["zero", "input"] = Field(
        default="zero", description="first K,V of a cyclic span: zero or from its input"
    )
    tolerance: float = Field(
        default=0.0, ge=0.0, description="stop no-grad passes at this relative K,V change; 0 = run all m"
    )
    rope_theta: float = Field(default=10000.0, gt=0.0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-5, gt=0.0, description="RMSNorm epsilon")
    tie_embeddings: bool = Field(default=False, description="the head is the transposed embedding")
    attention_bias: bool = Field(default=False, description="biases on wq, wk, wv, wo")
    mlp_bias: bool = Field(default=False, description="biases on gate, up, down")
    init_std: float = Field(default=0.02, gt=0.0, description="standard deviation of initial weights")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(default="float32", description="compute dtype of matmuls")
    remat: bool = Field(
        default=True, description="recompute each layer in the backward pass instead of keeping activations"
    )
    attention: Literal["xla"] = Field(default="xla", description="attention backend")

    @field_validator("sharing", mode="before")
    @classmethod
    def _parse_sharing(cls, spec: Any, info: ValidationInfo) -> KVSharing:
        if "num_layers" not in info.data:
            raise ValueError("cannot be read before num_layers is right")
        return KVSharing.parse(spec, info.data["num_layers"])

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each K/V head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding rotates two halves")
        if self.tolerance and not self.no_grad_passes:
            raise ValueError("tolerance needs no_grad_passes of at least 1, which it bounds")
        return self

    def flops(self, seq_len: int) -> Flops:
        """FLOPs a token at `seq_len` (see KVSharing.flops)."""
        return self.sharing.flops(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            seq_len=seq_len,
            window=self.window,
            no_grad_passes=self.no_grad_passes,
            grad_passes=self.grad_passes,
            start=self.start,
            strict_everywhere=self.strict_everywhere,
        )


class DataConfig(_Frozen):
    """Where the text comes from, how it becomes tokens, and the shape of a batch."""

    sources: Strings = Field(
        default=("builtin",), description="`builtin` (Python's own source) or globs of UTF-8 text files"
    )
    tokenizer: str = Field(
        default="train", description="`train` a sentencepiece BPE on the sources, or the path of a .model"
    )
    folder: str = Field(default="data/builtin", description="prepared shards live here; prepared once, then only read")
    validation_fraction: float = Field(
        default=0.02, gt=0.0, lt=1.0, description="share of documents held out, by hash of name"
    )
    seq_len: Positive = Field(default=512, description="T: tokens of a row")
    batch_size: Positive = Field(default=8, description="B: rows of a global batch")


class OptimizerConfig(_Frozen):
    """AdamW with linear warm-up and cosine decay; norms and biases are not decayed."""

    learning_rate: float = Field(default=1e-3, gt=0.0, description="peak learning rate")
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0, description="final over peak learning rate")
    warmup_steps: NonNegative = 20
    b1: float = Field(default=0.9, ge=0.0, lt=1.0)
    b2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    clip_norm: float | None = Field(default=1.0, gt=0.0, description="global gradient norm; null = no clipping")


class TrainConfig(_Frozen):
    """How long, and what happens on the way."""

    steps: Positive = Field(description="optimiser updates")
    z_loss: float = Field(default=0.0, ge=0.0, description="weight of the squared log-normaliser")
    loss_chunk: Positive = Field(default=256, description="positions of a row whose logits are held at once")
    no_grad_passes_schedule: Schedule = Field(
        default=(),
        description="[[step, m], ...]: m from that step on, instead of model.no_grad_passes; never recompiles",
    )
    log_every: Positive = Field(default=5, description="steps between printed lines (metrics.jsonl has every step)")
    eval_every: Positive = Field(default=100, description="steps between validations")
    eval_batches: Positive = Field(default=8, description="validation batches")
    save_every: Positive = Field(default=100, description="steps between checkpoints")
    keep: Positive = Field(default=2, description="checkpoints kept")

    @field_validator("no_grad_passes_schedule")
    @classmethod
    def _check_schedule(cls, schedule: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        steps = [step for step, _ in schedule]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError("starts with step 0 and its steps ascend, as in [[0, 2], [1000, 7]]")
        return schedule


class MeshConfig(_Frozen):
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


class RunConfig(_Frozen):
    """Everything that a run depends on."""

    out: str = Field(description="folder of the run: checkpoints, metrics, plots")
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of train.steps="
                f"{self.train.steps}; warm up for fewer steps, such as optimizer.warmup_steps={self.train.steps // 10}"
            )
        for name, folder in (("out", self.out), ("data.folder", self.data.folder)):
            if "://" in folder:
                raise ValueError(f"{name}={folder} is a bucket; give a local or mounted folder")
        if Path(self.out) == Path(self.data.folder):
            raise ValueError(f"out and data.folder are both {self.out}; give each a folder of its own")
        return self


# ---------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key_node.value!r} is given twice; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _OverrideLoader(_Loader):
    """On the command line nobody means an underscore as a digit separator: 0_6_6 stays text."""


_EXPONENT = re.compile(r"^[-+]?(\d+)(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_OverrideLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_OverrideLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration in the YAML file `path`, changed by overrides such as `train.steps=10`.

    Raises UserError with one sentence: which file, which key, what is wrong and the mend.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {_reason(error)}") from error
    tree = _parse_yaml(text, str(path), _Loader)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a YAML mapping with the keys {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        _apply(tree, override)
    return build_config(RunConfig, tree, str(path))


def build_config(model: type[Model], tree: Any, where: str) -> Model:
    """`model` made of plain data; every mistake becomes a UserError that begins with `where`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_sentence(model, error)}") from error


def config_json(config: BaseModel) -> dict[str, Any]:
    """The configuration as plain JSON data, readable by `build_config`."""
    return json.loads(config.model_dump_json())


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _parse_yaml(text: str, where: str, loader: type[yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"cannot read the override {override!r}; write section.key=value, such as train.steps=100")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
        tree = tree[section]
    tree[last] = _parse_yaml(value, f"override {override!r}", _OverrideLoader)


def _first_sentence(model: type[BaseModel], error: ValidationError) -> str:
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]  # a misspelt key also leaves the right one missing: name the cause
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown key; {_suggestion(model, first['loc'])}"
    elif first["type"] == "missing":
        message = "is missing and has no default; add it"
    elif first["type"] == "value_error":
        message = str(first.get("ctx", {}).get("error", first["msg"]))
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    if path and message.startswith(f"{path.rsplit('.', 1)[-1]}: "):
        message = message.partition(": ")[2]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (f"{path}: " if path else "") + message + more


def _suggestion(model: type[BaseModel], location: tuple) -> str:
    """The known key nearest to an unknown one, else all of them."""
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            annotation = next(arg for arg in annotation.__args__ if issubclass(arg, BaseModel))  # pyright: ignore
        model = annotation
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(model.model_fields)}"
