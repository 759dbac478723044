"""`train`: prepare, restore, step, evaluate, save."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from rich.console import Console

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig, config_json
from lckv_jax.data.batches import batches, iterate
from lckv_jax.data.prepare import Manifest, prepare
from lckv_jax.data.tokenizer import tokenizer_files
from lckv_jax.errors import UserError
from lckv_jax.model.transformer import check_dtype
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh, replicated_dims
from lckv_jax.train.metrics import MetricsFile, ProgressLine, Record, draw_loss_curve, read_metrics
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.spikes import refuse_to_go_on
from lckv_jax.train.state import TrainState, abstract_state, evaluated_params, init_state
from lckv_jax.train.step import make_eval_step, make_train_step

# What may differ between the run in a folder and the config that resumes it: the mathematics stays the same.
_FREE = ("out", "data.folder", "train.log_every", "train.eval_", "train.save_every", "train.keep", "mesh.")


def train(config: RunConfig) -> None:
    """Runs `config` to its last step, from the newest good checkpoint in `config.out` if there is one.

    Makes the data first if `config.data.folder` is empty. Leaves in `config.out`: checkpoints/, config.json,
    the tokenizer, metrics.jsonl (a line a step and a line a validation) and loss.png.
    Raises UserError for everything that the user can mend, and if the loss stops being finite.
    """
    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    check_dtype(config.model)
    mesh = make_mesh(config.mesh)
    check_sizes(config.model, config.data.batch_size, mesh)
    if replicated_dims(config.model, mesh):
        say(f"mesh: {config.model.num_kv_heads} K/V heads are not split over tensor={mesh.shape['tensor']}")
    out = Path(config.out).expanduser()
    _refuse_another_run(config, out)
    manifest = prepare(config.data, config.model.vocab_size, say)
    datasets = _Datasets(*(_batches(config, manifest, split) for split in ("train", "valid")))
    with jax.set_mesh(mesh), checkpoint.open_checkpoints(out / "checkpoints", config.train.keep) as manager:
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        restored = checkpoint.restore(
            manager,
            abstract_state(config, optimizer, mesh),
            check=lambda meta: _check_same_run(config, manifest, meta),
            report=say,
        )
        state = restored[0] if restored else init_state(config, optimizer, mesh)
        if restored:
            say(f"resuming {out} from step {int(state['step'])}")
        _claim_folder(config, out)  # only now is it certain that the folder is this run's
        run = _Run(config, manifest, datasets, manager, console, int(state["step"]))
        run.finish(state, make_train_step(config, optimizer, mesh))
    _summarise(config, out, say)


class _Datasets(NamedTuple):
    train: Any
    valid: Any


def _batches(config: RunConfig, manifest: Manifest, split: Any) -> Any:
    data = config.data
    return batches(
        data.folder,
        manifest,
        split,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        seed=config.seed,
        packing=data.packing,
        weights=[source.weight for source in data.sources],
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
    ) -> None:
        self.config, self.manifest, self.datasets, self.manager, self.start = config, manifest, datasets, manager, start
        self.file = MetricsFile(Path(config.out).expanduser() / "metrics.jsonl", start)
        self.progress = ProgressLine(console, start, config.train.steps, config.train.log_every)
        self.evaluate = make_eval_step(config)
        self.sharding = batch_sharding(jax.sharding.get_mesh())
        self.read_at = time.monotonic()

    def finish(self, state: TrainState, step_function: Any) -> None:
        """All remaining steps. Metrics are read one step late, so that the device never waits for the host."""
        config, train = self.config, self.config.train
        rows = iterate(self.datasets.train, self.start)
        pending: tuple[int, Any] | None = None
        try:
            for step in range(self.start + 1, train.steps + 1):
                batch = jax.device_put(next(rows), self.sharding)
                state, metrics = step_function(state, batch)
                self.read(pending)
                pending = step, metrics
                validates, saves = (
                    step % every == 0 or step == train.steps for every in (train.eval_every, train.save_every)
                )
                if validates or saves:
                    self.read(pending)
                    pending = None
                if validates:
                    self.validate(step, state)
                if saves:
                    checkpoint.save(
                        self.manager,
                        state,
                        config,
                        manifest=self.manifest.hash,
                        tokenizer=self.manifest.tokenizer_fingerprint,
                    )
                if validates or saves:
                    self.read_at = time.monotonic()
            self.manager.wait_until_finished()
        finally:
            self.progress.close()
            self.file.close()
            rows.close()

    def read(self, pending: tuple[int, Any] | None) -> None:
        """Waits for the metrics of a step, writes and shows them. Raises UserError if training cannot go on."""
        if pending is None:
            return
        step, metrics = pending
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self.read_at = now - self.read_at, now
        tokens = self.config.data.batch_size * self.config.data.seq_len
        record: Record = {
            "step": step,
            **values,
            "tokens_seen": step * tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        self.file.write(record)
        refuse_to_go_on(self.config, values, step, self.manager.latest_step())
        self.progress.update(record)

    def validate(self, step: int, state: TrainState) -> None:
        """Mean loss over the first validation batches, always the same ones, with the m and b of the model config."""
        dataset = self.datasets.valid
        total, count = 0.0, 0
        for index in range(min(self.config.train.eval_batches, len(dataset))):
            nll, tokens = self.evaluate(evaluated_params(state), jax.device_put(dataset[index], self.sharding))
            total, count = total + float(nll), count + int(tokens)
        loss = total / count
        if not math.isfinite(loss):
            raise UserError(
                f"step {step}: the validation loss is not finite; nothing was saved since the last checkpoint; "
                "lower optimizer.learning_rate or change the seed in a new `out`"
            )
        perplexity = math.exp(loss) if loss < 700 else math.inf
        tokens_seen = step * self.config.data.batch_size * self.config.data.seq_len
        self.file.write({"step": step, "valid_loss": loss, "valid_perplexity": perplexity, "tokens_seen": tokens_seen})
        self.progress.say(f"step {step:>6}  validation loss {loss:.4f}  perplexity {perplexity:,.1f}")


def _refuse_another_run(config: RunConfig, out: Path) -> None:
    """Raises UserError if the folder holds the beginnings of a run with another configuration."""
    path = out / "config.json"
    if not read_metrics(out / "metrics.jsonl"):
        return  # it never made a step
    try:
        other = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{out} holds a run, but its config.json cannot be read; put it back, or choose another `out`"
        ) from error
    _refuse_differences(config, other, f"{out} holds another run")


def _claim_folder(config: RunConfig, out: Path) -> None:
    """Makes the run's folder with config.json and the tokenizer."""
    contents = {"config.json": (json.dumps(config_json(config), indent=1) + "\n").encode()}
    try:
        contents |= {path.name: path.read_bytes() for path in tokenizer_files(config.data.folder)}
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (out / f"{name}.partial").write_bytes(content)
            os.replace(out / f"{name}.partial", out / name)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written: {error.strerror}; mend it, or choose another `out`"
        ) from error


