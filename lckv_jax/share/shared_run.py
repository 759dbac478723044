"""A model with a new map as a run folder, which evaluates, generates, exports and trains like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig, config_json
from lckv_jax.convert.import_hub import read_all
from lckv_jax.convert.new_folder import uninterrupted
from lckv_jax.data.manifest import MANIFEST
from lckv_jax.data.tokenizer import Tokenizer, tokenizer_files
from lckv_jax.model_config import ModelConfig

MARGIN = 2**22  # bytes beside the parameters: metadata, tokenizer, report, pictures


def has_text(run: RunConfig) -> bool:
    """Whether the text that the run is trained on is prepared."""
    return (Path(run.data.folder).expanduser() / MANIFEST).exists()


def shared_config(run: RunConfig, model: ModelConfig, source: Path, out: Path) -> RunConfig:
    """A run that starts from `out`, to be given an `out` of its own; on the text of the run `source`, if it has one."""
    changes: dict[str, Any] = {"out": str(out), "init_from": str(out), "model": model, "allow_changes": ()}
    files = tokenizer_files(source)
    if run.init_from == run.out and not has_text(run) and files:  # as `import` writes it
        data = {"tokenizer": str(out / files[0].name), "folder": f"{out}-data"}
        changes["data"] = run.data.model_copy(update=data)
    return run.model_copy(update=changes)


def write_run(
    partial: Path,
    params: dict[str, Any],
    config: RunConfig,
    tokenizer: Tokenizer | None,
    source: Path,
    report: Callable[[str], None],
) -> None:
    """Writes checkpoints/0, config.json and the tokenizer of the run `source` into `partial`, and reads all back.

    Raises UserError if that is not what was written.
    """
    for file in tokenizer_files(source):
        shutil.copyfile(file, partial / file.name)
    (partial / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n", encoding="utf-8")
    state = {"params": jax.tree.map(jnp.asarray, params), "step": jnp.zeros((), jnp.int32)}
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    with uninterrupted(), checkpoint.open_checkpoints(partial / "checkpoints", keep=1) as manager:
        checkpoint.save(manager, state, config, tokenizer=fingerprint)
    checkpoint.stream(partial, read_all, report=report)
