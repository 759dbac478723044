"""The processes of one run: how they start, agree, fail and end together.

JAX' distributed runtime connects them. It notices a process that dies, but neither one that fails (whose interpreter
waits for the others before it ends) nor one that hangs; so a failure is told to all through the runtime's key-value
store. (Against hanging: watchdog.py.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the key-value store has no public name

from lckv_jax.config import ProcessesConfig
from lckv_jax.errors import BUG, MISTAKE, PEER_FAILED, UserError
from lckv_jax.parallel.identity import ALONE, Flags, Identity, identify, is_on_tpu, visible_gpus

_ENDED = "lckv_jax/ended"  # key: exit code, a space, and why; what comes first counts
_HEARD = "lckv_jax/heard"  # key of each process that knows of it
_POLL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 2.0
_LAST_BREATH_SECONDS = 0.5  # between hearing of it and being gone; JAX aborts whom process 0 leaves before
_OF_THE_PROGRAM = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE")  # another try fails too
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")  # JAX may raise ValueError
_LONG_MS = 7 * 86400 * 1000  # for what another process does: if it fails or dies, this one ends too


class _Joined(NamedTuple):
    listener: threading.Thread
    leaving: threading.Event  # the process tells or does by itself what the listener would


_joined: _Joined | None = None
_fatal: list[Path] = []  # where to write why the run failed, while its folder is held


def start(flags: Flags, config: ProcessesConfig) -> Identity:
    """Joins the processes of this run, if there are several; called before anything touches a device.

    From then on an exception that nobody catches ends all processes, with its traceback; see `leave` for the codes.
    Raises UserError if the processes cannot be told or cannot meet.
    """
    identity = identify(flags, os.environ, visible_gpus(os.environ), is_on_tpu(os.environ))
    if identity.processes == 1:
        return identity
    if not getattr(jax.config, "jax_enable_preemption_service"):  # noqa: B009 - the type checker does not know it
        raise UserError("JAX_ENABLE_PREEMPTION_SERVICE is false, but SIGTERM is told to all processes by it; unset it")
    with _bounded(identity, config):
        try:
            jax.distributed.initialize(
                identity.coordinator,
                identity.processes,
                identity.process,
                local_device_ids=identity.local_devices,
                cluster_detection_method="deactivate" if identity.coordinator else None,
                initialization_timeout=round(config.initialize_seconds) + 60,  # ours comes first, with a sentence
                heartbeat_timeout_seconds=round(config.heartbeat_seconds),
                shutdown_timeout_seconds=round(config.shutdown_seconds),
            )
        except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
            if identity.how == "TPU" and distributed.global_state.coordinator_address is None:
                return ALONE  # a TPU that no cluster of JAX' own knows, as in a notebook
            raise UserError(
                f"process {_text(identity.process)} cannot meet the others at {_text(identity.coordinator)} "
                f"({identity.how}): {' '.join(str(error).split())[:200]}; is that the address of process 0, and the "
                "port free?"
            ) from error
    if (distributed.global_state.num_processes or 1) > 1:
        _listen()
        sys.excepthook = _end_all
    return identity


def _text(value: object) -> str:
    return "?" if value is None else str(value)


@contextlib.contextmanager
def _bounded(identity: Identity, config: ProcessesConfig) -> Iterator[None]:
    """Ends the process with a sentence if the others do not come; JAX would abort it with a stack."""

    def give_up() -> None:
        address = identity.coordinator or distributed.global_state.coordinator_address
        unknown = "" if address is None or _is_known(address) else ", a name that is not known here"
        print(
            f"error: process {_text(identity.process)} waited {config.initialize_seconds:g} s for all "
            f"{_text(identity.processes)} processes to meet at {_text(address)}{unknown} ({identity.how}); see that "
            "each was started, with that address, and can reach it, or raise processes.initialize_seconds",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_FAILED)

    timer = threading.Timer(config.initialize_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_known(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        return bool(socket.getaddrinfo(host.strip("[]"), int(port)))
    except OSError:
        return False


def count() -> int:
    """How many processes this run has."""
    return (distributed.global_state.num_processes or 1) if _joined else 1


def index() -> int:
    """The number of this process."""
    return (distributed.global_state.process_id or 0) if _joined else 0


# ---------------------------------------------------------------- failing and ending


def _listen() -> None:
    """Starts the thread that ends this process once another one has failed."""
    global _joined
    leaving = threading.Event()

    def wait() -> None:
        while not leaving.wait(_POLL_SECONDS):
            ended = _ended()
            if ended is not None and not leaving.is_set():
                _follow(*ended)

    listener = threading.Thread(target=wait, name="failures of other processes", daemon=True)
    _joined = _Joined(listener, leaving)
    listener.start()


def _ended() -> tuple[int, str] | None:
    """The exit code and words of the process that ended this run, if one did."""
    try:
        code, _, why = _client().key_value_try_get(_ENDED).partition(" ")
    except jax.errors.JaxRuntimeError:  # there is no such key, or no process 0 any more, of which JAX tells
        return None
    return int(code), why


def _follow(code: int, why: str, silent: bool = False) -> NoReturn:
    """Ends as another process did; silent: this one has the same to say."""
    if not silent:
        _tell(f"process {index()} ends: {why}")
    _exit_when_heard(code)


def _tell(sentence: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, or a reader that is gone, must not keep the process
        print(sentence, file=sys.stderr, flush=True)


def _exit_when_heard(code: int) -> NoReturn:
    """Ends the process; process 0 once the others know why, for the store ends with it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no process 0 any more
        _client().key_value_set(f"{_HEARD}/{index()}", "")
    if index() == 0:
        _wait_until_heard()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, which would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _end_all(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What Python does with an exception that nobody caught, for all processes."""
    _tell("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
    lost = _is_of_runtime(error)
    if lost:
        time.sleep(_LAST_WORDS_SECONDS)  # a collective that failed because a peer did: its own words may come
        if _ended() is None:
            _tell(f"process {index()} ends: it lost another process, or a collective failed; who died first says why")
    leave(PEER_FAILED if lost else BUG, f"{kind.__name__}: {' '.join(str(error).split())[:300]}", told=True)


def _is_of_runtime(error: BaseException) -> bool:
    """Whether a collective failed, or whatever else in the runtime that is not the program's own fault."""
    if isinstance(error, TimeoutError):
        return True  # orbax waited for the others, by a clock that may have been set ahead
    if isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and _STATUS.match(str(error))):
        return not str(error).startswith(_OF_THE_PROGRAM)
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_of_runtime(cause)


