"""`import`: a Hugging Face folder -> a run folder that `train`, `evaluate` and the other commands open."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig, build_config, config_json
from lckv_jax.convert.given_path import given_path
from lckv_jax.convert.hub import hub_leaves, load_hub, stored_bytes
from lckv_jax.convert.hub_config import read_config, read_json
from lckv_jax.convert.new_folder import check_new, check_space, new_folder, uninterrupted
from lckv_jax.convert.reshare import How, describe_change, resharded_config, reshare
from lckv_jax.convert.tokenizer_files import import_tokenizer_files
from lckv_jax.data.tokenizer import Tokenizer, find_tokenizer, tokenizer_files
from lckv_jax.errors import UserError
from lckv_jax.model_config import ModelConfig

_LONGEST_ROW, _STEPS = 4096, 1000  # of the training that config.json proposes
_MARGIN = 2**20  # bytes beside the parameters: metadata, tokenizer, config
_HF_CONTEXT = 2048  # what transformers take a llama's max_position_embeddings for where config.json has none


def import_hub(
    folder: str,
    out: str,
    *,
    sharing: str | None = None,
    how: How = "mean",
    num_kv_heads: int | None = None,
    window_includes_self: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Writes the model in the Hugging Face folder `folder` (llama, lckv-llama or lckv) as the run folder `out`.

    OUT holds checkpoints/0 with the parameters in the dtype of the files, the tokenizer, and config.json: a run that
    starts from OUT, to be given an `out` of its own.
    sharing, how, num_kv_heads: converts the model (see `reshare`). window_includes_self: False for checkpoints trained
    by the official flash-attention scripts, whose windows hold one token more than their config says.
    report: gets a line for what was read, dropped, averaged and written.
    Raises UserError if the folder is damaged or is no such model, does not fit its tokenizer, or cannot be converted as
    asked, and if `out` is not empty or cannot be written; nothing is left of it then.
    """
    if "://" in out:
        raise UserError(f"{out} is a bucket; give a local or mounted folder")
    source, target = given_path(folder, "FOLDER"), given_path(out, "OUT")
    place = check_new(target)
    _check_no_run(source)
    model = read_config(source / "config.json")
    if not window_includes_self:
        model = _with_wider_window(model, source)
    converted = resharded_config(model, model.sharing if sharing is None else sharing, num_kv_heads)
    files = import_tokenizer_files(source, model.vocab_size)
    check_space(place, _needed_bytes(source, model, converted))
    with new_folder(place) as partial:
        tokenizer = _write_tokenizer(files, partial, source, model.vocab_size, report)
        params, _ = load_hub(source, report=report)
        report(f"read {source}: map {model.sharing}, {_size(params)}")
        if change := describe_change(model, converted, how):
            report(change)
        params, _ = reshare(params, model, converted.sharing, how, converted.num_kv_heads)
        size = _size(params)
        config = _proposed_config(target, converted, tokenizer_files(partial))
        (partial / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n", encoding="utf-8")
        state = {"params": _on_device(params, report), "step": jnp.zeros((), jnp.int32)}
        fingerprint = "" if tokenizer is None else tokenizer.fingerprint
        with uninterrupted(), checkpoint.open_checkpoints(partial / "checkpoints", keep=1) as manager:
            checkpoint.save(manager, state, config, tokenizer=fingerprint)
        del state, params
        checkpoint.stream(partial, read_all, report=report)
    report(f"wrote {target}: map {converted.sharing}, {size}, read back and compared")
    if not files:
        return
    report(f'measure it: python -m lckv_jax evaluate {quote(str(target))} "files=[texts/*.txt]"')
    report(
        f"go on training: python -m lckv_jax train {quote(str(target / 'config.json'))} out=runs/new "
        f'data.folder=data/new "data.sources=[texts/*.txt]" train.steps={config.train.steps}'
    )


def read_all(stored: checkpoint.Stored) -> None:
    """Compares every leaf with what was to be written, one at a time."""
    for path in stored.leaves:
        stored.read(path)


def _check_no_run(source: Path) -> None:
    """Raises UserError for what is no folder of a downloaded model and could be taken for one."""
    if os.path.isfile(source):
        raise UserError(f"{source} is a file; give the folder of a downloaded model with its config.json")
    has_config = os.path.isfile(source / "config.json")
    raw = read_json(source / "config.json") if has_config else {}
    ours = isinstance(raw.get("model"), dict) and isinstance(raw.get("train"), dict)
    if ours or ("model_type" not in raw and os.path.isdir(source / "checkpoints")):
        raise UserError(f"{source} is a run already; give it to init_from, evaluate or export")


def _needed_bytes(source: Path, model: ModelConfig, converted: ModelConfig) -> int:
    """What the checkpoint will take: the parameters after the conversion, as wide as in the files, and the rest."""
    before, after = (sum(math.prod(leaf.full_shape) for leaf in hub_leaves(config)) for config in (model, converted))
    return stored_bytes(source, model) * after // before + _MARGIN


def _with_wider_window(model: ModelConfig, source: Path) -> ModelConfig:
    if not any(model.sharing.windowed):
        raise UserError(
            f"{source}: no layer of its map {model.sharing} has a sliding window; leave out --window-includes-self"
        )
    return model.model_copy(update={"window": model.window + 1})


def _write_tokenizer(
    files: dict[str, bytes], folder: Path, source: Path, vocab_size: int, report: Callable[[str], None]
) -> Tokenizer | None:
    """Writes the files into `folder`; the tokenizer that they are, None if there are none."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        tokenizer = find_tokenizer(folder)
    except UserError as error:
        problem = str(error).replace(str(folder), str(source))
        raise UserError(f"{problem}; or move the tokenizer out of that folder, to import the model without") from error
    if tokenizer is None:
        report(
            f"{source} has no tokenizer, so that no text can be evaluated or trained on: save it beside the weights, "
            f"tokenizer.save_pretrained({str(source)!r}), and import again"
        )
    elif tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids, but config.json says vocab_size {vocab_size}, so "
            "the model has no embedding for the last ones; put the tokenizer of this model there"
        )
    elif tokenizer.vocab_size < vocab_size:
        report(f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}: the others are never used")
    return tokenizer


def _proposed_config(out: Path, model: ModelConfig, tokenizer: list[Path]) -> RunConfig:
    """A run that starts from `out`; a tokenizer that is not there is named all the same, so that none is trained."""
    name = tokenizer[0].name if tokenizer else "tokenizer.model"
    tree = {
        "out": str(out),
        "model": model.model_dump(),
        "data": {
            "tokenizer": str(out / name),
            "folder": f"{out}-data",
            "seq_len": min(model.max_position_embeddings or _HF_CONTEXT, _LONGEST_ROW),
        },
        "train": {"steps": _STEPS},
        "init_from": str(out),
    }
    return build_config(RunConfig, tree, str(out))


def _on_device(tree: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """The leaves as jax arrays, the numpy ones let go one by one."""
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            tree[name] = _on_device(leaf, report)
            continue
        if leaf.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            report(f"{name}: float64 in the files, written as float32 (JAX_ENABLE_X64=1 would keep it)")
            leaf = leaf.astype(np.float32)
        tree[name] = jax.device_put(leaf)
    return tree


def _size(params: dict[str, Any]) -> str:
    leaves = jax.tree.leaves(params)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    return f"{sum(leaf.size for leaf in leaves):,} parameters in {' and '.join(dtypes)}"
