"""The list of files that is committed with a checkpoint: no file of it changes, shrinks or goes unnoticed."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.metadata import checkpoint as metadata_stores

from lckv_jax import checksums
from lckv_jax.checkpoint import open_checkpoints, restore, save
from lckv_jax.checksums import LIST, find_damage, write_checksums
from lckv_jax.config import RunConfig, build_config
from lckv_jax.step_folder import digest

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
CONFIG = build_config(RunConfig, dict(out="x", model=SIZES | {"sharing": "0_1"}, train=dict(steps=100)), "test")
STATE = {"params": {"embed": jnp.arange(64.0).reshape(8, 8)}, "count": jnp.float32(3)}
TIME = '"commit_timestamp_nsecs": '  # which the list cannot know


def save_steps(folder, *steps):
    with open_checkpoints(folder, 5) as manager:
        for step in steps:
            save(manager, STATE | {"step": jnp.int32(step)}, CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_steps(folder, 1, 2)
    return folder


def files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_what_was_saved_is_whole_also_where_it_is_copied(saved, tmp_path):
    assert find_damage(saved / "2") == ""
    shutil.copytree(saved / "2", tmp_path / "2")
    (tmp_path / "2" / ".nfs0001").write_text("what a file system leaves")
    assert find_damage(tmp_path / "2") == ""


def test_a_change_of_any_byte_of_any_file_is_found(saved, tmp_path):
    step = shutil.copytree(saved / "2", tmp_path / "2")
    for path in files(step):
        content = path.read_bytes()
        open_bytes = range(0)
        if path.name == "_CHECKPOINT_METADATA":
            start = content.index(TIME.encode()) + len(TIME)
            open_bytes = range(start, start + 19)
        for place in range(0, len(content), 1 + len(content) // 20):
            if place not in open_bytes:
                path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
                assert path.relative_to(step).as_posix() in find_damage(step), (path, place)
        path.write_bytes(content)
    assert find_damage(step) == ""


def test_a_file_that_is_cut_off_or_gone_is_found(saved, tmp_path):
    step = shutil.copytree(saved / "2", tmp_path / "2")
    for path in files(step):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert find_damage(step), path
        path.unlink()
        assert find_damage(step).endswith("is missing"), path
        path.write_bytes(content)


def test_of_a_large_file_the_size_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_WHOLE", 100)
    save_steps(tmp_path, 1)
    listed = json.loads((tmp_path / "1" / LIST).read_text().partition("\n")[2])
    large = [path for path, (size, digest) in listed.items() if size is not None and digest is None]
    assert large
    assert all(listed[path][0] > 100 for path in large)
    path = tmp_path / "1" / large[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert find_damage(tmp_path / "1") == f"{large[0]} differs from what was saved"


def resume(folder):
    """(step, reported lines) of a restore."""
    lines = []
    with open_checkpoints(folder, 5) as manager:
        _, meta = restore(manager, STATE | {"step": jnp.int32(0)}, report=lines.append)
    return meta["step"], lines


def falsify(step):
    """Changes a file that no reader needs."""
    marker = step / "params" / "commit_success.txt"
    marker.write_text(marker.read_text()[:-1] + "?")


def test_damage_where_no_reader_looks_costs_the_step_and_is_told(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    falsify(folder / "2")
    step, lines = resume(folder)
    assert step == 1
    assert lines[0] == "checkpoints: step 2 is unusable: params/commit_success.txt differs from what was saved"


def test_where_no_step_is_whole_the_newest_whose_leaves_agree_is_used(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    falsify(folder / "1")
    falsify(folder / "2")
    step, lines = resume(folder)
    assert step == 2
    assert [" ".join(line.split()[1:3]) for line in lines[:2]] == ["step 2", "step 1"]
    assert lines[2] == "checkpoints: going on all the same from the newest step whose leaves are as they were saved"
    assert resume(folder)[0] == 2  # nothing was set aside


def test_a_list_that_is_gone_is_damage_unless_the_step_is_older_than_lists(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / "2" / LIST).unlink()
    (folder / "1" / LIST).unlink()
    path = folder / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["checksums"], meta["digest"]
    path.write_text(json.dumps(meta | {"digest": digest(meta)}))
    step, lines = resume(folder)
    assert step == 1
    assert lines[0] == f"checkpoints: step 2 is unusable: its {LIST} is missing"


def test_the_list_waits_for_what_orbax_writes_late(tmp_path, monkeypatch):
    """It tells of the items in a thread of its own."""
    update = metadata_stores._MetadataStoreImpl.update

    def late(self, path, **entries):
        time.sleep(0.2)
        update(self, path, **entries)

    monkeypatch.setattr(metadata_stores._MetadataStoreImpl, "update", late)
    save_steps(tmp_path, 1)
    assert find_damage(tmp_path / "1") == ""


def test_what_lies_beside_the_save_is_no_part_of_it(tmp_path):
    """Copied there meanwhile, or left by a file system for a moment."""
    with open_checkpoints(tmp_path, 5) as manager:
        copied = tmp_path / f"7{ocp.utils.TMP_DIR_SUFFIX}"
        copied.mkdir()
        (copied / ".nfs01").write_text("")
        os.utime(copied, (0, 0))
        save(manager, STATE | {"step": jnp.int32(1)}, CONFIG)
    assert find_damage(tmp_path / "1") == ""
    assert not (copied / LIST).exists()


def test_hidden_files_are_not_listed(tmp_path):
    folder = tmp_path / f"3{ocp.utils.TMP_DIR_SUFFIX}"
    (folder / "params").mkdir(parents=True)
    (folder / "params" / ".nfs01").write_text("for a moment")
    (folder / "params" / "_METADATA").write_text("{}")
    write_checksums(tmp_path)
    assert list(json.loads((folder / LIST).read_text().partition("\n")[2])) == ["params/_METADATA"]


def test_a_damaged_step_is_not_kept_in_memory_beside_the_next(tmp_path):
    large = {"params": {"embed": jnp.zeros(2**18)}, "step": jnp.int32(0)}
    with open_checkpoints(tmp_path, 5) as manager:
        for step in (1, 2):
            save(manager, large | {"step": jnp.int32(step)}, CONFIG)
    falsify(tmp_path / "2")
    held = []

    def count(meta):
        held.append(sum(x.size == 2**18 for x in jax.live_arrays()))

    with open_checkpoints(tmp_path, 5) as manager:
        restore(manager, large, check=count, report=lambda _: None)
    assert held == [held[0]] * 2
