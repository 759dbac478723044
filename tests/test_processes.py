"""How processes fail and end together, and what they must agree on; each test runs a few of them, without a model."""

import textwrap

import pytest
from process_runs import run

JOIN = """
import os, sys, time
from lckv_jax import __main__ as command
from lckv_jax import step_folder
from lckv_jax.config import ProcessesConfig
from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.parallel.identity import Flags
me = int(os.environ["JAX_PROCESS_ID"])
def job(_):
    if me == 2:
        processes._POLL_SECONDS = 1.0  # the last one to hear
    processes.start(Flags(), ProcessesConfig(heartbeat_seconds=10, shutdown_seconds=2))
    processes.wait_for_all("start")
"""
END = """
train = command._COMMANDS["train"]
command._COMMANDS["train"] = train._replace(function=job)
command._leave(command.main(["train", "none"]))
"""


def ends(body, count, folder):
    return run(["-c", JOIN + textwrap.indent(textwrap.dedent(body), "    ") + END], count, folder, seconds=60)


def told(found):
    return "\n".join(f"--- {end.code}\n{end.text}" for end in found)


def test_all_hear_of_a_failure_before_process_0_goes(tmp_path):
    found = ends("""
        if me == 1:
            raise UserError("a mistake on purpose")
        time.sleep(30)
    """, 3, tmp_path)  # fmt: skip
    assert [end.code for end in found] == [2, 2, 2], told(found)
    assert all("a mistake on purpose" in end.text for end in found)


@pytest.mark.parametrize(
    ("last", "code"),
    [("time.sleep(5)", 0), ("raise UserError('a mistake on purpose')", 2)],
    ids=["takes longer than shutdown_seconds", "fails"],
)
def test_what_process_0_does_last_is_waited_for(tmp_path, last, code):
    found = ends(f"if me == 0:\n    time.sleep(0.5)\n    {last}", 2, tmp_path)
    assert [end.code for end in found] == [code, code], told(found)


def test_a_process_that_cannot_tell_why_still_ends_all(tmp_path):
    found = ends("""
        if me == 1:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1), os.dup2(full, 2)
            raise UserError("a mistake on purpose")
        time.sleep(30)
    """, 2, tmp_path)  # fmt: skip
    assert [end.code for end in found] == [2, 2], told(found)
    assert "a mistake on purpose" in found[0].text


def test_a_reader_that_is_gone_ends_all_without_another_try(tmp_path):
    found = ends("""
        if me == 0:
            raise BrokenPipeError
        time.sleep(30)
    """, 2, tmp_path)  # fmt: skip
    assert [end.code for end in found] == [130, 130], told(found)


def test_all_take_the_checkpoint_that_process_0_finds(tmp_path):
    """Another host may see a folder as it was before the last save."""
    for process, step in ((0, 1), (0, 2), (1, 1)):
        (tmp_path / str(process) / str(step) / "meta").mkdir(parents=True)
    found = ends(f"""
        from etils import epath
        folder = epath.Path({str(tmp_path)!r}) / str(me)
        print("took", step_folder.newest_usable(folder, lambda path: path.name, print))
    """, 2, tmp_path)  # fmt: skip
    assert [end.code for end in found] == [0, 0], told(found)
    assert all("took ('2', ())" in end.text for end in found), told(found)


def test_all_refuse_what_one_of_them_reads_damaged(tmp_path):
    """Where each process holds whole parameters, each reads them by itself."""
    found = ends("""
        step_folder._read_meta = lambda folder: {"leaves": {"params.x": ["float32", [], 7]}}
        step_folder._read = lambda folder, **items: {"params": {"x": 0}}
        step_folder.describe_leaves = lambda state: {"params.x": ["float32", [], 8 if me == 1 else 7]}
        try:
            step_folder.read_step(None, lambda meta: {"params": {"x": 0}})
        except step_folder.Unusable as problem:
            print("unusable:", problem)
    """, 2, tmp_path)  # fmt: skip
    assert "unusable: another process could not read it" in found[0].text, told(found)
    assert "unusable: params.x differs from what was saved" in found[1].text, told(found)
