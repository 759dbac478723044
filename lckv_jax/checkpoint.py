"""Checkpoints of a run: orbax writes them in the background, and every leaf is verified when it is read.

On disk: FOLDER/STEP/ with the items `params`, `rest` (the rest of the train state) and `meta` (JSON). Orbax sees to it
that a step appears whole or not at all, but not that its bits stay: `meta` holds a fingerprint of every leaf.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from lckv_jax.config import RunConfig, build_config, config_json
from lckv_jax.errors import UserError
from lckv_jax.orbax_noise import quieten_orbax, reading_quietly

if TYPE_CHECKING:
    from lckv_jax.data.tokenizer import Tokenizer

# Why a file cannot be read although it may be whole.
_PASSING = {errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}

State = dict[str, Any]
Meta = dict[str, Any]
T = TypeVar("T")


class _Unusable(Exception):
    """Why a checkpoint cannot be used, in a few words."""


class _Found(NamedTuple):
    state: State
    meta: Meta
    unusable: tuple[int, ...]


def open_checkpoints(folder: str | Path, keep: int) -> ocp.CheckpointManager:
    """The manager of the checkpoints in `folder`, which is made if it is absent; the newest `keep` steps stay.

    Removes what killed saves left behind, so only the one run that writes to `folder` may call it. Close the manager,
    or use it in `with`: that waits for the save in flight. Raises UserError if the folder cannot be made or read.
    """
    quieten_orbax()
    where = _absolute(folder)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
    )
    try:
        if jax.process_index() == 0 and where.exists():
            for path in where.iterdir():
                if path.name.isdecimal() and not any(path.iterdir()):
                    path.rmdir()  # orbax would take it for a step
        with reading_quietly():
            return ocp.CheckpointManager(where, options=options)
    except OSError as error:
        raise UserError(f"{where}: cannot hold checkpoints: {error.strerror or error}") from error


def save(
    manager: ocp.CheckpointManager, state: State, config: RunConfig, *, manifest: str = "", tokenizer: str = ""
) -> None:
    """Begins to save `state` as its step; returns when its buffers may be donated or changed.

    state: {"params": ..., "step": int32 scalar, ...}, every leaf a jax.Array without PRNG keys; all processes call it.
    manifest, tokenizer: hash of the data manifest and fingerprint of the tokenizer. They are kept in the metadata with
    `config`, for `restore` to hand back.
    Raises RuntimeError if orbax does not save, because this or a later step exists. An error of the write itself, such
    as a full disk, is raised by the next `save`, by `manager.wait_until_finished()` or on closing.
    """
    step = int(state["step"])
    meta = {
        "step": step,
        "config": config_json(config),
        "sharing": str(config.model.sharing),
        "manifest": manifest,
        "tokenizer": tokenizer,
        "versions": {"lckv_jax": _package_version(), "jax": jax.__version__, "orbax": ocp.__version__},
        "leaves": _describe(state),
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    meta = ocp.args.JsonSave(meta | {"digest": _digest(meta)})
    if not manager.save(step, args=ocp.args.Composite(**items, meta=meta)):
        raise RuntimeError(f"step {step} was not saved: {manager.directory} already holds step {manager.latest_step()}")


def restore(
    manager: ocp.CheckpointManager,
    abstract_state: State,
    *,
    check: Callable[[Meta], None] = lambda meta: None,
    report: Callable[[str], None] = print,
) -> tuple[State, Meta] | None:
    """The state and metadata of the newest step that loads and whose fingerprints agree; None if there is no step.

    abstract_state: the tree wanted, of jax.ShapeDtypeStruct with shardings; any mesh, not only that of the save.
    check: called with the metadata of a step before its arrays are read, to refuse it by raising.
    report: told in one line of each step that is unusable. Once an older one is found good, such steps are moved
    to FOLDER.unusable/, since orbax would not save the steps that follow it otherwise.
    Metadata: step, config (for `build_config`), sharing, manifest, tokenizer, versions, leaves.
    Raises UserError if there are steps but none is usable, or if a step has other leaves, dtypes or shapes than
    `abstract_state`, or cannot be read for a reason of this machine; nothing is moved then. All processes must call it.
    """

    def select(meta: Meta) -> State:
        check(meta)
        _check_leaves(manager.directory / str(meta["step"]), meta, abstract_state)
        return abstract_state

    manager.wait_until_finished()
    found = _newest_usable(manager.directory, select, report)
    if found is None:
        return None
    if found.unusable:
        aside = _set_aside(manager, found.unusable)
        steps = ", ".join(str(step) for step in found.unusable)
        report(f"checkpoints: going back to step {found.meta['step']}; moved the unusable {steps} to {aside.name}/")
    return found.state, found.meta


def load(
    run_or_checkpoint: str | Path, *, report: Callable[[str], None] = print
) -> tuple[dict[str, Any], RunConfig, Tokenizer | None]:
    """Parameters, configuration and tokenizer of a run folder (its newest usable step) or of one checkpoint in it.

    run_or_checkpoint: RUN, which holds `checkpoints/`, or RUN/checkpoints/STEP. Nothing in it is changed, so a run that
    is being trained can be loaded. The parameters are verified and lie on this process' first device; the tokenizer is
    the one in RUN, None where there is none. `report` is told of steps passed over.
    Raises UserError if the folder is neither, or holds no usable checkpoint.
    """
    quieten_orbax()
    folder = _absolute(run_or_checkpoint)
    if (folder / "checkpoints").is_dir():
        run, found = folder, _newest_usable(folder / "checkpoints", _select_params, report)
        if found is None:
            raise UserError(f"{folder}: the run has no checkpoint yet; train it until its first save")
        state, meta = found.state, found.meta
    elif (folder / "meta").is_dir() or (folder / "params").is_dir():
        run = folder.parent.parent
        try:
            state, meta = _read_step(folder, _select_params)
        except _Unusable as problem:
            raise UserError(
                f"{folder}: {problem}; give another step, or the run folder for the newest good one"
            ) from problem
    else:
        raise UserError(
            f"{folder}: neither a run folder with checkpoints/ nor a checkpoint such as RUN/checkpoints/100"
        )
    config = build_config(RunConfig, meta["config"], f"{folder}: config of step {meta['step']}")
    from lckv_jax.data.tokenizer import find_tokenizer  # only here: models without text need no tokenizer library

    tokenizer = find_tokenizer(Path(os.fspath(run)))
    if tokenizer is not None and meta["tokenizer"] not in ("", tokenizer.fingerprint):
        raise UserError(f"what {run} holds is not the tokenizer that the run was trained with; put that one back")
    return state["params"], config, tokenizer


# ---------------------------------------------------------------- reading


def _newest_usable(folder: epath.Path, select: Callable[[Meta], State], report: Callable[[str], None]) -> _Found | None:
    """The newest step of `folder` that can be read; `select` as in `_read_step`."""
    unusable: dict[int, str] = {}
    for step in _steps(folder):
        try:
            return _Found(*_read_step(folder / str(step), select), tuple(unusable))
        except _Unusable as problem:
            report(f"checkpoints: step {step} is unusable: {problem}")
            unusable[step] = str(problem)
    if not unusable:
        return None
    newest = max(unusable)
    raise UserError(
        f"{folder}: none of its {len(unusable)} checkpoints is usable (step {newest}: {unusable[newest]}); "
        "put back a good copy of one, or move this folder away to start afresh"
    )


def _set_aside(manager: ocp.CheckpointManager, steps: tuple[int, ...]) -> epath.Path:
    """Moves steps out of the manager's sight, to a folder beside its own, which is returned."""
    aside = manager.directory.parent / f"{manager.directory.name}.unusable"
    if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        for step in steps:
            if (aside / str(step)).exists():
                (aside / str(step)).rmtree()  # the same step, damaged once before
            (manager.directory / str(step)).rename(aside / str(step))
    multihost_utils.sync_global_devices("unusable checkpoints are set aside")
    manager.reload()
    return aside


