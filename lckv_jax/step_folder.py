"""One step on disk: which there are, what they hold, and reading one so that every leaf is verified."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from lckv_jax.checksums import find_damage
from lckv_jax.errors import UserError
from lckv_jax.fingerprint import describe_leaves, host_fingerprint, leaves_by_path
from lckv_jax.orbax_noise import reading_quietly
from lckv_jax.parallel import processes

# Why a file cannot be read although it may be whole.
_PASSING = {errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
_LARGE = 2**20  # elements of a leaf that may have to wait for memory

State = dict[str, Any]
Meta = dict[str, Any]
T = TypeVar("T")


class Unusable(Exception):
    """Why a checkpoint cannot be used, in a few words."""


class NoneUsable(UserError):
    """There are checkpoints, but none that can be used."""


def list_steps(folder: epath.Path) -> list[int]:
    """The steps in `folder`, newest first. An empty folder is no step."""
    paths = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted((int(path.name) for path in paths if path.is_dir() and any(path.iterdir())), reverse=True)


def remove_leftovers(folder: epath.Path) -> None:
    """Removes what killed or failed saves left; orbax would too, but in the background, while the disk may be full."""
    for path in folder.iterdir():
        if path.name.endswith(ocp.utils.TMP_DIR_SUFFIX):
            path.rmtree()
        elif path.name.isdecimal() and not any(path.iterdir()):
            path.rmdir()  # orbax would take it for a step


def agreed_steps(folder: epath.Path) -> list[int]:
    """The steps that process 0 finds in `folder`, in every process; none if it is not there.

    Another host may still see what was there a minute ago, and a run that is being trained may save a step between two
    looks: processes that went on from different steps would not notice.
    """
    found = processes.from_first("steps", lambda: json.dumps(list_steps(folder) if folder.is_dir() else []))
    return json.loads(found)


def newest_usable(
    folder: epath.Path, use: Callable[[epath.Path], T], report: Callable[[str], None]
) -> tuple[T, tuple[int, ...]] | None:
    """What `use` makes of the newest step in `folder` for which it does not raise Unusable, and the newer steps.

    A run that is being trained may save steps and remove others meanwhile.
    """
    unusable: dict[int, str] = {}
    gone: set[int] = set()
    while left := [step for step in agreed_steps(folder) if step not in unusable and step not in gone]:
        step = left[0]
        try:
            return use(folder / str(step)), tuple(unusable)
        except Unusable as problem:
            if step not in agreed_steps(folder):
                gone.add(step)
                continue
            report(f"checkpoints: step {step} is unusable: {problem}")
            unusable[step] = str(problem)
    if not unusable:
        return None
    newest = max(unusable)
    raise NoneUsable(
        f"{folder}: none of its {len(unusable)} checkpoints is usable (step {newest}: {unusable[newest]}); "
        "put back a good copy of one, or move this folder away to start afresh"
    )


def read_losses(folder: epath.Path) -> dict[int, float | None]:
    """The validation loss of each step in `folder`; None where the metadata has none or is damaged."""
    found: dict[int, float | None] = {}
    for step in agreed_steps(folder):
        try:
            found[step] = read_meta(folder / str(step)).get("valid_loss")
        except Unusable:
            found[step] = None
    return found


def state_items(state: State) -> dict[str, Any]:
    """The state as it lies on disk: parameters, and their average, apart, so that they can be read alone."""
    apart = {name: tree for name, tree in state.items() if name in ("params", "ema")}
    rest = {name: tree for name, tree in state.items() if name not in apart}
    return apart | ({"rest": rest} if rest else {})


def digest(meta: Mapping[str, Any]) -> str:
    """Hex sha256 of metadata, which guards it as the fingerprints guard the leaves."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_step(folder: epath.Path, select: Callable[[Meta], State]) -> tuple[State, Meta]:
    """The state and metadata in `folder`, verified; `select` gives the abstract state to read, from the metadata.

    Raises Unusable if they are not what was saved, and UserError if that may be this machine's fault.
    """
    meta = read_meta(folder)
    abstract = select(meta)
    _check_width(folder, [meta["leaves"].get(path, [""])[0] for path in leaves_by_path(abstract)])
    items = {name: ocp.args.StandardRestore(tree) for name, tree in state_items(abstract).items()}
    restored = _together(lambda: _read(folder, **items))
    rest = restored.pop("rest", {})
    state = {**restored, **rest}
    wrong = [path for path, leaf in describe_leaves(state).items() if leaf != meta["leaves"].get(path)]
    others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    _agree(f"{wrong[0]}{others} differs from what was saved" if wrong else "")
    return state, meta


