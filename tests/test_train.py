"""`train` end to end on a tiny model: what it leaves behind, exact resume, refusals."""

import errno
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lckv_jax import checkpoint
from lckv_jax.config import SourceConfig, load_config
from lckv_jax.data.prepare import prepare
from lckv_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from lckv_jax.errors import UserError
from lckv_jax.train import loop
from lckv_jax.train.goodput import is_account
from lckv_jax.train.loop import train
from lckv_jax.train.metrics import MetricsFile, read_metrics
from lckv_jax.train.run_folder import held


class Killed(Exception):
    pass


def killed_at(monkeypatch, step):
    """Makes training die before it runs the given step."""
    make = loop.make_train_step

    def make_failing(*arguments):
        function = make(*arguments)

        def run(state, batch):
            if int(state["step"]) == step:
                raise Killed
            return function(state, batch)

        return run

    monkeypatch.setattr(loop, "make_train_step", make_failing)


def parameters(config):
    return jax.tree.map(np.asarray, checkpoint.load(config.out)[0])


def test_a_run_learns_and_leaves_what_it_promises(tiny_config, capsys):
    config = load_config(tiny_config, ["train.steps=60", "train.eval_every=30", "train.save_every=40"])
    train(config)
    out = tiny_config.parent / "run"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert steps[0]["loss"] == pytest.approx(np.log(512), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[-1]["tokens_seen"] == 60 * 4 * 32
    assert {"grad_norm", "learning_rate", "passes", "residual", "tokens_per_second"} <= steps[0].keys()
    assert steps[0]["passes"] == 4
    valid = [record for record in records if "valid_loss" in record]
    assert [record["step"] for record in valid] == [30, 60]
    assert valid[-1]["valid_perplexity"] == pytest.approx(np.exp(valid[-1]["valid_loss"]))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["40", "60"]
    _, restored, tokenizer = checkpoint.load(out)
    assert restored == config
    assert tokenizer.vocab_size == 512
    printed = capsys.readouterr().out
    assert printed.count("tok/s") >= 30
    assert "validation loss" in printed
    assert "done: 60 steps" in printed


def test_resume_is_bit_identical(tiny_config, tmp_path, monkeypatch, capsys):
    whole = load_config(tiny_config, [f"out={tmp_path / 'whole'}"])
    train(whole)
    broken = load_config(tiny_config, [f"out={tmp_path / 'broken'}"])
    with monkeypatch.context() as patch:
        killed_at(patch, 5)
        with pytest.raises(Killed):
            train(broken)
    assert "resuming" not in capsys.readouterr().out
    train(broken)
    assert "from step 4" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, parameters(whole), parameters(broken))
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    for one, other in zip(*([r for r in told if not is_account(r)] for told in records), strict=True):
        for clock in ("seconds", "tokens_per_second", "data_wait", "device_flops_per_second", "save_seconds"):
            one.pop(clock, None)
            other.pop(clock, None)
        assert one == other
    train(broken)  # a finished run stays as it is
    assert "done: 6 steps" in capsys.readouterr().out


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(finished_config, tmp_path, capsys):
    config = load_config(finished_config)
    want = parameters(config)
    newest = tmp_path / "run" / "checkpoints" / "6"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    train(config)
    printed = capsys.readouterr().out
    assert "step 6" in printed and "resuming" in printed and "from step 4" in printed
    jax.tree.map(np.testing.assert_array_equal, want, parameters(config))


def files(folder):
    """Every file and when it changed."""
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.norm_eps=1e-6",
            r'step 6 has another config: model.norm_eps 1e-05 -> 1e-06; .* "allow_changes=\[model.norm',
        ),
        ("optimizer.learning_rate=1e-3", "learning_rate"),
        ("model.sharing=0_1_2_3", 'sharing "0_2_2_3" -> "0_1_2_3"'),
        ("seed=1", "seed"),
    ],
)
def test_another_config_in_the_folder_is_refused(finished_config, tmp_path, override, message):
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        train(load_config(finished_config, [override]))
    assert before == files(tmp_path / "run")


def test_what_does_not_change_the_numbers_may_change(finished_config, capsys):
    train(load_config(finished_config, ["train.log_every=1", "train.keep=3", "train.save_every=5", "mesh.fsdp=1"]))
    assert "done: 6 steps" in capsys.readouterr().out


