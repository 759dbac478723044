"""SIGTERM: the step under way is finished and saved, the exit code is 42, and nothing differs afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lckv_jax import checkpoint, step_folder
from lckv_jax.config import load_config
from lckv_jax.errors import Stopped
from lckv_jax.train.loop import train
from lckv_jax.train.metrics import read_metrics
from lckv_jax.train.signals import noting_sigterm, stopping_at_once

ROOT = Path(__file__).resolve().parent.parent


def send():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_handler_notes_and_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at_once():
        with noting_sigterm() as stop_after:
            assert not stop_after(1)
            send()
            send()
            assert stop_after(2) and stop_after(3)
        with pytest.raises(Stopped, match="nothing was lost"):
            send()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with stopping_at_once(), noting_sigterm() as stop_after:
            seen.append((signal.getsignal(signal.SIGTERM), stop_after(1)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def test_sigterm_saves_and_exits_with_42_and_the_run_ends_the_same(finished_config, tmp_path):
    """A real process, stopped in the middle; then it is started again and compared with the undisturbed run."""
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    options = [f"out={stopped}", "train.save_every=100", "train.steps=6"]
    # a slow step, so that the signal finds it under way
    script = """
import sys, time
from lckv_jax import __main__
from lckv_jax.train import loop
make = loop.make_train_step
def make_slow(*arguments):
    step = make(*arguments)
    return lambda *inputs: (time.sleep(0.3), step(*inputs))[1]
loop.make_train_step = make_slow
sys.exit(__main__.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "train", str(finished_config), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(stopped / "metrics.jsonl")) >= 3, process)  # two of them of steps
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    last = max(record["step"] for record in read_metrics(stopped / "metrics.jsonl"))
    assert process.returncode == 42, err
    assert err == f"stopped by SIGTERM after step {last}, which is saved; the same command goes on from it\n"
    assert 2 <= last < 6
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [str(last)]
    assert not (stopped / "run.lock").exists()
    train(load_config(finished_config, options))
    undisturbed, resumed = (jax.tree.map(np.asarray, checkpoint.load(folder)[0]) for folder in (run, stopped))
    jax.tree.map(np.testing.assert_array_equal, undisturbed, resumed)


def test_sigterm_before_the_first_step(finished_config, tmp_path, monkeypatch):
    monkeypatch.setattr("lckv_jax.train.run_start.prepare", lambda *arguments: send())
    with pytest.raises(Stopped, match="nothing was lost"):
        train(load_config(finished_config, [f"out={tmp_path / 'other'}"]))
    assert not (tmp_path / "other").exists()


def test_sigterm_while_a_checkpoint_is_read_does_not_pass_for_damage(finished_config, tmp_path, monkeypatch):
    """It may interrupt orbax anywhere: nothing is moved aside, and the run stops before its next step."""
    folder = tmp_path / "run" / "checkpoints"
    steps = sorted(path.name for path in folder.iterdir())
    read = checkpoint.read_step

    def interrupted(*arguments):
        send()
        return read(*arguments)

    monkeypatch.setattr(checkpoint, "read_step", interrupted)
    with pytest.raises(Stopped, match="nothing was lost"):
        train(load_config(finished_config, ["train.steps=8", "allow_changes=[train.steps]"]))
    assert sorted(path.name for path in folder.iterdir()) == steps
    assert not (tmp_path / "run" / "checkpoints.unusable").exists()


def test_sigterm_inside_a_reader_is_no_damage():
    with pytest.raises(Stopped):
        step_folder._together(lambda: (_ for _ in ()).throw(Stopped("stopped")))
