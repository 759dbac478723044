"""Hugging Face weights in and out: folders of model type `llama`, `lckv-llama` and our own `lckv`, without torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from lckv_jax.config import ModelConfig
from lckv_jax.convert.hub_config import list_names, read_config, read_json
from lckv_jax.errors import UserError
from lckv_jax.sharing import KVSharing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


class Leaf(NamedTuple):
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

    def tensors(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The HF tensors that the leaf `array` stacks, by name: views, of which projections are not C-contiguous.

        Raises ValueError if `array` has another shape.
        """
        if array.shape != self.full_shape:
            raise ValueError(f"{self.path} has shape {array.shape}, but its config says {self.full_shape}")
        for name, entry in zip(self.names, array if self.stacked else [array]):
            yield name, self.hub_view(entry)


def load_hub(
    folder: str | Path, *, report: Callable[[str], object] | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """The parameters and configuration of the Hugging Face folder `folder` (`config.json` and safetensors).

    Returns the plain dict tree of numpy arrays that `model.transformer` uses, in the dtype of the files, and the model
    configuration; a setting that HF does not have keeps its default, the compute dtype among them. Tensors are read
    one at a time into place, so the peak is the parameters and one tensor.
    report: is told of the K/V projections of layers that compute none, as files hold whose map was changed by hand;
    None refuses them.
    Raises UserError if the folder is incomplete or damaged, if configuration and tensors do not fit each other, or a
    number is not finite: no parameter is ever left at random, and no other tensor is dropped but rotary tables.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder of a downloaded model with its config.json")
    config = read_config(folder / "config.json")
    leaves = hub_leaves(config)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_names(folder, config, tensors, report)
        flat = {leaf.path: _read_leaf(folder, leaf, tensors) for leaf in leaves}
        return traverse_util.unflatten_dict(flat, sep="."), config


def stored_bytes(folder: str | Path, config: ModelConfig) -> int:
    """Bytes of the parameters in the files of `folder`, whose configuration is `config`; only headers are read.

    Raises UserError if a file or a tensor is missing or too many, as `load_hub` does.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_names(folder, config, tensors, lambda _: None)
        slices = [tensors[name].handle.get_slice(name) for name in _names(config)]
        kinds = [np.dtype(_DTYPES.get(tensor.get_dtype(), np.uint8)) for tensor in slices]
        return sum(math.prod(tensor.get_shape()) * kind.itemsize for tensor, kind in zip(slices, kinds))


def to_hub(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors that HF would name for `tree`: parameters, or gradients of the same tree.

    tree: numpy or jax arrays, shaped as `config` says, of any dtype. The result keeps the dtype; every array is
    C-contiguous, as writing safetensors demands, and may share the memory of `tree`.
    Raises ValueError naming a leaf that is missing, surplus or of another shape.
    """
    flat = traverse_util.flatten_dict(dict(tree), sep=".")
    tensors = {}
    for leaf in fitting_leaves(config, flat):
        for name, view in leaf.tensors(np.asarray(flat[leaf.path])):
            tensors[name] = np.ascontiguousarray(view)
    return tensors


# ---------------------------------------------------------------- the correspondence of names and shapes


def fitting_leaves(config: ModelConfig, paths: Iterable[str]) -> list[Leaf]:
    """`hub_leaves`, if these are the `paths` of a tree; else raises ValueError that names those that differ."""
    leaves = hub_leaves(config)
    if odd := sorted(set(paths) ^ {leaf.path for leaf in leaves}):
        raise ValueError(f"the tree and its config differ in the leaves {', '.join(odd)}")
    return leaves


def hub_leaves(config: ModelConfig) -> list[Leaf]:
    """Every leaf of the parameter tree of `config`, with the HF tensors that it stacks."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query = (config.num_heads, config.head_dim)
    key = (config.num_kv_heads, config.head_dim)

    def per_layer(path: str, part: str, shape: tuple[int, ...], inputs: int | None = None) -> Leaf:
        layers = config.sharing.owners if path.startswith("kv.") else range(config.num_layers)
        return Leaf(path, tuple(f"model.layers.{layer}.{part}" for layer in layers), shape, inputs)

    leaves = [
        Leaf("embed", ("model.embed_tokens.weight",), (vocab, hidden), stacked=False),
        per_layer("layers.attn_norm", "input_layernorm.weight", (hidden,)),
        per_layer("layers.wq", "self_attn.q_proj.weight", (hidden, *query), 1),
        per_layer("layers.wo", "self_attn.o_proj.weight", (*query, hidden), 2),
        per_layer("layers.mlp_norm", "post_attention_layernorm.weight", (hidden,)),
        per_layer("layers.gate", "mlp.gate_proj.weight", (hidden, inner), 1),
        per_layer("layers.up", "mlp.up_proj.weight", (hidden, inner), 1),
        per_layer("layers.down", "mlp.down_proj.weight", (inner, hidden), 1),
        per_layer("kv.wk", "self_attn.k_proj.weight", (hidden, *key), 1),
        per_layer("kv.wv", "self_attn.v_proj.weight", (hidden, *key), 1),
        Leaf("final_norm", ("model.norm.weight",), (hidden,), stacked=False),
    ]
    if not config.tie_embeddings:
        leaves.append(Leaf("head", ("lm_head.weight",), (hidden, vocab), 1, stacked=False))
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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: has no `weight_map` from tensor names to files; download it again")
    tensors: dict[str, _Tensor] = {}
    for file in sorted(set(weight_map.values())):
        handle = _open(folder / file, stack)
        held = set(handle.keys())
        listed = {name for name, where in weight_map.items() if where == file}
        if absent := listed - held:
            raise UserError(f"{folder / file}: lacks {list_names(absent)}, which {INDEX_FILE} places there")
        if unlisted := {name for name in held - listed if not _ignorable(name)}:
            raise UserError(f"{folder / file}: holds {list_names(unlisted)}, which {INDEX_FILE} does not place there")
        tensors |= {name: _Tensor(file, handle) for name in listed}
    return tensors


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing although {INDEX_FILE} names it; download it again")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); download it again") from error


def _check_names(
    folder: Path, config: ModelConfig, tensors: Mapping[str, _Tensor], report: Callable[[str], object] | None
) -> None:
    expected = _names(config)
    if missing := expected - tensors.keys():
        raise UserError(f"{folder}: lacks {list_names(missing)}, which its config.json calls for")
    surplus = {name for name in tensors.keys() - expected if not _ignorable(name)}
    unshared = config.model_copy(update={"sharing": KVSharing.parse("standard", config.num_layers)})
    dropped = surplus & _names(unshared) if report else set()
    if surplus - dropped:
        raise UserError(f"{folder}: holds {list_names(surplus - dropped)}, for which its config.json has no place")
    if report and dropped:
        layers = sorted({int(name.split(".")[2]) for name in dropped})
        report(
            f"left out {list_names(dropped, most=len(dropped))}: the map {config.sharing} has no K/V projections in "
            f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        )


def _names(config: ModelConfig) -> set[str]:
    return {name for leaf in hub_leaves(config) for name in leaf.names}


def _read_leaf(folder: Path, leaf: Leaf, tensors: Mapping[str, _Tensor]) -> np.ndarray:
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
        file, handle = tensors[name]
        tensor = handle.get_tensor(name)
        if not np.isfinite(tensor).all():
            raise UserError(f"{folder / file}: {name} holds NaN or infinity; take an earlier checkpoint of that model")
        leaf.hub_view(entry)[...] = tensor
    return array


def _ignorable(name: str) -> bool:
    """Rotary tables, which old checkpoints hold, are computed here."""
    return name.endswith("rotary_emb.inv_freq")