def leave(code: int, why: str, *, told: bool = False) -> NoReturn:
    """Ends this process with `code`, and all others of the run within 2 seconds, with the same one.

    why: what this one prints, unless it has `told` it, and the others, unless they have met the same. If another
    process ended the run first, its code and words count.
    """
    if _joined is None:
        _exit(code)
    _joined.leaving.set()
    me = f"process {index()} on {socket.gethostname()}"
    said = f"{me} failed: {why}"
    first = _ended()
    if first is not None and why in first[1]:  # all have met the same
        _follow(*first, silent=True)
    if not told:
        _tell(f"error: {me}: {why}")
    if first is not None:
        _follow(*first)
    if code in (BUG, MISTAKE):
        for path in _fatal:
            with contextlib.suppress(OSError):
                path.write_text(said + "\n", encoding="utf-8")
    try:
        _client().key_value_set(_ENDED, f"{code} {said}")
    except jax.errors.JaxRuntimeError:  # set by another one meanwhile, or no process 0 any more
        code, _ = _ended() or (code, "")
    _exit_when_heard(code)


def _wait_until_heard() -> None:
    until = time.monotonic() + _LAST_WORDS_SECONDS
    for process in range(1, count()):
        left = max(1, round(1000 * (until - time.monotonic())))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().blocking_key_value_get(f"{_HEARD}/{process}", left)
    time.sleep(_LAST_BREATH_SECONDS)


def end() -> None:
    """Leaves the run in order: every process calls it, and waits until all do."""
    global _joined
    if _joined is None:
        return
    wait_for_all("end")  # however long one takes; if it fails instead, the listener still hears of it
    _joined.leaving.set()
    _joined.listener.join()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one that is gone by now has nothing to say
        jax.distributed.shutdown()
    _joined = None


@contextlib.contextmanager
def fatal_told_in(folder: Path) -> Iterator[None]:
    """While it lasts, a failure that a repetition would meet again is written to FOLDER/FATAL, for launchers.

    One that an earlier start has left is removed.
    """
    path = folder / "FATAL"
    if index() == 0:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    _fatal.append(path)
    yield  # not undone by an exception: that is what it is for
    _fatal.remove(path)


# ---------------------------------------------------------------- agreeing


def _client() -> Any:
    return distributed.global_state.client


_rounds: dict[str, int] = {}  # how often each thing was agreed on: keys are used once


def _round(name: str) -> str:
    _rounds[name] = _rounds.get(name, 0) + 1
    return f"lckv_jax/{name}/{_rounds[name]}"


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if count() > 1:
        _client().wait_at_barrier(_round(name), _LONG_MS)


def compile_together(function: jax.stages.Wrapped, *arguments: Any) -> None:
    """Compiles a program before its first call, in every process, and returns when all have.

    A process that compiles longer than the others would be missed by them in the program's first collective, whose
    transport waits for 30 seconds only.
    """
    if count() > 1:
        function.lower(*arguments).compile()
        wait_for_all("compiled")


def from_first(name: str, make: Callable[[], str]) -> str:
    """What `make` returns in process 0, in every process; it is called there only."""
    if count() == 1:
        return make()
    key = _round(name)
    if index() == 0:
        value = make()
        _client().key_value_set(key, value)
        return value
    return _client().blocking_key_value_get(key, _LONG_MS)


def gather(name: str, value: str) -> list[str]:
    """The `value` of every process, in order."""
    if count() == 1:
        return [value]
    key = _round(name)
    _client().key_value_set(f"{key}/{index()}", value)
    return [_client().blocking_key_value_get(f"{key}/{process}", _LONG_MS) for process in range(count())]


def check_same(name: str, value: dict[str, str]) -> None:
    """Raises UserError if this process has another `value` than process 0; it tells the entries that differ."""
    first = json.loads(from_first(name, lambda: json.dumps(value)))
    differing = [key for key in sorted(first.keys() | value.keys()) if first.get(key) != value.get(key)]
    if differing:
        shown = ", ".join(f"{key} {first.get(key, 'absent')} -> {value.get(key, 'absent')}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(f"another {name} than in process 0: {shown}{more}; start all processes with the same")
