"""What is settled before a run's first step: that it may go on, and that all of its processes mean the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig
from lckv_jax.data.prepare import Manifest, load_prepared, prepare
from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.train import resume, run_folder
from lckv_jax.train.metrics import read_metrics

_COMPILER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # variables


def check_same_everywhere(config: RunConfig) -> None:
    """Raises UserError if a process has another config, code or libraries that compute and save than process 0."""
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint", "grain")}
    fields = {field: json.dumps(value) for field, value in resume.fields(config).items()}
    compiler = {name: value for name, value in os.environ.items() if name.startswith(_COMPILER)}
    processes.check_same(
        "config or code",
        {"number of processes": str(processes.count()), "code of lckv_jax": code, **versions, **compiler, **fields},
    )


def hang_seconds(config: RunConfig) -> float | None:
    """For the watchdog, which one process alone gets only if it asks: it may be stopped and continued by hand."""
    given = config.processes.hang_seconds
    return 0 if given is None and processes.count() == 1 else given


def prepare_all(config: RunConfig, say: Callable[[str], None]) -> Manifest:
    """The data, made by process 0 where it is missing, and seen alike by all."""
    if processes.index() == 0:
        manifest = prepare(config.data, config.model.vocab_size, say)
        processes.wait_for_all("data")
    else:
        processes.wait_for_all("data")
        manifest = run_folder.seen(lambda: load_prepared(config.data, config.model.vocab_size))
    processes.check_same("data", {"manifest": manifest.hash[:12], "tokenizer": manifest.tokenizer_fingerprint[:12]})
    return manifest


def check_resumable(config: RunConfig, out: Path, say: Callable[[str], None]) -> bool:
    """Whether the folder holds a checkpoint to go on from.

    Shows what the config changes in the run that the folder holds; raises UserError if that is not allowed.

    Looks at the newest checkpoint, or, before the first one, at config.json; before the first step anything goes.
    """
    meta = checkpoint.newest_meta(out / "checkpoints")
    if meta is not None and not any(path.startswith("opt.") for path in meta["leaves"]):
        raise UserError(
            f"{out} holds an imported model, not a run to go on with; choose another `out`, with "
            f"init_from={config.out} to start from it"
        )
    if meta is not None:
        where, tree = f"{out}: its checkpoint of step {meta['step']}", meta["config"]
    elif any("loss" in record for record in read_metrics(out / "metrics.jsonl")):
        where = f"{out}: the run in it"
        try:
            tree = json.loads((out / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{out} holds a run, but its config.json cannot be read; put it back, or choose another `out`"
            ) from error
    else:
        run_folder.check_free(out)
        return False
    found = resume.changes(resume.read_config(tree, where), config)
    resume.check_changes(found, config.allow_changes, f"{where} has")
    for change in found:
        say(f"changed since then: {change}")
    if meta is not None and meta["step"] > config.train.steps:
        raise UserError(f"{where} is past train.steps={config.train.steps}; raise that, or choose another `out`")
    return meta is not None


def check_same_run(config: RunConfig, manifest: Manifest, meta: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint belongs to another configuration, tokenizer or data set."""
    where = f"the checkpoint of step {meta['step']} in {config.out}"
    if meta["tokenizer"] != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{where} was trained with another tokenizer than the one in {config.data.folder}; "
            "restore that data folder, or choose another `out`"
        )
    if meta["manifest"] != manifest.hash and not resume.allows_other_data(config.allow_changes):
        raise UserError(
            f"{where} was trained on other data than {config.data.folder} now holds; restore that data folder, choose "
            'another `out`, or go on all the same with "allow_changes=[data.sources]"'
        )
    before = resume.read_config(meta["config"], where)
    resume.check_changes(resume.changes(before, config), config.allow_changes, f"{where} has")


def tokens_seen(meta: dict[str, Any]) -> int:
    """Of a checkpoint; the oldest do not say, and their runs never changed the batch size."""
    if meta.get("tokens_seen") is not None:
        return meta["tokens_seen"]
    data = meta["config"]["data"]
    return meta["step"] * data["batch_size"] * data["seq_len"]
