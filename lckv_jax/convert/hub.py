"""Hugging Face weights in and out: folders of model type `llama` and `lckv-llama`, without torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from lckv_jax.config import ModelConfig, build_config
from lckv_jax.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class _Leaf(NamedTuple):
    """One leaf of the parameter tree and the HF tensors that it stacks.

    path: its keys in the tree, joined by dots.
    names: HF names, one for each entry of the leading axis; a leaf that is not stacked has one.
    shape: shape of one entry.
    inputs: how many leading dimensions of `shape` are inputs of a projection, which HF stores as (out, in); a bias
        has none and is stored flat; None for what is no projection and stored as it is.
    stacked: whether the leaf has the leading axis.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    inputs: int | None = None
    stacked: bool = True

    @property
    def full_shape(self) -> tuple[int, ...]:
        return ((len(self.names),) if self.stacked else ()) + self.shape

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in HF's layout."""
        if self.inputs is None:
            return self.shape
        outputs = math.prod(self.shape[self.inputs :])
        return (outputs, math.prod(self.shape[: self.inputs])) if self.inputs else (outputs,)

    def hub_view(self, entry: np.ndarray) -> np.ndarray:
        """One contiguous entry seen in HF's layout, without copying."""
        return entry.reshape(self.hub_shape[::-1]).T if self.inputs else entry.reshape(self.hub_shape)


def load_hub(folder: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """The parameters and configuration of the Hugging Face folder `folder` (`config.json` and safetensors).

    Returns the plain dict tree of numpy arrays that `model.transformer` uses, in the dtype of the files, and the model
    configuration; a setting that HF does not have keeps its default, the compute dtype among them. Tensors are read
    one at a time into place, so the peak is the parameters and one tensor.
    Raises UserError if the folder is incomplete or damaged, or if configuration and tensors do not fit each other: no
    parameter is ever left at random, and no tensor is dropped but rotary tables.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder of a downloaded model with its config.json")
    config = _read_config(folder / "config.json")
    leaves = _leaves(config)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_names(folder, [name for leaf in leaves for name in leaf.names], tensors)
        flat = {leaf.path: _read_leaf(folder, leaf, tensors) for leaf in leaves}
        return traverse_util.unflatten_dict(flat, sep="."), config


def to_hub(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors that HF would name for `tree`: parameters, or gradients of the same tree.

    tree: numpy or jax arrays, shaped as `config` says, of any dtype. The result keeps the dtype; every array is
    C-contiguous, as writing safetensors demands, and may share the memory of `tree`.
    Raises ValueError naming a leaf that is missing, surplus or of another shape.
    """
    leaves = _leaves(config)
    flat = traverse_util.flatten_dict(dict(tree), sep=".")
    if flat.keys() != {leaf.path for leaf in leaves}:
        odd = sorted(flat.keys() ^ {leaf.path for leaf in leaves})
        raise ValueError(f"the tree and its config differ in the leaves {', '.join(odd)}")
    tensors = {}
    for leaf in leaves:
        array = np.asarray(flat[leaf.path])
        if array.shape != leaf.full_shape:
            raise ValueError(f"{leaf.path} has shape {array.shape}, but its config says {leaf.full_shape}")
        for name, entry in zip(leaf.names, array if leaf.stacked else [array]):
            tensors[name] = np.ascontiguousarray(leaf.hub_view(entry))
    return tensors


# ---------------------------------------------------------------- the correspondence of names and shapes


def _leaves(config: ModelConfig) -> list[_Leaf]:
    """Every leaf of the parameter tree of `config`."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query = (config.num_heads, config.head_dim)
    key = (config.num_kv_heads, config.head_dim)

    def per_layer(path: str, part: str, shape: tuple[int, ...], inputs: int | None = None) -> _Leaf:
        layers = config.sharing.owners if path.startswith("kv.") else range(config.num_layers)
        return _Leaf(path, tuple(f"model.layers.{layer}.{part}" for layer in layers), shape, inputs)

    leaves = [
        _Leaf("embed", ("model.embed_tokens.weight",), (vocab, hidden), stacked=False),
        per_layer("layers.attn_norm", "input_layernorm.weight", (hidden,)),
        per_layer("layers.wq", "self_attn.q_proj.weight", (hidden, *query), 1),
        per_layer("layers.wo", "self_attn.o_proj.weight", (*query, hidden), 2),
        per_layer("layers.mlp_norm", "post_attention_layernorm.weight", (hidden,)),
        per_layer("layers.gate", "mlp.gate_proj.weight", (hidden, inner), 1),
        per_layer("layers.up", "mlp.up_proj.weight", (hidden, inner), 1),
        per_layer("layers.down", "mlp.down_proj.weight", (inner, hidden), 1),
        per_layer("kv.wk", "self_attn.k_proj.weight", (hidden, *key), 1),
        per_layer("kv.wv", "self_attn.v_proj.weight", (hidden, *key), 1),
        _Leaf("final_norm", ("model.norm.weight",), (hidden,), stacked=False),
    ]
    if not config.tie_embeddings:
        leaves.append(_Leaf("head", ("lm_head.weight",), (hidden, vocab), 1, stacked=False))
    if config.attention_bias:
        leaves += [
            per_layer("layers.bq", "self_attn.q_proj.bias", query, 0),
            per_layer("layers.bo", "self_attn.o_proj.bias", (hidden,), 0),
            per_layer("kv.bk", "self_attn.k_proj.bias", key, 0),
            per_layer("kv.bv", "self_attn.v_proj.bias", key, 0),
        ]
    if config.mlp_bias:
        leaves += [
            per_layer("layers.gate_bias", "mlp.gate_proj.bias", (inner,), 0),
            per_layer("layers.up_bias", "mlp.up_proj.bias", (inner,), 0),
            per_layer("layers.down_bias", "mlp.down_proj.bias", (hidden,), 0),
        ]
    return leaves


# ---------------------------------------------------------------- tensors


class _Tensor(NamedTuple):
    """Where a tensor is: the name of its file, and the open file."""

    file: str
    handle: Any


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """All tensors of a folder by name, their files opened in `stack`; only headers are read."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise UserError(f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
    if single.is_file():
        handle = _open(single, stack)
        names: list[str] = handle.keys()
        return {name: _Tensor(SINGLE_FILE, handle) for name in names}
    if not index.is_file():
        raise UserError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: has no `weight_map` from tensor names to files; download it again")
    tensors: dict[str, _Tensor] = {}
    for file in sorted(set(weight_map.values())):
        handle = _open(folder / file, stack)
        held = set(handle.keys())
        listed = {name for name, where in weight_map.items() if where == file}
        if absent := listed - held:
            raise UserError(f"{folder / file}: lacks {_list(absent)}, which {INDEX_FILE} places there")
        if unlisted := {name for name in held - listed if not _ignorable(name)}:
            raise UserError(f"{folder / file}: holds {_list(unlisted)}, which {INDEX_FILE} does not place there")
        tensors |= {name: _Tensor(file, handle) for name in listed}
    return tensors


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing although {INDEX_FILE} names it; download it again")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); download it again") from error