def check_leaves(folder: epath.Path, meta: Meta, abstract: State) -> None:
    """Raises UserError if a step has other leaves than `abstract`; orbax would cast dtypes in silence."""
    held = {path: f"{dtype}{shape}" for path, (dtype, shape, _) in meta["leaves"].items()}
    wanted = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(abstract).items()}
    for path in sorted(held.keys() | wanted.keys()):
        if held.get(path) != wanted.get(path):
            raise UserError(
                f"{folder}: {path} is {held.get(path, 'absent')} there but {wanted.get(path, 'absent')} in this run; "
                "resume with the configuration of the checkpoint, or give another `out`"
            )


def has_checksums(folder: epath.Path) -> bool:
    """Whether steps that are saved here have a list of their files: not in buckets."""
    return "://" not in os.fspath(folder)


def check_files(folder: epath.Path, meta: Meta) -> None:
    """Raises Unusable if a file of a step is not as it was saved, also one that no reader needs; meta: of the step.

    Steps that have no list of their files pass, as those of older versions. Raises UserError as `read_step`.
    """

    def check() -> None:
        damage = find_damage(Path(folder)) if meta.get("checksums") and jax.process_index() == 0 else ""
        if damage:
            raise Unusable(damage)

    _together(check)


def read_leaf(folder: epath.Path, meta: Meta, path: str) -> np.ndarray:
    """The one leaf at `path`, such as params.layers.wq, in host memory and verified; meta: that of the step.

    Raises as `read_step`.
    """
    dtype, shape, _ = meta["leaves"][path]
    _check_width(folder, [dtype])
    tree = state_items(traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype)}, sep="."))
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    items = {
        name: ocp.args.PyTreeRestore(part, restore_args=on_host[name], partial_restore=True)
        for name, part in tree.items()
    }
    if math.prod(shape) >= _LARGE:
        gc.collect()  # orbax' own cycles keep the leaf that was read before
    leaf = leaves_by_path(_together(lambda: _read(folder, **items)))[path]
    if [str(leaf.dtype), list(leaf.shape), host_fingerprint(leaf)] != meta["leaves"][path]:
        raise Unusable(f"{path} differs from what was saved")
    return leaf


def _check_width(folder: epath.Path, dtypes: list[str]) -> None:
    """Raises UserError for dtypes that jax would narrow, so that they would pass for damage."""
    wide = [dtype for dtype in dtypes if dtype.endswith("64")]
    if wide and not jax.config.read("jax_enable_x64"):
        raise UserError(f"{folder} holds {wide[0]} numbers; set JAX_ENABLE_X64=1 in the environment to read them")


def read_meta(folder: epath.Path) -> Meta:
    """The metadata alone; raises as `read_step`."""
    return _together(lambda: _read_meta(folder))


def _read_meta(folder: epath.Path) -> Meta:
    meta = _read(folder, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict) or meta.pop("digest", None) != digest(meta):
        raise Unusable("its metadata differs from what was saved")
    return meta


def _read(folder: epath.Path, **items: Any) -> dict[str, Any]:
    """Items of one step. Each process reads alone, for in orbax' barriers the others would wait for one that fails."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
        return dict(checkpointer.restore(folder, args=ocp.args.Composite(**items)).items())


def _together(action: Callable[[], T]) -> T:
    """The result of `action`; if it fails in one process, all of them raise Unusable."""
    result, problem = None, ""
    with reading_quietly():
        try:
            result = action()
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            if isinstance(_root(error), (MemoryError, jax.errors.JaxRuntimeError)):
                raise  # this machine's trouble, not the checkpoint's: it must not cost a step
            _raise_if_passing(error)
            logging.getLogger(__name__).debug("a checkpoint is unusable", exc_info=True)
            problem = _reason(error)
        if problem:
            gc.collect()  # coroutines that were never awaited warn when they are collected
    _agree(problem)
    return result  # pyright: ignore[reportReturnType]


def _agree(problem: str) -> None:
    """Raises Unusable in all processes if one of them has a problem: each may have read bytes of its own."""
    if not np.all(multihost_utils.process_allgather(np.array(not problem))):
        raise Unusable(problem or "another process could not read it")


def _raise_if_passing(error: Exception) -> None:
    # a function of its own: a local there would keep, by its traceback, the state that was read in memory
    root = _root(error)
    if isinstance(root, OSError) and root.errno in _PASSING:
        raise UserError(
            f"{root.filename or 'a checkpoint'} cannot be read: {root.strerror}; mend that and run again"
        ) from error


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ else error


def _reason(error: Exception) -> str:
    if isinstance(error, Unusable):
        return str(error)
    root = _root(error)
    text = f"{type(root).__name__}: {' '.join(str(root).split())}"
    return f"cannot be read ({text if len(text) <= 120 else text[:117] + '...'})"
