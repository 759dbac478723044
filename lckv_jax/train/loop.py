"""`train`: prepare, restore, step, evaluate, save."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig
from lckv_jax.data.batches import batches, iterate
from lckv_jax.data.prepare import Manifest
from lckv_jax.errors import Stopped, UserError
from lckv_jax.model.kernels import bias_bytes, choose_backend
from lckv_jax.model.transformer import check_dtype
from lckv_jax.parallel import processes
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh, replicated_dims
from lckv_jax.parallel.rows import global_batch, local_rows
from lckv_jax.parallel.watchdog import Watchdog
from lckv_jax.train import resume, run_folder
from lckv_jax.train.clock import Clock
from lckv_jax.train.goodput import Account
from lckv_jax.train.metrics import ProgressLine, Record, draw_loss_curve, read_metrics
from lckv_jax.train.mfu import peak_flops, utilisation
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.profiler import Profiler
from lckv_jax.train.run_start import (
    check_resumable,
    check_same_everywhere,
    check_same_run,
    hang_seconds,
    prepare_all,
    tokens_seen,
)
from lckv_jax.train.signals import noting_sigterm, stopping_at_once
from lckv_jax.train.spikes import refuse_to_go_on
from lckv_jax.train.state import TrainState, abstract_state, evaluated_params
from lckv_jax.train.step import check_micro_batch, make_eval_step, make_train_step
from lckv_jax.train.summary import summary
from lckv_jax.train.warm_start import check_start, first_state
from lckv_jax.train.writers import check_writers, open_writers


def train(config: RunConfig) -> None:
    """Runs `config` to its last step, from the newest good checkpoint in `config.out` if there is one.

    Makes the data first if `config.data.folder` is empty. Leaves in `config.out`: checkpoints/, config.json,
    the tokenizer, metrics.jsonl (a line a step and a line a validation, accounts of the time), changes.jsonl if the
    config ever changed, and loss.png.
    Raises UserError for everything that the user can mend, and if training is lost (see spikes.py); Stopped after
    SIGTERM, when the last step is saved.
    """
    clock = Clock()
    console = Console(quiet=processes.index() != 0)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    check_same_everywhere(config)
    check_dtype(config.model)
    resume.check_allowed_names(config.allow_changes)
    mesh = make_mesh(config.mesh)
    check_sizes(config.model, config.data.batch_size, mesh)
    check_micro_batch(config, mesh)
    if replicated_dims(config.model, mesh):
        say(f"mesh: {config.model.num_kv_heads} K/V heads are not split over tensor={mesh.shape['tensor']}")
    _say_kernel(config, mesh, say)
    _say_what_is_best(config, say)
    check_writers(config.metrics)
    device = mesh.devices.flat[0]
    peak = peak_flops(config, device.device_kind, device.platform)
    out = Path(config.out).expanduser()
    with stopping_at_once(), run_folder.held(out, say):
        if not check_resumable(config, out, say):
            check_start(config)
        manifest = prepare_all(config, say)
        datasets = _Datasets(*(_batches(config, manifest, split, mesh) for split in ("train", "valid")))
        keep, keep_best = config.train.keep, config.train.keep_best
        with (
            noting_sigterm() as stop_after,  # from here on, as checkpoints are read and written
            jax.set_mesh(mesh),
            Watchdog(hang_seconds(config)) as watchdog,
            checkpoint.open_checkpoints(out / "checkpoints", keep, keep_best) as manager,
        ):
            run, state, step_function = _start(config, manifest, datasets, manager, console, clock, peak)
            run.finish(state, step_function, stop_after, watchdog)
        if processes.index() == 0:
            _summarise(config, out, run.start, say)


def _say_what_is_best(config: RunConfig, say: Callable[[str], None]) -> None:
    """Only a checkpoint whose own step is validated can be the best."""
    train = config.train
    together = math.lcm(train.eval_every, train.save_every)
    if train.keep_best and together not in (train.eval_every, train.save_every):
        say(
            f"checkpoints: validation and save meet only every {together} steps, and only there is a checkpoint "
            "compared for train.keep_best; make train.save_every a multiple of train.eval_every"
        )


def _say_kernel(config: RunConfig, mesh: Mesh, say: Callable[[str], None]) -> None:
    """Prints which attention kernel runs and why; raises UserError if the one asked for cannot."""
    data = config.data
    backend, reason = choose_backend(config.model, seq_len=data.seq_len)
    say(reason)
    if backend == "cudnn" and data.packing == "masked":
        rows = data.batch_size // (config.train.accumulation * mesh.shape["data"] * mesh.shape["fsdp"])
        size = bias_bytes(config.model, rows, data.seq_len) / 2**20
        say(f"attention: masks of packed documents take {size:,.0f} MiB a device; data.packing=joined needs none")


def _start(
    config: RunConfig,
    manifest: Manifest,
    datasets: _Datasets,
    manager: Any,
    console: Console,
    clock: Clock,
    peak: float | None,
) -> tuple[_Run, TrainState, Any]:
    """The run, its state and its jitted step, restored if there is a checkpoint; only then is the folder claimed."""
    out, mesh = Path(config.out).expanduser(), jax.sharding.get_mesh()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    restored = checkpoint.restore(
        manager,
        abstract_state(config, optimizer, mesh),
        check=lambda meta: check_same_run(config, manifest, meta),
        report=say,
    )
    if restored is None:
        state, tokens_before = first_state(config, optimizer, mesh, say), 0
    else:
        state, tokens_before = restored[0], tokens_seen(restored[1])
        say(f"resuming {out} from step {int(state['step'])}")
    if processes.index() == 0:
        run_folder.claim(config, out)
    if restored is not None and processes.index() == 0:
        before = resume.read_config(restored[1]["config"], f"{out}: the checkpoint's config")
        run_folder.record_changes(out, int(state["step"]), resume.changes(before, config))
    run = _Run(config, manifest, datasets, manager, console, int(state["step"]), tokens_before, clock, peak)
    return run, state, make_train_step(config, optimizer, mesh)


def _profile_folder(out: Path) -> Path:
    """Of this process: the profiler names its files after the host, on which there may be several."""
    return out / "profile" / (f"process-{processes.index()}" if processes.count() > 1 else "")


class _Datasets(NamedTuple):
    train: Any
    valid: Any


def _batch_size(config: RunConfig, split: str) -> int:
    """Of the train steps; for validation that of micro-batches, so that it needs no more memory than a step."""
    return config.data.batch_size if split == "train" else config.data.batch_size // config.train.accumulation


def _batches(config: RunConfig, manifest: Manifest, split: Any, mesh: Mesh) -> Any:
    """The rows of the batches of a split that this process holds."""
    data, batch_size = config.data, _batch_size(config, split)
    return batches(
        data.folder,
        manifest,
        split,
        seq_len=data.seq_len,
        batch_size=batch_size,
        seed=config.seed,
        packing=data.packing,
        weights=[source.weight for source in data.sources],
        rows=local_rows(batch_sharding(mesh), batch_size),
    )


class _Run:
    """One stretch of a run, from the step that it starts or resumes at."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        datasets: _Datasets,
        manager: Any,
        console: Console,
        start: int,
        tokens_before: int,
        clock: Clock,
        peak: float | None,
    ) -> None:
        self.config, self.manifest, self.datasets, self.manager = config, manifest, datasets, manager
        self.start, self.tokens_before = start, tokens_before
        self.clock, self.peak = clock, peak
        self.out = Path(config.out).expanduser()
        self.clock.lap("start")
        with run_folder.written(self.out):
            self.account = Account(read_metrics(self.out / "metrics.jsonl"), start, clock)
            self.writers = open_writers(config, self.out, start, self.account.record(start))
        self.progress = ProgressLine(console, start, config.train.steps, config.train.log_every)
        self.profiler = Profiler(config.metrics.profile, _profile_folder(self.out), self.progress.say)
        self.evaluate = make_eval_step(config)
        mesh = jax.sharding.get_mesh()
        self.sharding, self.devices = batch_sharding(mesh), mesh.size
        self.read_at = self.saved_at = time.monotonic()

    def finish(
        self, state: TrainState, step_function: Any, stop_after: Callable[[int], bool], watchdog: Watchdog
    ) -> None:
        """All remaining steps. Metrics are read one step late, so that the device never waits for the host."""
        with contextlib.ExitStack() as closing:  # from the last to the first, each whatever becomes of the others
            closing.enter_context(run_folder.written(self.out))
            closing.callback(self.writers.close)
            closing.callback(self.profiler.close)
            closing.callback(self.progress.close)
            if stop_after(self.start) and self.start < self.config.train.steps:
                raise Stopped("stopped by SIGTERM; nothing was lost: the same command goes on from there")
            rows = iterate(self.datasets.train, self.start)
            closing.callback(rows.close)
            self.run_steps(state, step_function, rows, stop_after, watchdog)
            self.end(self.config.train.steps, done=True)

    def run_steps(
        self, state: TrainState, step_function: Any, rows: Any, stop_after: Callable[[int], bool], watchdog: Watchdog
    ) -> None:
        train = self.config.train
        pending: tuple[int, float, Any] | None = None
        self.clock.lap("start")
        for step in range(self.start + 1, train.steps + 1):
            batch = self.placed(next(rows), "train")
            wait = self.clock.lap("data")
            if step == self.start + 1:
                processes.compile_together(step_function, state, batch)
            with run_folder.written(self.out):
                state, metrics = self.profiler.run(step, step_function, state, batch)
            self.read(pending)
            self.clock.lap("compile" if step == self.start + 1 else "step")
            pending = step, wait, metrics
            last, stopping = step == train.steps, stop_after(step)
            validates = last or step % train.eval_every == 0
            saves = last or stopping or step % train.save_every == 0 or self.save_is_overdue(step)
            watchdog.feed(longer=step == self.start + 1 or validates or saves)
            if validates or saves:
                self.read(pending)
                self.clock.lap("step")
                pending = None
                loss = self.validate(step, state) if validates else None
                self.clock.lap("evaluation")
                told: Record = {}
                if saves:
                    self.save(step, state, loss)
                    told = self.account.save_begun(self.clock.lap("checkpoint"))
                self.write(self.account.record(step, **told))
                self.read_at = time.monotonic()
            if stopping and not last:
                self.end(step)
                raise Stopped(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from it")

    def end(self, step: int, **told: bool) -> None:
        """Waits for the save in flight and writes the last account of this stretch."""
        checkpoint.finish_saving(self.manager)
        self.clock.lap("checkpoint")
        self.write(self.account.record(step, **self.account.saved(in_progress=False), **told))

    def placed(self, rows: dict[str, np.ndarray], split: str) -> dict[str, jax.Array]:
        """A batch over all devices, from the rows of this process."""
        return global_batch(self.sharding, _batch_size(self.config, split), rows)

    def save_is_overdue(self, step: int) -> bool:
        """Whether save_minutes have passed; of several processes the first decides, when a line is due to be told."""
        minutes, now = self.config.train.save_minutes, time.monotonic()
        self.saved_at = min(self.saved_at, now)  # a clock that went back must not put off the next save
        if minutes is None or (processes.count() > 1 and step % self.config.train.log_every):
            return False
        overdue = now - self.saved_at >= 60 * minutes
        return processes.from_first("save", lambda: str(overdue)) == str(True)

    def save(self, step: int, state: TrainState, valid_loss: float | None) -> None:
        """Begins to save the state; valid_loss: its validation loss, if this step was validated."""
        checkpoint.save(
            self.manager,
            state,
            self.config,
            manifest=self.manifest.hash,
            tokenizer=self.manifest.tokenizer_fingerprint,
            tokens_seen=self.tokens_seen(step),
            valid_loss=valid_loss,
        )
        self.saved_at = time.monotonic()

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on after a step, also where the batch size changed when the run was resumed."""
        data = self.config.data
        return self.tokens_before + (step - self.start) * data.batch_size * data.seq_len

    def read(self, pending: tuple[int, float, Any] | None) -> None:
        """Waits for the metrics of a step, writes and shows them. Raises UserError if training cannot go on."""
        if pending is None:
            return
        step, wait, metrics = pending
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self.read_at = max(now - self.read_at, 1e-6), now  # whatever the clock does
        speed = self.config.data.batch_size * self.config.data.seq_len / seconds
        record: Record = {
            "step": step,
            **values,
            "tokens_seen": self.tokens_seen(step),
            "seconds": round(seconds, 4),
            "data_wait": round(wait, 4),
            "tokens_per_second": round(speed, 1),
            **utilisation(self.config, values["passes"], speed, self.devices, self.peak),
            **self.account.saved(self.manager.is_saving_in_progress()),
        }
        self.write(record)
        refuse_to_go_on(self.config, values, step, self.manager.latest_step())
        self.progress.update(record)

    def write(self, record: Record) -> None:
        with run_folder.written(self.out / "metrics.jsonl"):
            self.writers.write(record)

    def validate(self, step: int, state: TrainState) -> float:
        """Mean loss over the first validation batches, always the same ones, with the m and b of the model config."""
        dataset = self.datasets.valid
        total, count = 0.0, 0
        train = self.config.train
        for index in range(min(train.eval_batches * train.accumulation, len(dataset))):
            arguments = evaluated_params(state), self.placed(dataset[index], "valid")
            if index == 0:
                processes.compile_together(self.evaluate, *arguments)
            nll, tokens = self.evaluate(*arguments)
            total, count = total + float(nll), count + int(tokens)
        loss = total / count
        if not math.isfinite(loss):
            raise UserError(
                f"step {step}: the validation loss is not finite; nothing was saved since the last checkpoint; "
                "lower optimizer.learning_rate or change the seed in a new `out`"
            )
        perplexity = math.exp(loss) if loss < 700 else math.inf
        told = {"valid_loss": loss, "valid_perplexity": perplexity, "tokens_seen": self.tokens_seen(step)}
        self.write({"step": step, **told})
        self.progress.say(f"step {step:>6}  validation loss {loss:.4f}  perplexity {perplexity:,.1f}")
        return loss


def _summarise(config: RunConfig, out: Path, start: int, say: Callable[[str], None]) -> None:
    records, curve, steps = read_metrics(out / "metrics.jsonl"), out / "loss.png", config.train.steps
    with run_folder.written(curve):
        draw_loss_curve(records, config.model.vocab_size, curve)
    last = out / "checkpoints" / str(steps)
    for line in summary(config, records, start=start, stop=steps, checkpoint=last, curve=curve):
        say(line)
