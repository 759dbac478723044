"""Healing: training on from a shared model, and how much of the lost loss that brings back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from shlex import quote

from lckv_jax.checkpoint import load
from lckv_jax.config import RunConfig, load_config
from lckv_jax.errors import Stopped, UserError
from lckv_jax.share import report
from lckv_jax.share.job import Job, setting_of
from lckv_jax.share.measures import Model, losses
from lckv_jax.share.shared_run import has_text
from lckv_jax.train.loop import train


def check_healable(run: RunConfig) -> None:
    """Raises UserError if the run has no text to train on."""
    if not has_text(run):
        raise UserError(
            f"share: --heal trains on the run's own text, but data.folder={run.data.folder} is not there; leave "
            "it out, and train on other text: train OUT/config.json out=... data.folder=... data.sources=[...]"
        )


def heal(job: Job, record: report.Record) -> None:
    """Trains from the shared model in OUT/healed, measures it as the others were, and adds that to the record.

    With `heal_control` the unshared model is trained alike in OUT/unshared.
    """
    wanted, before = job.wanted, job.loaded.config.model
    nats = {f"{name} sharing": record["quality"][name]["prefill"][0]["nats"] for name in ("before", "after")}
    found = {"steps": wanted.heal, "learning_rate": _learning_rate(job), "nats": nats}
    nats["healed"] = _trained(job, "healed", [])
    lost = nats["after sharing"] - nats["before sharing"]
    found["recovered"] = _share_of(nats["after sharing"] - nats["healed"], lost)
    if wanted.heal_control:
        nats["unshared, as many steps"] = _trained(
            job, "unshared", [f"init_from={_quoted(job.checkpoint)}", f"model.sharing={before.sharing}"]
        )
        lost = nats["after sharing"] - nats["unshared, as many steps"]
        found["recovered_of_control"] = _share_of(nats["after sharing"] - nats["healed"], lost)
    record["heal"] = found
    for line in report.heal_table(record):
        job.say(line)
    report.write(job.target, "report", record, report.markdown(record))


def _share_of(gained: float, lost: float) -> float | None:
    """None where nothing was lost."""
    return gained / lost if lost > 0 else None


def _learning_rate(job: Job) -> float:
    return job.wanted.heal_learning_rate or job.loaded.config.optimizer.learning_rate / 3


def overrides(job: Job, name: str) -> list[str]:
    """What differs from OUT/config.json in the training of OUT/`name`. The order of the data is another than before."""
    run, steps = job.loaded.config, job.wanted.heal
    assert steps is not None, "only asked for with heal"
    found = [
        f"out={_quoted(job.target / name)}",
        f"seed={(run.seed + 1) % 2**32}",
        f"train.steps={steps}",
        f"train.eval_every={steps}",
        f"train.save_every={steps}",
        f"optimizer.learning_rate={_learning_rate(job)}",
        f"optimizer.warmup_steps={min(run.optimizer.warmup_steps, steps // 10)}",
    ]
    return [*found, "train.no_grad_passes_schedule=[]"] if run.train.no_grad_passes_schedule else found


def _quoted(path: Path | str) -> str:
    """The path as the value of an override, in quotes unless plain: ` #` would begin a comment, 12 be a number."""
    text = str(path)
    plain = "/" in text and re.fullmatch(r"[\w./~-]+", text, re.ASCII)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _trained(job: Job, name: str, more: list[str]) -> float:
    """Nats a token after the training in OUT/`name`."""
    path, changes = job.target / "config.json", [*overrides(job, name), *more]
    command = f"python -m lckv_jax train {quote(str(path))} {' '.join(map(quote, changes))}"
    job.say(command)
    try:
        train(load_config(path, changes))
    except Stopped as stopped:  # `share` itself cannot go on: OUT is there
        steps = str(stopped).partition(";")[0]
        raise Stopped(f"{steps}; {job.target} is whole, and only the healing goes on, by: {command}") from None
    params, run, _ = load(job.target / name, report=job.say)
    config = run.model.model_copy(update={"dtype": job.model.config.dtype})
    nats = losses(Model(params, config), setting_of(job), job.console)[0].nats
    assert math.isfinite(nats), "measured losses are"
    return nats
