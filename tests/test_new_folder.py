"""A folder appears whole or not at all, and nothing that was there is lost."""

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lckv_jax.convert.new_folder import check_new, check_space, new_folder, uninterrupted
from lckv_jax.errors import Stopped, UserError

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_there_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "broken").symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match="file is a file"):
        check_new(tmp_path / "file")
    with pytest.raises(UserError, match="full is not empty"):
        check_new(tmp_path / "full")
    assert check_new(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_new(tmp_path / "link") == check_new(tmp_path / "empty") == tmp_path / "empty"
    assert check_new(tmp_path / "broken") == tmp_path / "target"
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="where you are"):
        check_new(".")


def test_it_appears_when_it_is_whole(tmp_path):
    for out in (tmp_path / "new", tmp_path / "a" / "deep"):
        with new_folder(out, 1) as folder:
            (folder / "x").write_text("x")
            assert not out.exists()
        assert [path.name for path in out.iterdir()] == ["x"]
        assert os.listdir(out.parent) == [out.name] or out.parent == tmp_path
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", 1) as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "empty" / "x").exists()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "empty").stat().st_mode == (tmp_path / "a").stat().st_mode


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), Stopped("SIGTERM"), ValueError("x"), MemoryError()])
def test_whatever_happens_nothing_is_left(tmp_path, problem):
    with pytest.raises(type(problem)), new_folder(tmp_path / "out", 1) as folder:
        (folder / "half").write_text("x")
        raise problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "words"), [
    (errno.ENOSPC, "No space left on device; it needs 5.00 GB"),
    (errno.EDQUOT, "quota exceeded; it needs 5.00 GB"),
    (errno.EACCES, "Permission denied; mend that"),
])  # fmt: skip
def test_what_the_system_has_against_it_is_one_sentence(tmp_path, number, words):
    with pytest.raises(UserError, match=words) as caught, new_folder(tmp_path / "out", 5 * 10**9) as folder:
        (folder / "half").write_text("x")
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{tmp_path / 'out'} cannot be written: ")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "file" / "out", 1):
        raise AssertionError
    assert (tmp_path / "file").read_text() == "mine"


def test_one_that_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not empty"), new_folder(out, 1):
        out.mkdir()
        (out / "mine").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "mine"


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    code = """
import sys, time
from pathlib import Path
from lckv_jax.convert.new_folder import new_folder
with new_folder(Path(sys.argv[1]), 1) as folder:
    (folder / "half").write_text("x")
    print(folder.name, flush=True)
    time.sleep(60)
"""
    out = tmp_path / "out"
    mine = [
        tmp_path / name
        for name in ("out.partial", "out.partial-old", "out.partial-0123456789", "other.partial-01234567")
    ]
    for path in mine:
        path.mkdir()
    command = [sys.executable, "-c", code, str(out)]
    living = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    partial = tmp_path / living.stdout.readline().strip()
    with new_folder(out, 1):
        assert partial.exists()
    shutil.rmtree(out)
    living.kill()
    living.wait()
    assert (partial / "half").exists()  # killed without a chance to clear up
    assert not out.exists()
    with new_folder(out, 1):
        assert not partial.exists()
    assert sorted(tmp_path.iterdir()) == sorted([out, *mine])


def test_too_little_space_is_told_beforehand(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    check_space(tmp_path / "a" / "b", usage.free // 2)
    with pytest.raises(UserError, match=r"needs .* GB, but .* has only .* GB free"):
        check_space(tmp_path / "a" / "b", usage.total)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_callback_swallows_still_counts(tmp_path):
    """What is raised within a callback of the garbage collector is printed and forgotten."""

    def swallow(phase, info):
        if phase == "start":
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(swallow)
    try:
        with pytest.raises(Stopped, match="nothing was written"), new_folder(tmp_path / "out"):
            gc.collect()
    finally:
        gc.callbacks.remove(swallow)
    assert list(tmp_path.iterdir()) == []


def test_signals_wait_for_what_must_not_be_interrupted(tmp_path):
    done = []
    with pytest.raises(Stopped), new_folder(tmp_path / "out"), uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        done.append("written")
    assert done == ["written"] and list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("again")
    assert done == ["written", "again"]
