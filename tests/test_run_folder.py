"""One run a folder, and no trace of a run that never was."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lckv_jax.errors import UserError
from lckv_jax.train import run_folder
from lckv_jax.train.resume import Change
from lckv_jax.train.run_folder import held, record_changes

CHANGE = Change("optimizer.learning_rate", 0.1, 0.2, "mathematics")


def no_word(line):
    raise AssertionError(line)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    with held(tmp_path / "run", no_word):
        told = pytest.raises(UserError, match=rf"run is being trained by process {os.getpid()} on \S+; wait")
        with told, held(tmp_path / "run", no_word):
            pass
        assert (tmp_path / "run" / "run.lock").exists()
    assert not (tmp_path / "run").exists()  # nothing was left in it


def test_what_a_dead_host_has_locked_is_waited_for(tmp_path, monkeypatch):
    """Its file server gives the lock away after a while; the test lets go of it at the second look."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(run_folder, "_DEAD_SECONDS", 30.0)
    with (tmp_path / "run" / "run.lock").open("w") as theirs:
        theirs.write("process 1 on another-host")
        theirs.flush()
        fcntl.flock(theirs, fcntl.LOCK_EX)
        monkeypatch.setattr(run_folder.time, "sleep", lambda _: fcntl.flock(theirs, fcntl.LOCK_UN))
        with held(tmp_path / "run", no_word):
            assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text()


def test_another_host_that_lives_keeps_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(run_folder, "_DEAD_SECONDS", 0.0)
    with (tmp_path / "run" / "run.lock").open("w") as theirs:
        theirs.write("process 1 on another-host")
        theirs.flush()
        fcntl.flock(theirs, fcntl.LOCK_EX)
        told = pytest.raises(UserError, match="is being trained by process 1 on another-host")
        with told, held(tmp_path / "run", no_word):
            pass


def test_a_killed_run_lets_go(tmp_path):
    script = """
import os, sys, time
from pathlib import Path
from lckv_jax.train.run_folder import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""
    root = Path(__file__).resolve().parent.parent
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"), held(tmp_path, no_word):
        pass
    child.kill()
    child.communicate()
    assert (tmp_path / "run.lock").exists()
    with held(tmp_path, no_word):
        (tmp_path / "kept").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with held(tmp_path, (said := []).append):
        pass
    assert len(said) == 1 and "No locks available" in said[0]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"), held(tmp_path / "file" / "run", no_word):
        pass


def test_changes_are_recorded_once(tmp_path):
    record_changes(tmp_path, 3, [])
    assert not (tmp_path / "changes.jsonl").exists()
    for step in (3, 3, 5):  # the second time: the run was killed before it saved
        record_changes(tmp_path, step, [CHANGE])
    lines = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "changes": {"optimizer.learning_rate": [0.1, 0.2]}} for step in (3, 5)]


def test_an_exported_model_is_no_place_for_a_run(tmp_path):
    for content in ('{"model_type": "llama"}', "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="not of a run"):
            run_folder.check_free(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model": {}, "train": {}}'
    )  # of a run that was stopped before its first step
    run_folder.check_free(tmp_path)
    run_folder.check_free(tmp_path / "absent")


def test_the_holder_is_on_disk_before_others_look_for_it(tmp_path, monkeypatch):
    """A network file system may keep what is in an open file for half a minute."""
    done = []
    monkeypatch.setattr(run_folder.os, "fsync", lambda file: done.append("on disk"))
    monkeypatch.setattr(run_folder.processes, "from_first", lambda name, make: done.append(name))
    with held(tmp_path / "run", no_word):
        assert done == ["on disk", "run folder"]
