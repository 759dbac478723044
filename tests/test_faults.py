"""The fault harness: what it breaks is broken, its page has a row for each command; a round of some rows (slow)."""

import random
import re
from pathlib import Path

import jax
import pytest

from benchmarks.faults.__main__ import ROWS, line, main, update
from benchmarks.faults.damage import KINDS, break_file
from benchmarks.faults.runs import Result, resumed_from
from lckv_jax.parallel import processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"\1", b"\0" * 40 + b"\7", bytes(range(256)) * 30])
def test_damage_is_damage(tmp_path, kind, content):
    for seed in range(20):
        (tmp_path / "file").write_bytes(content)
        break_file(tmp_path / "file", kind, random.Random(seed))
        if kind == "delete":
            assert not (tmp_path / "file").exists()
        else:
            assert (tmp_path / "file").read_bytes() != content


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:22178"), True),
        (jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Buffer Definition Event: Gloo AllReduce failed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("a fault was injected"), False),
    ],
)
def test_what_a_dead_peer_causes_is_no_bug(error, lost):
    """Found by `kills`: a process in a barrier of a save met the first one, and the launcher gave up."""
    assert bool(processes._is_of_runtime(error)) == lost
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert bool(processes._is_of_runtime(wrapped)) == lost


def test_where_a_run_went_on():
    text = "[0] resuming /a/run from step 6\n[0] step 7/9\n[0] resuming /a/run from step 12\n"
    assert resumed_from(text) == 12
    assert resumed_from("checkpoints: going back to step 3") is None


def test_the_page_has_every_row_once():
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.M) == list(ROWS)


def test_a_row_is_put_in_its_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n| `hang` | old |\n| `kills` | x |\n")
    update(page, "hang", line("hang", Result("it hangs", "it ends", 3, "it did", True, {})))
    assert page.read_text() == "a\n| `hang` | it hangs | it ends | 3 | it did | yes |\n| `kills` | x |\n"
    with pytest.raises(SystemExit, match="0 rows of clock"):
        update(page, "clock", "")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "rounds"), [("kills", 2), ("damage", 4), ("exception", 2), ("clock", 1)])
def test_rows(row, rounds, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "faults"  # one undisturbed run serves all
    assert main([row, "--rounds", str(rounds), "--folder", str(folder)]) == 0
    assert (folder / f"{row}.json").is_file() and f"| `{row}` |" in capsys.readouterr().out
