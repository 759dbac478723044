"""`bench`: what sharing buys at inference, one process for each cell of maps x caches x lengths x batches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lckv_jax.decode.bench_config import BenchConfig, load_bench_config
from lckv_jax.decode.bench_record import PEERS, Cell, Decoder, Identity, cores, write_json
from lckv_jax.decode.bench_table import one_line, table
from lckv_jax.errors import Stopped, UserError
from lckv_jax.model.transformer import check_dtype
from lckv_jax.sharing import KVSharing

_MEMORY_SHARE = 0.92  # of an accelerator, unless the environment says another one
_FRACTION, _OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_PATIENCE = 10.0  # seconds for a stopped process to end
_BUSY = 0.5  # load of a core by others, above which times are doubtful


def cells(config: BenchConfig) -> dict[str, Cell]:
    """The cells by their keys: a readable name, and a hash of everything that a cell depends on."""
    found = {}
    grid = itertools.product(config.lengths, config.caches, config.maps, config.batches, config.passes)
    for (prompt, new), cache, name, batch, passes in grid:
        sharing = config.maps[name]
        if passes != config.passes[0] and not sharing.cyclic:
            continue  # one pass, whatever it says
        decoders: tuple[Decoder, ...] = ("lckv_jax",)
        if config.peers and _is_standard(sharing) and cache == "full" and batch != "largest":
            decoders += PEERS
        for decoder in decoders:
            identity = Identity(
                model=name,
                decoder=decoder,
                sharing=str(sharing),
                cache=cache,
                dtype=config.model.dtype,
                prompt=prompt,
                new=new,
                batch=batch,
                passes=passes,
                memory_cap_bytes=None if config.memory_gb is None else round(config.memory_gb * 1e9),
            )
            cell = Cell(
                identity=identity,
                model=config.model.model_copy(update={"sharing": sharing}),
                repeats=config.repeats,
                bucket=config.bucket,
                sample=config.sample,
                seed=config.seed,
            )
            found[_key(cell)] = cell
    return found


def _is_standard(sharing: KVSharing) -> bool:
    return sharing == KVSharing.parse("standard", sharing.num_layers)


def _key(cell: Cell) -> str:
    wanted = cell.identity
    parts = [wanted.model, wanted.cache, f"{wanted.prompt}+{wanted.new}", f"b{wanted.batch}"]
    if wanted.decoder != "lckv_jax":
        parts.append(wanted.decoder)
    if wanted.passes != "trained":
        parts.append(f"passes-{wanted.passes}")
    slug = "--".join(re.sub(r"(?:[^\w.+]|\+(?!\d))+", "-", part).strip("-") for part in parts)
    return f"{slug}--{hashlib.sha256(cell.model_dump_json().encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------- the command


def bench(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Measures every cell of the config that has no result yet; prints a table, writes results.json and plots.

    Finished cells are kept whatever happens; those that ended in an error are tried again. Raises UserError for what
    the user can mend, before any cell runs, and at the end if cells have no numbers, such as batches that do not fit;
    Stopped at SIGTERM.
    """
    config = load_bench_config(path, overrides)
    check_dtype(config.model)
    if config.peers:
        _check_peers()
    wanted = cells(config)
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    folder = _folder(config.out)
    records = {key: record for key in wanted if (record := _stored(folder, key)) and record["error"] is None}
    todo = [key for key in wanted if key not in records]
    say(f"{config.out}: {len(wanted)} cells, {len(records)} of them done; random weights, {config.model.dtype}")
    if todo:
        _tell_load(say)
        machine = _machine()
        _check_machine(config, machine, records)
        say(f"{machine['device']}, {machine['memory_bytes'] / 1e9:.1f} GB")
        with _stopping(lambda: f"{len(records)} of {len(wanted)} cells are kept in {config.out}"):
            for key in _told(todo, console):
                record = _measured(wanted[key], folder / "cells" / key, machine)
                records[key] = record
                say(one_line(record))
                _write_results(folder, config, [records[key] for key in wanted if key in records])
    done = [records[key] for key in wanted]
    _write_results(folder, config, done)
    for line in table(done):
        say(line)
    say(f"wrote {folder / 'results.json'}")
    _plot(done, folder, say)
    lost = [record for record in done if record["error"]]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(wanted)} cells have no numbers, the first is {one_line(lost[0]).strip()}; the others "
            "are kept, and the same command tries these again"
        )


def _folder(out: str) -> Path:
    folder = Path(out).expanduser()
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}; name another folder") from error
    return folder


def _check_peers() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"peers=true measures transformers, but there is no {' and no '.join(missing)} here; install "
            "lckv-jax[torch], or leave peers out"
        )