def _steps(folder: epath.Path) -> list[int]:
    """The steps in `folder`, newest first. An empty folder is no step."""
    paths = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted((int(path.name) for path in paths if path.is_dir() and any(path.iterdir())), reverse=True)


def _read_step(folder: epath.Path, select: Callable[[Meta], State]) -> tuple[State, Meta]:
    """The state and metadata in `folder`, verified; `select` gives the abstract state to read, from the metadata."""
    meta = _together(lambda: _read_meta(folder))
    abstract = select(meta)
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
    restored = _together(lambda: _read(folder, **items))
    state = {"params": restored["params"], **restored.get("rest", {})}
    wrong = [path for path, leaf in _describe(state).items() if leaf != meta["leaves"].get(path)]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise _Unusable(f"{wrong[0]}{others} differs from what was saved")
    return state, meta


def _read_meta(folder: epath.Path) -> Meta:
    meta = _read(folder, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict) or meta.pop("digest", None) != _digest(meta):
        raise _Unusable("its metadata differs from what was saved")
    return meta


def _read(folder: epath.Path, **items: Any) -> dict[str, Any]:
    """Items of one step. Each process reads alone, for in orbax' barriers the others would wait for one that fails."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
        return dict(checkpointer.restore(folder, args=ocp.args.Composite(**items)).items())


def _together(action: Callable[[], T]) -> T:
    """The result of `action`; if it fails in one process, all of them raise _Unusable."""
    result, problem = None, ""
    with reading_quietly():
        try:
            result = action()
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            if isinstance(_root(error), (MemoryError, jax.errors.JaxRuntimeError)):
                raise  # this machine's trouble, not the checkpoint's: it must not cost a step
            if isinstance(root := _root(error), OSError) and root.errno in _PASSING:
                raise UserError(
                    f"{root.filename or 'a checkpoint'} cannot be read: {root.strerror}; mend that and run again"
                ) from error
            logging.getLogger(__name__).debug("a checkpoint is unusable", exc_info=True)
            problem = _reason(error)
        if problem:
            gc.collect()  # coroutines that were never awaited warn when they are collected
    if not np.all(multihost_utils.process_allgather(np.array(not problem))):
        raise _Unusable(problem or "another process could not read it")
    return result  # pyright: ignore[reportReturnType]


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ else error


def _reason(error: Exception) -> str:
    if isinstance(error, _Unusable):
        return str(error)
    root = _root(error)
    text = f"{type(root).__name__}: {' '.join(str(root).split())}"
    return f"cannot be read ({text if len(text) <= 120 else text[:117] + '...'})"


def _select_params(meta: Meta) -> State:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
        for path, (dtype, shape, _) in meta["leaves"].items()
        if path.startswith("params.")
    }
    return traverse_util.unflatten_dict(leaves, sep=".")


def _check_leaves(folder: epath.Path, meta: Meta, abstract: State) -> None:
    """Raises UserError if the checkpoint has other leaves; orbax would cast dtypes in silence."""
    held = {path: f"{dtype}{shape}" for path, (dtype, shape, _) in meta["leaves"].items()}
    wanted = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in _by_path(abstract).items()}
    for path in sorted(held.keys() | wanted.keys()):
        if held.get(path) != wanted.get(path):
            raise UserError(
                f"{folder}: {path} is {held.get(path, 'absent')} there but {wanted.get(path, 'absent')} in this run; "
                "resume with the configuration of the checkpoint, or give another `out`"
            )


# ---------------------------------------------------------------- fingerprints


def _describe(tree: State) -> dict[str, list]:
    """For each leaf by path: dtype, shape and fingerprint, as JSON data."""
    leaves = _by_path(tree)
    prints = jax.device_get({path: _fingerprint(leaf) for path, leaf in leaves.items()})
    return {path: [str(leaf.dtype), list(leaf.shape), int(prints[path])] for path, leaf in leaves.items()}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """One uint32 of the bits of `x` and their places.

    A sum of integers has no order, so the value does not depend on mesh, sharding or number of processes. Every term
    is a bijection of its element, so a change of one element never goes unnoticed.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)  # 8 bytes: a last axis of 2
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(3266489917)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


def _by_path(tree: State) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _items(state: State) -> dict[str, Any]:
    """The state as it lies on disk: the parameters apart, so that they can be read alone."""
    rest = {name: tree for name, tree in state.items() if name != "params"}
    return {"params": state["params"]} | ({"rest": rest} if rest else {})


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- surroundings


def _absolute(folder: str | Path) -> epath.Path:
    """Orbax demands absolute paths; a bucket such as gs://bucket/run is one already."""
    text = os.fspath(folder)
    return epath.Path(text) if "://" in text else epath.Path(text).expanduser().absolute()


def _package_version() -> str:
    try:
        return importlib.metadata.version("lckv-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source"
