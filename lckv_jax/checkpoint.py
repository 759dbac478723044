"""Checkpoints of a run: orbax writes them in the background, and every leaf is verified when it is read.

On disk: FOLDER/STEP/ with the items `params`, `ema` (their average, if the run keeps one), `rest` (of the train state)
and `meta` (JSON). Orbax sees to it that a step appears whole or not at all, but not that its bits stay: `meta` holds a
fingerprint of every leaf, and `checksums.json` a hash of every file that is not large.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from lckv_jax.checksums import write_checksums
from lckv_jax.config import RunConfig, build_config, config_json
from lckv_jax.errors import Stopped, UserError
from lckv_jax.fingerprint import describe_leaves, leaves_by_path
from lckv_jax.orbax_barrier import waiting
from lckv_jax.orbax_noise import draining_loops, quieten_orbax, reading_quietly, system_reason
from lckv_jax.parallel import processes
from lckv_jax.retention import Retention
from lckv_jax.step_folder import (
    Meta,
    NoneUsable,
    State,
    Unusable,
    agreed_steps,
    check_files,
    check_leaves,
    digest,
    has_checksums,
    list_steps,
    newest_usable,
    read_leaf,
    read_losses,
    read_meta,
    read_step,
    remove_leftovers,
    state_items,
)

if TYPE_CHECKING:
    from lckv_jax.data.tokenizer import Tokenizer


T = TypeVar("T")


class Stored(NamedTuple):
    """A checkpoint whose parameters lie on disk and are read one leaf at a time.

    meta: its metadata (see `restore`). run: the folder of its run. averaged: whether the parameters are the average
    that the run keeps. leaves: the shape and dtype of each by path, such as layers.wq. read: the leaf of a path,
    verified; raises Unusable if it is not what was saved.
    """

    meta: Meta
    config: RunConfig
    tokenizer: Tokenizer | None
    run: Path
    averaged: bool
    leaves: dict[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_checkpoints(folder: str | Path, keep: int, keep_best: int = 0) -> Iterator[ocp.CheckpointManager]:
    """The manager of the checkpoints in `folder`, which is made if it is absent; leaving waits for the save in flight.

    The newest `keep` steps stay, and the `keep_best` of the lowest validation loss (see `retention.steps_kept`).
    Removes what killed saves left behind, so only the one run that writes to `folder` may call it.
    Raises UserError if the folder cannot be made or read, or a save in flight fails for a reason of the system.
    """
    quieten_orbax()
    where = _absolute(folder)

    def before_commit() -> None:
        manager.check_for_errors()  # waits for metadata of the step that orbax writes in a thread of its own
        if has_checksums(where):
            write_checksums(Path(where))

    try:
        if jax.process_index() == 0 and where.exists():
            remove_leftovers(where)
        policy = Retention(keep, keep_best, read_losses(where))
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, async_options=waiting(before_commit))
        with reading_quietly():
            manager = ocp.CheckpointManager(where, options=options)
    except OSError as error:
        raise UserError(f"{where}: cannot hold checkpoints: {error.strerror or error}") from error
    with draining_loops():
        closes = True
        try:
            yield manager
        except BaseException as error:  # of several processes all end; a save may wait for one that waits for this one
            closes = processes.count() == 1 or isinstance(error, Stopped)
            raise
        finally:
            if closes:
                with _failures_told(manager):
                    manager.close()


def save(
    manager: ocp.CheckpointManager,
    state: State,
    config: RunConfig,
    *,
    manifest: str = "",
    tokenizer: str = "",
    tokens_seen: int | None = None,
    valid_loss: float | None = None,
) -> None:
    """Begins to save `state` as its step; returns when its buffers may be donated or changed.

    state: {"params": ..., "step": int32 scalar, ...}, every leaf a jax.Array without PRNG keys; all processes call it.
    manifest, tokenizer, tokens_seen: hash of the data manifest, fingerprint of the tokenizer, tokens trained on so far.
    They are kept in the metadata with `config`, for `restore` to hand back.
    valid_loss: the validation loss of this state, for retention; None or not finite = never best.
    Raises RuntimeError if orbax does not save, because this or a later step exists, and UserError if the system does
    not let it write. The write itself fails later: in the next `save`, in `finish_saving` or on closing.
    """
    step = int(state["step"])
    valid_loss = valid_loss if valid_loss is not None and math.isfinite(valid_loss) else None
    meta = {
        "step": step,
        "config": config_json(config),
        "sharing": str(config.model.sharing),
        "manifest": manifest,
        "tokenizer": tokenizer,
        "tokens_seen": tokens_seen,
        "valid_loss": valid_loss,
        "versions": {"lckv_jax": _package_version(), "jax": jax.__version__, "orbax": ocp.__version__},
        "leaves": describe_leaves(state),
        "checksums": has_checksums(manager.directory),  # whether a list of its files is committed with it
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in state_items(state).items()}
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta | {"digest": digest(meta)}))
    with _failures_told(manager):
        saved = manager.save(step, args=args, metrics={"valid_loss": valid_loss})  # these metrics stay in memory
    if not saved:
        raise RuntimeError(f"step {step} was not saved: {manager.directory} already holds step {manager.latest_step()}")


def finish_saving(manager: ocp.CheckpointManager) -> None:
    """Waits until the save in flight is on disk. Raises UserError if the system does not let it be written."""
    with _failures_told(manager):
        manager.wait_until_finished()


def newest_meta(folder: str | Path) -> Meta | None:
    """The metadata (see `restore`) of the newest step in `folder` whose metadata is whole; None if there is none."""
    quieten_orbax()
    where = _absolute(folder)
    for step in agreed_steps(where):
        try:
            return read_meta(where / str(step))
        except Unusable:
            continue  # `restore` tells of it
    return None


def restore(
    manager: ocp.CheckpointManager,
    abstract_state: State,
    *,
    check: Callable[[Meta], None] = lambda meta: None,
    report: Callable[[str], None] = print,
) -> tuple[State, Meta] | None:
    """The state and metadata of the newest step whose leaves and files are as they were; None if there is no step.

    abstract_state: the tree wanted, of jax.ShapeDtypeStruct with shardings; any mesh, not only that of the save.
    check: called with the metadata of a step before its arrays are read, to refuse it by raising.
    report: told in one line of each step that is unusable. Once an older one is found good, such steps are moved
    to FOLDER.unusable/, since orbax would not save the steps that follow it otherwise. If the files of every step
    differ, the newest whose leaves agree is taken.
    Metadata: step, config (for `build_config`), sharing, manifest, tokenizer, tokens_seen, valid_loss, versions,
    leaves, checksums; tokens_seen, valid_loss and checksums are absent from the oldest checkpoints.
    Raises UserError if there are steps but none is usable, or if a step has other leaves, dtypes or shapes than
    `abstract_state`, or cannot be read for a reason of this machine; nothing is moved then. All processes must call it.
    """

    def select(meta: Meta) -> State:
        check(meta)
        check_leaves(manager.directory / str(meta["step"]), meta, abstract_state)
        return abstract_state

    def read(step: epath.Path) -> tuple[State, Meta]:
        state, meta = read_step(step, select)
        check_files(step, meta)
        return state, meta

    finish_saving(manager)
    try:
        found = newest_usable(manager.directory, read, report)
    except NoneUsable:  # files that nobody needs may differ: better than nothing
        found = newest_usable(manager.directory, lambda step: read_step(step, select), lambda _: None)
        report("checkpoints: going on all the same from the newest step whose leaves are as they were saved")
    if found is None:
        return None
    (state, meta), unusable = found
    if unusable:
        aside = _set_aside(manager, unusable)
        steps = ", ".join(str(step) for step in unusable)
        report(f"checkpoints: going back to step {meta['step']}; moved the unusable {steps} to {aside.name}/")
    return state, meta


class Loaded(NamedTuple):
    """What `load_step` found. step: the one whose parameters they are."""

    params: dict[str, Any]
    config: RunConfig
    tokenizer: Tokenizer | None
    step: int


def load(
    run_or_checkpoint: str | Path, *, report: Callable[[str], None] = print
) -> tuple[dict[str, Any], RunConfig, Tokenizer | None]:
    """Parameters, configuration and tokenizer of a run folder (its newest usable step) or of one checkpoint in it.

    run_or_checkpoint: RUN, which holds `checkpoints/`, or RUN/checkpoints/STEP. Nothing in it is changed, so a run that
    is being trained can be loaded. The parameters, or their average where the run keeps one (train.ema_decay), are
    verified and lie on this process' first device; the tokenizer is the one in RUN, None where there is none. `report`
    is told of steps passed over.
    Raises UserError if the folder is neither, or holds no usable checkpoint.
    """
    loaded = load_step(run_or_checkpoint, report=report)
    return loaded.params, loaded.config, loaded.tokenizer


def load_step(
    run_or_checkpoint: str | Path,
    *,
    place: Callable[[RunConfig], Any] | None = None,
    report: Callable[[str], None] = print,
) -> Loaded:
    """As `load`, with the step, and with the parameters where the caller wants them.

    place: from the configuration of the checkpoint, the shardings of its parameters, in the shape of their tree. It is
    called before any array is read, and may refuse the checkpoint by raising. All processes call it then.
    """
    run = run_of(run_or_checkpoint)

    def select(meta: Meta) -> State:
        return _select_params(meta, place and place(_config_of(run_or_checkpoint, meta)))

    state, meta = _use_newest(run_or_checkpoint, lambda step: read_step(step, select), report)
    tokenizer = _load_tokenizer(run, meta["tokenizer"])
    return Loaded(
        state.get("ema", state.get("params", {})), _config_of(run_or_checkpoint, meta), tokenizer, meta["step"]
    )


def load_config_of(run_or_checkpoint: str | Path) -> tuple[RunConfig, Tokenizer | None]:
    """The configuration and tokenizer that `load` would give, without reading an array; raises as it does.

    In a run folder they are those of the newest step whose metadata is whole.
    """
    run = run_of(run_or_checkpoint)
    meta = _use_newest(run_or_checkpoint, read_meta, report=lambda _: None)
    return _config_of(run_or_checkpoint, meta), _load_tokenizer(run, meta["tokenizer"])


def stream(run_or_checkpoint: str | Path, use: Callable[[Stored], T], *, report: Callable[[str], None] = print) -> T:
    """What `use` makes of a checkpoint, chosen as `load` does, without ever holding all of its parameters.

    Where `use` meets a damaged leaf, it is left by `Unusable`, which it must let through after undoing what it did; in
    a run folder it is then called again with the next older step. Raises UserError as `load` does.
    """
    run = run_of(run_or_checkpoint)

    def use_step(folder: epath.Path) -> T:
        meta = read_meta(folder)
        config = _config_of(run_or_checkpoint, meta)
        (item, tree), *_ = _select_params(meta).items()
        leaves = leaves_by_path(tree)

        def read(path: str) -> np.ndarray:
            return read_leaf(folder, meta, f"{item}.{path}")

        return use(Stored(meta, config, _load_tokenizer(run, meta["tokenizer"]), run, item == "ema", leaves, read))

    return _use_newest(run_or_checkpoint, use_step, report)


def run_of(run_or_checkpoint: str | Path) -> Path:
    """The folder of a run or of the run of a checkpoint. Raises UserError if it is neither."""
    folder = _absolute(run_or_checkpoint)
    if (folder / "checkpoints").is_dir():
        return Path(os.fspath(folder))
    if (folder / "meta").is_dir() or (folder / "params").is_dir():
        return Path(os.fspath(folder.parent.parent))
    if (folder / "config.json").exists() and next(folder.glob("*.safetensors"), None) is not None:
        raise UserError(f"{folder} is a Hugging Face folder; `import` it first, and give what that makes of it")
    raise UserError(f"{folder}: neither a run folder with checkpoints/ nor a checkpoint such as RUN/checkpoints/100")


def _config_of(run_or_checkpoint: str | Path, meta: Meta) -> RunConfig:
    return build_config(RunConfig, meta["config"], f"{run_or_checkpoint}: config of step {meta['step']}")


def _load_tokenizer(run: Path, fingerprint: str) -> Tokenizer | None:
    """The tokenizer in a run folder, None if it has none. Raises UserError if it is not the one of the checkpoint."""
    from lckv_jax.data.tokenizer import find_tokenizer  # only here: models without text need no tokenizer library

    tokenizer = find_tokenizer(run)
    if tokenizer is not None and fingerprint not in ("", tokenizer.fingerprint):
        raise UserError(f"what {run} holds is not the tokenizer that the run was trained with; put that one back")
    return tokenizer


@contextlib.contextmanager
def _failures_told(manager: ocp.CheckpointManager) -> Iterator[None]:
    """What the system has against a save becomes a UserError that names the newest good checkpoint."""
    try:
        yield
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        steps = list_steps(manager.directory)
        kept = f"the last good one is of step {steps[0]}" if steps else "there is none yet"
        raise UserError(
            f"{manager.directory}: a checkpoint could not be written: {reason}; {kept}; mend that and run the same "
            "command again"
        ) from error


# ---------------------------------------------------------------- reading


def _use_newest(run_or_checkpoint: str | Path, use: Callable[[epath.Path], T], report: Callable[[str], None]) -> T:
    """What `use` makes of the folder of one step: of the newest of a run for which it does not raise Unusable."""
    quieten_orbax()
    folder = _absolute(run_or_checkpoint)
    if (folder / "checkpoints").is_dir():
        found = newest_usable(folder / "checkpoints", use, report)
        if found is None:
            raise UserError(f"{folder}: the run has no checkpoint yet; train it until its first save")
        return found[0]
    try:
        return use(folder)
    except Unusable as problem:
        raise UserError(
            f"{folder}: {problem}; give another step, or the run folder for the newest good one"
        ) from problem


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


def _select_params(meta: Meta, shardings: Any = None) -> State:
    """The parameters to evaluate: their average where the run keeps one. shardings: None = on the first device."""
    wanted = "ema." if any(path.startswith("ema.") for path in meta["leaves"]) else "params."
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    lies = {} if shardings is None else leaves_by_path(shardings)
    leaves = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=lies.get(path.removeprefix(wanted), device))
        for path, (dtype, shape, _) in meta["leaves"].items()
        if path.startswith(wanted)
    }
    return traverse_util.unflatten_dict(leaves, sep=".")


def _absolute(folder: str | Path) -> epath.Path:
    """Orbax demands absolute paths; a bucket such as gs://bucket/run is one already."""
    text = os.fspath(folder)
    return epath.Path(text) if "://" in text else epath.Path(text).expanduser().absolute()


def _package_version() -> str:
    try:
        return importlib.metadata.version("lckv-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source"