def _stored(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a cell; None if there is none that can be read."""
    try:
        return json.loads((folder / "cells" / f"{key}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _check_machine(config: BenchConfig, machine: dict[str, Any], records: dict[str, Any]) -> None:
    if config.memory_gb is not None and config.memory_gb * 1e9 > machine["memory_bytes"]:
        has = f"{machine['memory_bytes'] / 1e9:.1f} GB"
        raise UserError(f"memory_gb={config.memory_gb:g} is more than {machine['device']} has, {has}; give less")
    if config.memory_gb is not None and config.peers and machine["platform"] == "cpu":
        raise UserError("memory_gb: torch caps the memory of GPUs only; leave out memory_gb, or peers")
    for record in records.values():
        there = record["facts"]["device"]
        if record["identity"]["decoder"] == "lckv_jax" and there != machine["device"]:
            raise UserError(
                f"{config.out} has cells measured on {there}, but this is {machine['device']}; give another out"
            )


def _tell_load(say: Callable[[str], None]) -> None:
    """Warns where the processor is busy already."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return  # a platform that does not know
    if load > _BUSY * cores():
        say(
            f"other programs use this machine (load {load:.1f} on {cores()} cores): times will be too long, and cells "
            "measured now are kept, so run it alone"
        )


def _write_results(folder: Path, config: BenchConfig, records: list[dict[str, Any]]) -> None:
    settings = json.loads(config.model_dump_json(exclude={"model": {"sharing"}}))
    write_json(folder / "results.json", {"config": settings, "cells": records})


def _plot(records: list[dict[str, Any]], folder: Path, say: Any) -> None:
    from lckv_jax.decode.bench_plots import plot

    for drawn in plot(records, folder):
        say(f"wrote {drawn}")


def _told(keys: list[str], console: Console) -> Iterator[str]:
    """The keys, with a progress bar and the time that is left; without a terminal a line before each."""
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(keys))
        for number, key in enumerate(keys):
            name = key.rpartition("--")[0]
            seconds = time.monotonic() - started
            left = f", about {_duration(seconds / number * (len(keys) - number))} left" if number else ""
            if not console.is_terminal:
                console.print(f"[{number + 1}/{len(keys)}{left}] {name}", markup=False, highlight=False, soft_wrap=True)
            bar.update(task, completed=number, description=name + left)
            yield key


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def _stopping(kept: Any) -> Iterator[None]:
    """SIGTERM raises Stopped, which says what is kept."""

    def stop(*_: Any) -> None:
        raise Stopped(f"stopped by SIGTERM; {kept()}: the same command goes on from there")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# ---------------------------------------------------------------- processes


def _machine() -> dict[str, Any]:
    """What the cells will run on, from a process that asks: one that measures must find the memory free."""
    environment = _environment() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", _FRACTION: "1.0"}
    command = [sys.executable, "-m", "lckv_jax.decode.bench_cell", "--machine"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no device to measure: {_last_line(done.stderr)}; check JAX_PLATFORMS and the installed jax")
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """Ours, in which this package is found from every folder, and jax's memory fraction by its newer name only: jax
    refuses both at once."""
    root = str(Path(__file__).resolve().parents[2])
    ours = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    fraction = ours.pop(_OLD_FRACTION, None)
    return ours if fraction is None else {_FRACTION: fraction, **ours}


def _measured(cell: Cell, stem: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The record of the cell, which a process of its own writes to STEM.json. What it says besides is in STEM.log."""
    asked, result, log = (stem.with_name(f"{stem.name}{ending}") for ending in (".cell.json", ".json", ".log"))
    ours = cell.identity.decoder == "lckv_jax"
    asked.write_text(cell.model_dump_json(indent=1), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = _environment()
    if machine["platform"] == "cpu" and not ours:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # torch would take a GPU that jax does not use
    if machine["platform"] != "cpu":
        cap = cell.identity.memory_cap_bytes
        share = min(_MEMORY_SHARE, cap / machine["memory_bytes"]) if cap else _MEMORY_SHARE
        environment[_FRACTION] = f"{share:.4f}" if cap else environment.get(_FRACTION, str(share))
    module = "lckv_jax.decode." + ("bench_cell" if ours else "peers")
    with log.open("w", encoding="utf-8") as output:
        code = _run([sys.executable, "-m", module, str(asked), str(result)], environment, output)
    record = _stored(stem.parent.parent, stem.name) if code == 0 else None
    there = machine["device"] if record is None else record["facts"]["device"]
    if record is None or there != machine["device"]:
        why = f"killed by signal {-code}, as for want of memory" if code < 0 else _last_line(log.read_text("utf-8"))
        why = why if record is None else f"ran on {there}, not on {machine['device']}; install a build for that"
        error = f"failed: {why} (see {log})"
        record = {"identity": cell.identity.model_dump(), "facts": {"device": machine["device"]}, "results": None,
                  "error": error}  # fmt: skip
        write_json(result, record)
    else:
        log.unlink()
        asked.unlink()
    return record


def _run(command: list[str], environment: dict[str, str], output: Any) -> int:
    """The exit code of a process, which does not outlive this call."""
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
