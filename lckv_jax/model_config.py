"""The configuration of a model: a frozen pydantic model, strict and without unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lckv_jax.sharing import Flops, KVSharing

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """Immutable, strict, and without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


def _as_remat(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class RopeScaling(Frozen):
    """Rotary frequencies for contexts beyond the trained one, as in Hugging Face's `rope_scaling`."""

    type: Literal["linear", "llama3"] = Field(description="`linear` stretches all frequencies, `llama3` the low ones")
    factor: float = Field(ge=1.0, description="how many times longer the context becomes")
    low_freq_factor: float = Field(default=1.0, gt=0.0, description="llama3 only: fewer turns are stretched")
    high_freq_factor: float = Field(default=4.0, gt=0.0, description="llama3 only: more turns are kept")
    original_max_position_embeddings: Positive = Field(default=8192, description="llama3 only: the trained context")

    @model_validator(mode="after")
    def _check_bands(self) -> RopeScaling:
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


class ModelConfig(Frozen):
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
    rope_theta: float = Field(default=10000.0, gt=0.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(default=None, description="for contexts beyond the trained one")
    max_position_embeddings: Positive | None = Field(
        default=None, description="context to name in exported checkpoints; null = data.seq_len"
    )
    norm_eps: float = Field(default=1e-5, gt=0.0, description="RMSNorm epsilon")
    tie_embeddings: bool = Field(default=False, description="the head is the transposed embedding")
    attention_bias: bool = Field(default=False, description="biases on wq, wk, wv, wo")
    mlp_bias: bool = Field(default=False, description="biases on gate, up, down")
    init_std: float = Field(default=0.02, gt=0.0, description="standard deviation of initial weights")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(default="float32", description="compute dtype of matmuls")
    remat: Annotated[Literal["none", "full", "attention", "dots"], BeforeValidator(_as_remat)] = Field(
        default="full",
        description="what the backward pass recomputes of a layer: nothing (`none`, or false), all of it (`full`, or "
        "true), all but the output of `attention`, or all but its matrix products (`dots`)",
    )
    scan_layers: bool = Field(
        default=True, description="scan over the layers of a run (compiles fast) instead of unrolling them"
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = Field(
        default="auto", description="attention kernel; `auto` chooses by device and says why"
    )

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
