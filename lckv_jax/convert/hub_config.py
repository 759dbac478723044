"""The `config.json` of a Hugging Face folder, in and out: model types `llama`, `lckv-llama` and our own `lckv`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lckv_jax.config import build_config
from lckv_jax.errors import UserError
from lckv_jax.model_config import ModelConfig

_MOST_LAYERS = 10_000
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


Format = Literal["llama", "lckv", "lckv-llama"]
_CLASSES = {"llama": "LlamaForCausalLM", "lckv": "LckvForCausalLM", "lckv-llama": "LCKVLlamaForCausalLM"}
MODULE = "modeling_lckv"  # the name of our PyTorch module in a folder of format `lckv`


# ---------------------------------------------------------------- out


def natural_format(config: ModelConfig) -> Format:
    """`llama` where stock transformers compute this model, else `lckv`, which brings its own module."""
    plain = tuple(range(config.num_layers))
    same = config.sharing.sources == plain and not any(config.sharing.windowed) and not config.strict_everywhere
    return "llama" if same else "lckv"


def hub_config(
    config: ModelConfig,
    *,
    format: Format,
    max_position_embeddings: int,
    dtype: str,
    bos_id: int | None,
    eos_id: int | None,
) -> dict[str, Any]:
    """The `config.json` of a folder that holds `config` in the given format, as plain JSON data.

    dtype: of the tensors, such as `bfloat16`. bos_id, eos_id: of the tokenizer, None if there is none.
    Raises UserError where the format cannot say what the model is.
    """
    tree = {
        "architectures": [_CLASSES[format]],
        "model_type": format,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # here rather than in rope_parameters: transformers 4 reads it too
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if format == "llama":
        if natural_format(config) != "llama":
            raise UserError(f"the map {config.sharing} cannot be a plain llama model; leave out the format")
        return tree
    if format == "lckv":
        names = {"AutoConfig": "LckvConfig", "AutoModelForCausalLM": _CLASSES[format]}
        return tree | {
            "auto_map": {auto: f"{MODULE}.{name}" for auto, name in names.items()},
            "sharing": str(config.sharing),
            "sliding_window": config.window,
            "strict_everywhere": config.strict_everywhere,
            "no_grad_passes": config.no_grad_passes,
            "grad_passes": config.grad_passes,
            "start": config.start,
            "tolerance": config.tolerance,
            "passes": "trained",
        }
    if config.start != "zero" or config.tolerance:
        odd = "start=input" if config.start != "zero" else f"tolerance={config.tolerance:g}"
        raise UserError(f"the format lckv-llama has no word for model.{odd}; export without --format")
    return tree | {
        "layer_types": str(config.sharing),
        "sliding_window": config.window,
        "force_nodiag": config.strict_everywhere,
        "forward_passes": config.no_grad_passes,
        "backward_passes": config.grad_passes,
        "use_sequential": False,
        "pretraining_tp": 1,
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    names = _LLAMA3_KEYS if scaling.type == "llama3" else ("factor",)
    return {"rope_type": scaling.type, **{name: getattr(scaling, name) for name in names}}


# ---------------------------------------------------------------- in


def read_config(path: Path) -> ModelConfig:
    """The model configuration that an HF `config.json` means, with HF's defaults where it is silent."""
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CLASSES:
        raise UserError(f"{path}: model_type is {model_type!r}; only {', '.join(_CLASSES)} can be read")
    if _size(path, raw, "num_hidden_layers") > _MOST_LAYERS:  # which would take hours to find wrong
        raise UserError(f"{path}: num_hidden_layers is {raw['num_hidden_layers']}; at most {_MOST_LAYERS:,} are read")
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{path}: hidden_act is {act!r}; only silu is computed here")
    hidden_size, num_heads = (_size(path, raw, key) for key in ("hidden_size", "num_attention_heads"))
    if (head_dim := raw.get("head_dim")) is None:
        head_dim, rest = divmod(hidden_size, num_heads)
        if rest:
            raise UserError(f"{path}: hidden_size {hidden_size} is no multiple of {num_heads} heads; add head_dim")
    tree = {
        "vocab_size": _size(path, raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _size(path, raw, "intermediate_size"),
        "num_layers": _size(path, raw, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _size(path, raw, "num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "init_std": raw.get("initializer_range", 0.02),
        **_rope(path, raw),
        **{"llama": _plain, "lckv": _lckv, "lckv-llama": _official}[model_type](path, raw),
    }
    if raw.get("max_position_embeddings") is not None:
        tree["max_position_embeddings"] = _size(path, raw, "max_position_embeddings")
    config = build_config(ModelConfig, tree, str(path))
    if any(config.sharing.windowed) and raw.get("sliding_window", 4096) is None:
        raise UserError(f"{path}: the map marks sliding windows with `s`, but sliding_window is null; set it")
    return config


def _size(path: Path, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{path}: {key} is {'missing' if value is None else repr(value)}; it must be a positive integer"
        )
    return value


def _plain(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A llama model shares nothing and has no window."""
    kinds = raw.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise UserError(f"{path}: a llama model with layer_types {kinds!r}; a sharing map needs model_type lckv-llama")
    return {"sharing": "standard"}


def _lckv(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of our own format; the map must be there, for without it there is no model."""
    if "sharing" not in raw:
        raise UserError(f"{path}: a lckv model without `sharing`; download it again")
    names = ("sharing", "strict_everywhere", "no_grad_passes", "grad_passes", "start", "tolerance")
    window = raw.get("sliding_window")
    return {name: raw[name] for name in names if name in raw} | {"window": 4096 if window is None else window}


def _official(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that lckv-llama adds, with the official defaults."""
    layer_types, window = raw.get("layer_types"), raw.get("sliding_window")
    return {
        "sharing": "standard" if layer_types is None else layer_types,
        "window": 4096 if window is None else window,
        "strict_everywhere": raw.get("force_nodiag", False),
        "no_grad_passes": raw.get("forward_passes", 7),
        "grad_passes": raw.get("backward_passes", 2) or 1,  # the official code runs one kept pass also with 0
    }


def _rope(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary embedding: `rope_theta` and `rope_scaling`, or `rope_parameters` since HF 5."""
    given = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None}
    for key, scaling in given.items():
        if not isinstance(scaling, dict):
            raise UserError(f"{path}: {key} is {scaling!r}; it must be a mapping or null")
    theta = next((scaling["rope_theta"] for scaling in given.values() if "rope_theta" in scaling), 10000.0)
    theta = raw.get("rope_theta", theta)
    said = [_rope_of(path, key, scaling, theta) for key, scaling in (given or {"rope_scaling": {}}).items()]
    if said[0] != said[-1]:
        raise UserError(f"{path}: rope_parameters and rope_scaling say different things; remove the one that is stale")
    return said[0]


def _rope_of(path: Path, key: str, scaling: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    """What one of the two keys says. theta: the base where it does not name one."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str):
        raise UserError(f"{path}: the type of {key} is {kind!r}; it must be a name such as llama3")
    values = {name: value for name, value in scaling.items() if name not in ("rope_type", "type", "rope_theta")}
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}.get(kind)
    if needed is None:
        raise UserError(f"{path}: {key} is of type {kind!r}; only default, linear and llama3 are computed here")
    if odd := sorted(values.keys() ^ set(needed)):
        raise UserError(
            f"{path}: {key} of type {kind} takes {list_names(needed) or 'no values'}; mend {list_names(odd)}"
        )
    return {
        "rope_theta": scaling.get("rope_theta", theta),
        "rope_scaling": {"type": kind, **values} if needed else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the folder of a downloaded model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a JSON object; download it again")
    return tree


def list_names(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