def _check_names(folder: Path, expected: list[str], tensors: Mapping[str, _Tensor]) -> None:
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{folder}: lacks {_list(missing)}, which its config.json calls for")
    if surplus := [name for name in tensors.keys() - set(expected) if not _ignorable(name)]:
        raise UserError(f"{folder}: holds {_list(surplus)}, for which its config.json has no place")


def _read_leaf(folder: Path, leaf: _Leaf, tensors: Mapping[str, _Tensor]) -> np.ndarray:
    """The stack of the tensors of `leaf`; should layers differ in dtype, in one that holds every value."""
    kinds = set()
    for name in leaf.names:
        file, handle = tensors[name]
        header = handle.get_slice(name)
        if tuple(header.get_shape()) != leaf.hub_shape:
            raise UserError(
                f"{folder / file}: {name} has shape {tuple(header.get_shape())}, "
                f"but config.json calls for {leaf.hub_shape}"
            )
        if header.get_dtype() not in _DTYPES:
            raise UserError(
                f"{folder / file}: {name} is stored as {header.get_dtype()}; only {', '.join(_DTYPES)} are read"
            )
        kinds.add(header.get_dtype())
    kind = kinds.pop() if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"
    array = np.empty(leaf.full_shape, _DTYPES[kind])
    for name, entry in zip(leaf.names, array if leaf.stacked else [array]):
        leaf.hub_view(entry)[...] = tensors[name].handle.get_tensor(name)
    return array


def _ignorable(name: str) -> bool:
    """Rotary tables, which old checkpoints hold, are computed here."""
    return name.endswith("rotary_emb.inv_freq")


def _list(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- config.json


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give the folder of a downloaded model") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a JSON object; download it again")
    return tree


def _read_config(path: Path) -> ModelConfig:
    """The model configuration that an HF `config.json` means, with HF's defaults where it is silent."""
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if model_type not in ("llama", "lckv-llama"):
        raise UserError(f"{path}: model_type is {model_type!r}; only llama and lckv-llama can be read")
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
        **(_sharing(raw) if model_type == "lckv-llama" else _plain(path, raw)),
    }
    config = build_config(ModelConfig, tree, str(path))
    if any(config.sharing.windowed) and raw.get("sliding_window", 4096) is None:
        raise UserError(f"{path}: layer_types marks sliding windows with `s`, but sliding_window is null; set it")
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


def _sharing(raw: Mapping[str, Any]) -> dict[str, Any]:
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
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    scaling = raw.get(key)
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: {key} is {scaling!r}; it must be a mapping or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    values = {name: value for name, value in scaling.items() if name not in ("rope_type", "type", "rope_theta")}
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3_KEYS}.get(kind)
    if needed is None:
        raise UserError(f"{path}: {key} is of type {kind!r}; only default, linear and llama3 are computed here")
    if odd := sorted(values.keys() ^ set(needed)):
        raise UserError(f"{path}: {key} of type {kind} takes {_list(needed) or 'no values'}; mend {_list(odd)}")
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **values} if needed else None}