def _check_same_run(config: RunConfig, manifest: Manifest, meta: dict[str, Any]) -> None:
    """Raises UserError if a checkpoint belongs to another configuration, tokenizer or data set."""
    where = f"checkpoint of step {meta['step']} in {config.out}"
    if meta["tokenizer"] != manifest.tokenizer_fingerprint:
        raise UserError(
            f"the {where} was trained with another tokenizer than the one in {config.data.folder}; "
            "restore that data folder, or choose another `out`"
        )
    if meta["manifest"] != manifest.hash:
        raise UserError(
            f"the {where} was trained on other data than {config.data.folder} now holds; "
            "restore that data folder, or choose another `out`"
        )
    _refuse_differences(config, meta["config"], f"the {where} has another config")


def _refuse_differences(config: RunConfig, other: dict[str, Any], what: str) -> None:
    mine, theirs = (traverse_util.flatten_dict(tree, sep=".") for tree in (config_json(config), other))
    fields = [field for field in mine | theirs if mine.get(field) != theirs.get(field) and not field.startswith(_FREE)]
    if fields:
        shown = "; ".join(f"{field} is {theirs.get(field)!r} there, {mine.get(field)!r} here" for field in fields[:4])
        more = f" (and {len(fields) - 4} more)" if len(fields) > 4 else ""
        raise UserError(f"{what}: {shown}{more}; choose another `out`, or undo the change")


def _summarise(config: RunConfig, out: Path, say: Callable[[str], None]) -> None:
    records = read_metrics(out / "metrics.jsonl")
    draw_loss_curve(records, config.model.vocab_size, out / "loss.png")
    say(f"done: {config.train.steps} steps of {config.data.batch_size * config.data.seq_len:,} tokens")
    last = [r for r in records if r["step"] == config.train.steps and r.get("valid_loss") is not None]
    if last:  # absent where somebody cut metrics.jsonl
        loss, perplexity = last[-1]["valid_loss"], last[-1]["valid_perplexity"]
        untrained = math.log(config.model.vocab_size)
        say(f"validation loss {loss:.4f} (ln(V) is {untrained:.2f}), perplexity {perplexity:,.1f}")
    say(f"checkpoint {out / 'checkpoints' / str(config.train.steps)}, loss curve {out / 'loss.png'}")
