"""`share`: gives a finished model a map with fewer caches, writes it as a run, and measures what that costs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lckv_jax.checkpoint import run_of
from lckv_jax.config import read_overrides
from lckv_jax.convert.given_path import given_path
from lckv_jax.convert.new_folder import check_new, check_space, new_folder
from lckv_jax.convert.reshare import describe_change, reshare
from lckv_jax.errors import UserError
from lckv_jax.map_plot import draw_map
from lckv_jax.share import report
from lckv_jax.share.heal import check_healable, heal
from lckv_jax.share.job import Job, load_job, run_search, setting_of
from lckv_jax.share.kvsharer import Result, check_asked, givable
from lckv_jax.share.measures import Model, costs, quality
from lckv_jax.share.plots import draw_distances
from lckv_jax.share.share_config import ShareConfig
from lckv_jax.share.shared_run import MARGIN, shared_config, write_run
from lckv_jax.share.sweep import sweep


def share(checkpoint: str, out: str, overrides: Sequence[str], flags: dict[str, Any]) -> None:
    """Searches a map for the model in `checkpoint` and writes it as the run folder `out`, with a report.

    overrides: of `ShareConfig`, such as `threshold=0.8`; flags: the same, as values, where they are not None.
    With `sweep` all numbers of layers are measured instead, and `out` gets tables and a plot.
    Raises UserError for what the user can mend, where it can be known before anything is written.
    """
    wanted = read_settings(overrides, flags)
    if "://" in out:
        raise UserError(f"{out} is a bucket; give a local or mounted folder")
    target = given_path(out, "OUT")
    place = check_new(target)
    job = load_job(checkpoint, target, wanted, Console())
    check_asked(job.model.config.sharing, wanted.layers or 0)
    if wanted.sweep:
        sweep(job, place)
        return
    if wanted.heal is not None:
        check_healable(job.loaded.config)
    result, seconds = _search(job)
    record = write_shared(job, place, result, seconds)
    job.say("measuring both maps; whoever stops it keeps the model, without these numbers")
    try:
        measure_shared(job, result, record)
        if wanted.heal is not None:
            heal(job, record)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; {target} holds the whole model, but its report lacks what was not measured yet: for that give "
            "another folder"
        ) from None
    best = target if wanted.heal is None else target / "healed"
    job.say(f"report: {target}/report.md; it is a run like any other:")
    job.say(f"python -m lckv_jax generate {shlex.quote(str(best))} prompt=...")


def read_settings(overrides: Sequence[str], flags: dict[str, Any]) -> ShareConfig:
    """The settings of overrides and flags."""
    texts = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return read_overrides(ShareConfig, [*overrides, *texts], "share")


def _search(job: Job) -> tuple[Result, float]:
    wanted, say = job.wanted, job.say
    assert wanted.layers is not None, "read_settings sees to it"
    can = ", ".join(map(str, givable(job.model.config.sharing))) or "none"
    say(f"search: to give up K,V in: {wanted.layers} of layers {can}; {wanted.order} first, {wanted.metric}")
    result, seconds = run_search(job, wanted.layers, wanted.order, wanted.seed)
    say(f"{report.found_line(result, wanted.threshold)}; {seconds:.1f} s")
    say(f"map {job.model.config.sharing} -> {result.sharing}")
    say(result.sharing.diagram())
    return result, seconds


def write_shared(job: Job, place: Path, result: Result, seconds: float) -> report.Record:
    """Writes the run with the map found, and what is known of it so far, which is returned."""
    params, run, source = job.loaded.params, job.loaded.config, run_of(job.checkpoint)
    params, model = reshare(params, run.model, result.sharing, "own")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + MARGIN
    check_space(place, size)
    wanted, texts = job.wanted, job.texts
    record = {
        "checkpoint": job.checkpoint,
        "step": job.loaded.step,
        **report.search_record(result, run.model),
        "search": {**_settings(wanted), "seconds": round(seconds, 3)},
        "calibration": texts.what,
        "held_out": {"what": texts.held_out.what, "seq_len": setting_of(job).seq_len},
    }
    config = shared_config(run, model, source, job.target)
    with new_folder(place, size) as partial_folder:
        write_run(partial_folder, params, config, job.loaded.tokenizer, source, job.say)
        draw_map(model, partial_folder / "map.png")
        draw_distances(result, f"{wanted.metric}, {wanted.order} first", partial_folder / "distances.png")
        report.write(partial_folder, "report", record, report.markdown(record))
    change = describe_change(run.model, model, "own")
    job.say(f"wrote {job.target}/checkpoints/0, read back and compared{': ' + change if change else ''}")
    return record


def _settings(wanted: ShareConfig) -> report.Record:
    names = ("order", "metric", "threshold", "seed", "sentences", "tokens", "passes", "dtype")
    return {name: getattr(wanted, name) for name in names}


def measure_shared(job: Job, result: Result, record: report.Record) -> None:
    """Measures the model before and after, adds that to the record, prints it and writes the report again."""
    setting, before = setting_of(job), job.model
    after = Model(*reshare(before.params, before.config, result.sharing, "own"))
    old = quality(before, setting, job.console)
    new = old if result.sharing == before.config.sharing else quality(after, setting, job.console)
    record["quality"] = {"before": report.quality_record(old), "after": report.quality_record(new)}
    timed = [costs((before, after), cache, setting) for cache in setting.caches]
    record["speed"] = {"batch": setting.batch, "repeats": setting.repeats, "device": jax.devices()[0].device_kind}
    record["caches"] = report.cache_records(old, new, timed)
    for line in (*report.loss_table(record), "", *report.cache_table(record)):
        job.say(line)
    report.write(job.target, "report", record, report.markdown(record))