def prepare_other_texts(config, folder):
    """Other tokens in `folder`, with a manifest that claims the settings of the config."""
    texts = folder.parent / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("".join(f"{number} is a number, {i} is another. " for i in range(900)))
    sources = (SourceConfig(path=f"{texts}/*.txt"),)
    tokenizer = str(Path(config.out) / "tokenizer.model")
    prepare(config.data.model_copy(update={"sources": sources, "tokenizer": tokenizer, "folder": str(folder)}), 512)
    made, wanted = (json.loads((Path(f) / "manifest.json").read_text()) for f in (folder, config.data.folder))
    disguised = made | {name: wanted[name] for name in ("sources", "tokenizer")}
    (folder / "manifest.json").write_text(json.dumps(disguised))


def test_other_data_is_refused_unless_allowed(finished_config, tmp_path, capsys):
    """The folder was prepared again, with the same settings, from texts that have changed since."""
    prepare_other_texts(load_config(finished_config), tmp_path / "other")
    overrides = [f"data.folder={tmp_path / 'other'}"]
    with pytest.raises(UserError, match=r"trained on other data .*allow_changes=\[data.sources\]"):
        train(load_config(finished_config, overrides))
    train(load_config(finished_config, [*overrides, "allow_changes=[data.sources]"]))
    assert "done: 6 steps" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
    config = load_config(
        tiny_config, ["optimizer.learning_rate=1e38", "optimizer.clip_norm=null", "train.save_every=1"]
    )
    with pytest.raises(UserError, match=r"step \d+: (loss|grad_norm|param_norm) is not finite \(batch \d+ of seed 0\)"):
        train(config)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(records[-1][name] is None for name in records[-1]["non_finite"])
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert all(step < records[-1]["step"] for step in saved)


def test_a_validation_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_eval_step", lambda config: lambda params, batch: (np.float32("nan"), 1))
    with pytest.raises(UserError, match="step 3: the validation loss is not finite"):
        train(load_config(tiny_config))
    assert checkpoint.load(tmp_path / "run")[1].train.steps == 6  # the one of step 2 is still there


