"""`export`: a checkpoint as a Hugging Face folder, written leaf by leaf, without torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lckv_jax.checkpoint import Stored, stream
from lckv_jax.config import ModelConfig
from lckv_jax.convert.given_path import given_path
from lckv_jax.convert.hub import INDEX_FILE, SINGLE_FILE, Leaf, fitting_leaves
from lckv_jax.convert.hub_config import MODULE, Format, hub_config, natural_format
from lckv_jax.convert.model_card import model_card
from lckv_jax.convert.new_folder import check_new, check_space, new_folder
from lckv_jax.convert.safetensors_writer import SafetensorsFile, Spec
from lckv_jax.convert.tokenizer_files import hub_tokenizer_files
from lckv_jax.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]

_MARGIN = 2**20  # bytes beside the tensors: headers, model card, index
_LEAST_SHARD, _MOST_SHARD = 10**3, 2**63  # bytes
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Exported(NamedTuple):
    """What was written: the format of config.json, the dtype named there, how many tensors, their bytes, and files."""

    format: Format
    dtype: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]


class _Plan(NamedTuple):
    """Everything about the files of tensors before one is read: `files` maps names to what each file holds."""

    format: Format
    leaves: list[Leaf]
    files: dict[str, dict[str, Spec]]

    @property
    def file_of(self) -> dict[str, str]:
        return {tensor: file for file, tensors in self.files.items() for tensor in tensors}

    @property
    def specs(self) -> dict[str, Spec]:
        return {tensor: spec for tensors in self.files.values() for tensor, spec in tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def dtype(self) -> str:
        """The dtype that holds every tensor; transformers load all of them in one."""
        kinds = {spec.dtype for spec in self.specs.values()}
        return kinds.pop() if len(kinds) == 1 else "float64" if "float64" in kinds else "float32"


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: Literal["auto", "lckv", "lckv-llama"] = "auto",
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    say: Callable[[str], None] = print,
) -> Exported:
    """Writes the Hugging Face folder `out`: safetensors, config.json, generation_config.json, tokenizer, model card.

    checkpoint: a run folder or RUN/checkpoints/STEP; the parameters, or their average where the run keeps one, are
    those that `checkpoint.load` gives. format: `auto` is plain llama where stock transformers compute the model, else
    `lckv`, with our own PyTorch module beside the weights; `lckv-llama` is that of the official LCKV code.
    dtype: of the tensors; None keeps that of the parameters. max_shard_size: bytes of a file, such as 500MB.
    One leaf of the parameters is in memory at a time. Every tensor is read back and compared, bit by bit, and `out` has
    its name only when all are right; whatever happens, there is no half folder.
    Raises UserError if `out` is not new, for weights that are not finite or would not be so in `dtype`, for a map that
    the format cannot say, for a full disk, and as `checkpoint.load` does.
    """
    started = time.perf_counter()
    given_path(checkpoint, "CHECKPOINT")
    folder, limit = check_new(given_path(out, "OUT")), _bytes(max_shard_size)
    write = partial(_export, source=str(checkpoint), out=folder, format=format, dtype=dtype, limit=limit, say=say)
    done = stream(checkpoint, write, report=say)
    files = f"{len(done.files)} file" + ("s" if len(done.files) > 1 else "")
    say(f"{out}: format {done.format}, {done.tensors:,} tensors, {done.nbytes:,} bytes ({done.dtype}) in {files}")
    say(f"every tensor read back and compared; {time.perf_counter() - started:.1f} s")
    return done


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2] or "B"] if match and (match[2] or "B") in _UNITS else 0.0
    if not _LEAST_SHARD <= size < _MOST_SHARD:
        raise UserError(f"--max-shard-size {text}: not a size from 1KB on; write, for example, 5GB or 500MB")
    return int(size)


def _export(
    stored: Stored, *, source: str, out: Path, format: str, dtype: Dtype | None, limit: int, say: Callable[[str], None]
) -> Exported:
    """One try with one checkpoint; Unusable comes through, after the partial folder is gone."""
    model = stored.config.model
    averaged = ", averaged parameters" if stored.averaged else ""
    say(f"exporting step {stored.meta['step']:,} of {stored.run}{averaged}")
    plan = _plan(stored, natural_format(model) if format == "auto" else format, dtype, limit)
    texts = _texts(plan, stored, out.name)
    size = plan.nbytes + sum(map(len, texts.values())) + _MARGIN
    check_space(out, size)
    with new_folder(out, size) as folder:
        for name, content in texts.items():
            _write_file(folder / name, content)
        _write_tensors(folder, plan, stored, source)
    return Exported(plan.format, plan.dtype, len(plan.specs), plan.nbytes, tuple(plan.files))


# ---------------------------------------------------------------- the plan


def _plan(stored: Stored, format: Any, dtype: Dtype | None, limit: int) -> _Plan:
    """What each file of tensors will hold: layer after layer, as HF orders them, up to `limit` bytes a file."""
    leaves = fitting_leaves(stored.config.model, stored.leaves)
    specs = {
        name: Spec(dtype or str(stored.leaves[leaf.path].dtype), leaf.hub_shape)
        for leaf in leaves
        for name in leaf.names
    }
    shards: list[dict[str, Spec]] = [{}]
    held = 0
    for name in sorted(specs, key=partial(_place, stored.config.model)):
        if held and held + specs[name].nbytes > limit:
            shards.append({})
            held = 0
        shards[-1][name] = specs[name]
        held += specs[name].nbytes
    if len(shards) == 1:
        return _Plan(format, leaves, {SINGLE_FILE: shards[0]})
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return _Plan(format, leaves, dict(zip(names, shards)))


def _place(config: ModelConfig, name: str) -> int:
    """The layer of a tensor; the embedding before them, norm and head after them."""
    words = name.split(".")
    return int(words[2]) if words[1] == "layers" else -1 if words[1] == "embed_tokens" else config.num_layers


def _texts(plan: _Plan, stored: Stored, title: str) -> dict[str, bytes]:
    """The other files of the folder, by name."""
    model, tokenizer = stored.config.model, stored.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{stored.run}: its tokenizer has {tokenizer.vocab_size} ids, but the model only {model.vocab_size}; "
            "put back the tokenizer that it was trained with"
        )
    bos_id, eos_id = (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    context = model.max_position_embeddings or stored.config.data.seq_len
    config = hub_config(
        model, format=plan.format, max_position_embeddings=context, dtype=plan.dtype, bos_id=bos_id, eos_id=eos_id
    )
    tokens = {} if tokenizer is None else {"bos_token_id": bos_id, "eos_token_id": eos_id}
    texts = {
        "config.json": _json(config),
        "generation_config.json": _json({"_from_model_config": True, **tokens}),
        **hub_tokenizer_files(stored.run, context=context),
        "README.md": model_card(stored, title=title, format=plan.format, dtype=plan.dtype, context=context).encode(),
    }
    if plan.format == "lckv":
        texts[f"{MODULE}.py"] = Path(__file__).with_name("torch_model.py").read_bytes()
    if len(plan.files) > 1:
        texts[INDEX_FILE] = _json({"metadata": {"total_size": plan.nbytes}, "weight_map": plan.file_of})
    return texts


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- tensors


def _write_tensors(folder: Path, plan: _Plan, stored: Stored, source: str) -> None:
    """Writes each leaf to its places in the files, then reads those places back while the leaf is still at hand."""
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(contextlib.closing(SafetensorsFile(folder / name, held)))
            for name, held in plan.files.items()
        }
        for leaf in plan.leaves:
            _write_leaf(leaf, stored.read(leaf.path), files, plan, source)


def _write_leaf(leaf: Leaf, array: np.ndarray, files: Mapping[str, SafetensorsFile], plan: _Plan, source: str) -> None:
    file_of, specs = plan.file_of, plan.specs
    for name, view in leaf.tensors(array):
        files[file_of[name]].write(name, _converted(view, specs[name], f"{source}: {name}"))
    for file in {file_of[name] for name in leaf.names}:
        files[file].sync()
    for name, view in leaf.tensors(array):
        files[file_of[name]].check(name, view.astype(specs[name].numpy_dtype, copy=False))


def _converted(tensor: np.ndarray, spec: Spec, what: str) -> np.ndarray:
    """The tensor in the dtype of `spec`. Raises UserError unless all of it is finite, before and after."""
    if wrong := tensor.size - np.count_nonzero(np.isfinite(tensor)):
        raise UserError(f"{what} holds {wrong:,} numbers that are NaN or infinite; export an earlier checkpoint")
    if tensor.dtype == spec.numpy_dtype:
        return tensor
    with np.errstate(over="ignore"):
        converted = tensor.astype(spec.numpy_dtype)
    if wrong := converted.size - np.count_nonzero(np.isfinite(converted)):
        raise UserError(
            f"{what} holds {wrong:,} numbers too large for {spec.dtype}; leave out --dtype, or write --dtype bfloat16"
        )
    return converted
