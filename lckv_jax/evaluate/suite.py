"""`evaluate --suite`: every entry of a suite under one checkpoint, one after the other; finished ones are kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lckv_jax.checkpoint import load_config_of, load_step, run_of
from lckv_jax.config import config_json
from lckv_jax.decode.bench_record import write_json
from lckv_jax.errors import UserError
from lckv_jax.evaluate.suite_config import SuiteConfig, load_suite
from lckv_jax.evaluate.suite_entries import Entry, Subject, check_subject, suite_entries
from lckv_jax.evaluate.suite_report import facts, now, one_line, write_report
from lckv_jax.fingerprint import describe_leaves
from lckv_jax.model.kernels import choose_backend
from lckv_jax.parallel.mesh import check_sizes, make_mesh, parameter_shardings
from lckv_jax.step_folder import digest
from lckv_jax.train.signals import stopping_at_once

_FORMAT = 1  # of the records of entries; another one measures them again


def evaluate_suite(checkpoint: str, path: str, overrides: Sequence[str] = ()) -> None:
    """Measures every entry of the suite that has no result yet; writes results.json and results.md.

    checkpoint: a run folder or RUN/checkpoints/STEP. Finished entries are kept whatever happens, in OUT/entries.
    Raises UserError for everything that the user can mend, most of it before any work; Stopped at SIGTERM.
    """
    wanted = load_suite(path, overrides)
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with stopping_at_once():
        folder = _writable(Path(wanted.out).expanduser() if wanted.out else run_of(checkpoint) / "evaluations")
        run, tokenizer = load_config_of(checkpoint)
        check_subject(wanted, run, tokenizer)
        entries = suite_entries(wanted, run, tokenizer)
        subject = _load(checkpoint, wanted, folder, console)
        if wanted.out is None:
            subject = subject._replace(folder=_writable(folder / f"{Path(path).stem}-{subject.step}"))
        averaged = ", averaged parameters" if run.train.ema_decay else ""
        say(f"{checkpoint}, step {subject.step}{averaged}: {len(entries)} entries, results in {_shown(subject.folder)}")
        say(choose_backend(subject.model)[1])
        told = facts(checkpoint, path, overrides, config_json(wanted), subject)
        done: list[dict[str, Any]] = []
        for record in _records(entries, subject, say):
            done.append(record)
            missing = [f"{entry.kind} {entry.name}" for entry in entries[len(done) :]]
            write_report(subject.folder, {**told, "missing": missing, "entries": done})
        say(f"wrote {_shown(subject.folder / 'results.json')} and {_shown(subject.folder / 'results.md')}")


def _load(checkpoint: str, wanted: SuiteConfig, folder: Path, console: Console) -> Subject:
    mesh = make_mesh(wanted.mesh)

    def place(run: Any) -> Any:
        check_sizes(run.model, mesh.shape["data"] * mesh.shape["fsdp"], mesh)
        return parameter_shardings(run.model, mesh)

    report = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    loaded = load_step(checkpoint, place=place, report=report)
    return Subject(
        params=loaded.params,
        run=loaded.config,
        tokenizer=loaded.tokenizer,
        step=loaded.step,
        fingerprint=digest(describe_leaves(loaded.params)),
        mesh=mesh,
        passes=wanted.passes,
        folder=folder,
        console=console,
    )


def _records(entries: Sequence[Entry], subject: Subject, say: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The record of each entry, measured now where there is none."""
    for number, entry in enumerate(entries, 1):
        identity = _identity(entry, subject)
        path = subject.folder / "entries" / f"{entry.kind}-{_slug(entry.name)}-{_hash(identity)[:12]}.json"
        record = _stored(path)
        kept = record is not None
        if record is None:
            if not subject.console.is_terminal:
                say(f"[{number}/{len(entries)}] {entry.kind} {entry.name} ...")
            started = time.monotonic()
            results = entry.measure(subject)
            seconds = round(time.monotonic() - started, 1)
            record = {**identity, "results": results, "seconds": seconds, "made": now()}
            _keep(path, record)
        say(f"[{number}/{len(entries)}] {one_line(record)}{' (kept from before)' if kept else ''}")
        yield record


def _identity(entry: Entry, subject: Subject) -> dict[str, Any]:
    """All that the numbers of an entry depend on, but for the code."""
    return {
        "format": _FORMAT,
        "kind": entry.kind,
        "name": entry.name,
        "settings": entry.settings,
        "data": entry.data,
        "passes": subject.passes,
        "checkpoint": subject.fingerprint,
        "step": subject.step,
        "model": config_json(subject.run.model),
        "tokenizer": None if subject.tokenizer is None else subject.tokenizer.fingerprint,
    }


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _stored(path: Path) -> dict[str, Any] | None:
    """The record of an entry; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _keep(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; mend that and run the same command again"
        ) from error


def _shown(path: Path) -> str:
    """The path as one would write it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _writable(folder: Path) -> Path:
    """The folder, made; that nothing can be written there is told before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; name another folder for the results, as in out=results"
        ) from error
    return folder