def test_a_refused_run_keeps_its_tokenizer_and_config(finished_config, tmp_path):
    """The data folder was lost and made again with another tokenizer: the run's own copies are the only ones left."""
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("tokenizer.model", "config.json")}
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    texts = (f"{word} the {number}" for number in range(2000) for word in ("all", "of", "other", "words"))
    (tmp_path / "data" / "tokenizer.model").write_bytes(train_sentencepiece(texts, 300))
    other = load_tokenizer(tmp_path / "data" / "tokenizer.model")
    manifest["tokenizer_fingerprint"] = other.fingerprint
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another tokenizer"):
        train(load_config(finished_config))
    assert kept == {name: (tmp_path / "run" / name).read_bytes() for name in kept}
    (tmp_path / "run" / "tokenizer.model").write_bytes((tmp_path / "data" / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="not the tokenizer that the run was trained with"):
        checkpoint.load(tmp_path / "run")


def test_a_run_that_never_made_a_step_may_be_changed(tiny_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, 0)
        with pytest.raises(Killed):
            train(load_config(tiny_config))
    train(load_config(tiny_config, ["model.norm_eps=1e-6", "data.batch_size=1"]))


def test_the_progress_line_fits_a_terminal(tiny_config, capsys):
    train(load_config(tiny_config))
    lines = [line for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert lines and max(map(len, lines)) < 80


def test_passes_follow_their_schedule(tiny_config, tmp_path):
    train(load_config(tiny_config, ["train.no_grad_passes_schedule=[[0, 1], [2, 5], [4, 3]]"]))
    passes = [r["passes"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "passes" in r]
    assert passes == [3, 3, 7, 7, 5, 5]


@pytest.mark.parametrize(
    "overrides", [["model.dtype=bfloat16", "model.remat=true"], ["model.tolerance=0.5", "train.z_loss=1e-4"]]
)
def test_other_settings_train(tiny_config, tmp_path, overrides):
    train(load_config(tiny_config, ["train.steps=40", *overrides]))
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 0.5


def test_a_finished_run_goes_on_with_more_steps_if_that_is_allowed(finished_config, tmp_path, capsys):
    with pytest.raises(UserError, match=r"train\.steps 6 -> 8"):
        train(load_config(finished_config, ["train.steps=8"]))
    overrides = ["train.steps=8", "data.batch_size=2", "train.log_every=1"]
    train(load_config(finished_config, [*overrides, "allow_changes=[train.steps,data.batch_size]"]))
    printed = capsys.readouterr().out
    for line in (
        "changed since then: train.steps: 6 -> 8 (changes the mathematics)",
        "changed since then: train.log_every: 2 -> 1",
        "done: 8 steps",
    ):
        assert f"{line}\n" in printed or line in printed
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["tokens_seen"] for r in records[-3:]] == [6 * 4 * 32, 6 * 4 * 32 + 2 * 32, 6 * 4 * 32 + 4 * 32]
    recorded = json.loads((tmp_path / "run" / "changes.jsonl").read_text())
    assert recorded["step"] == 6 and recorded["changes"]["train.steps"] == [6, 8]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 8
    train(load_config(finished_config, overrides))  # the change is the run's own now
    with pytest.raises(UserError, match=r"checkpoint of step 8 is past train.steps=6"):
        train(load_config(finished_config, ["data.batch_size=2", "allow_changes=[train.steps]"]))


def test_a_second_run_in_the_folder_is_refused(tiny_config, tmp_path):
    with held(tmp_path / "run", print), pytest.raises(UserError, match="run is being trained by process"):
        train(load_config(tiny_config))
    with pytest.raises(UserError, match=r"allow_changes: .* did you mean train.steps"):
        train(load_config(tiny_config, ["allow_changes=[steps]"]))


def test_the_best_checkpoint_stays(tiny_config, tmp_path, monkeypatch):
    losses = iter([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(loop._Run, "validate", lambda run, step, state: next(losses))
    train(load_config(tiny_config, ["train.eval_every=1", "train.save_every=1", "train.keep=1"]))
    assert steps_saved(tmp_path) == [2, 6]


def steps_saved(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())


class Clock:
    """A monotonic clock that moves by the given seconds each time it is read."""

    def __init__(self, *moves):
        self.now, self.moves = 1000.0, itertools.cycle(moves)

    def monotonic(self):
        self.now += next(self.moves)
        return self.now


def test_saves_by_the_clock(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "time", Clock(20))  # read several times a step
    train(load_config(tiny_config, ["train.save_every=100", "train.save_minutes=1", "train.keep=9"]))
    assert len(steps_saved(tmp_path)) >= 3


@pytest.mark.parametrize("moves", [(0.0,), (-50.0,), (90.0, -5000.0, 100.0)])
def test_a_clock_that_stands_or_goes_back(tiny_config, tmp_path, monkeypatch, moves):
    monkeypatch.setattr(loop, "time", Clock(*moves))
    train(load_config(tiny_config, ["train.save_every=3", "train.save_minutes=1", "train.keep=9"]))
    assert {3, 6} <= set(steps_saved(tmp_path))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert all(math.isfinite(r["tokens_per_second"]) and r["tokens_per_second"] > 0 for r in records)
    assert all(r["seconds"] >= 0 for r in records)


def test_a_clock_that_went_back_does_not_put_off_the_next_save(tiny_config, monkeypatch):
    run = loop._Run.__new__(loop._Run)
    run.config, run.saved_at = load_config(tiny_config, ["train.save_minutes=1"]), 10_000.0
    overdue = []
    for now in (10_030.0, 500.0, 530.0, 561.0):
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda now=now: now))
        overdue.append(run.save_is_overdue(step=1))
    assert overdue == [False, False, False, True]


def refuse_to_write(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [(MetricsFile, "write", "metrics.jsonl"), (loop, "draw_loss_curve", "loss.png"), (os, "replace", "run")],
)
def test_a_full_disk_ends_the_run_with_the_reason(finished_config, tmp_path, monkeypatch, owner, name, file):
    config = load_config(finished_config, ["train.steps=8", "allow_changes=[train.steps]"])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse_to_write)
        with pytest.raises(UserError, match=f"{file} cannot be written: No space left on device; .* last checkpoint"):
            train(config)
    assert checkpoint.load(tmp_path / "run")[0]
    train(config)
    assert steps_saved(tmp_path)[-1] == 8


def test_what_a_run_tells_beside_its_losses(tiny_config, tmp_path, monkeypatch, capsys):
    """TensorBoard, a profile, MFU and a summary, over a kill and a resume inside the profiler window."""
    asked = ["metrics.tensorboard=true", "metrics.peak_flops=1.0e12", "metrics.profile=[4, 5]"]
    with monkeypatch.context() as patch:
        killed_at(patch, 4)  # step 5, after the checkpoint of step 4
        with pytest.raises(Killed):
            train(load_config(tiny_config, asked))
    train(load_config(tiny_config, asked))
    out = tmp_path / "run"
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 7))
    for record in records:
        assert 0 < record["mfu"] < record["hfu"] and record["data_wait"] >= 0
    assert len(list((out / "tensorboard").iterdir())) == 2
    assert len(list((out / "profile").rglob("*.xplane.pb"))) == 2
    printed = capsys.readouterr().out
    for said in (
        "profiler trace from step 4 to where",
        "trace from step 5 to 5",
        "MFU",
        "compile",
        "evaluation",
        "mfu ",
    ):
        assert said in printed
