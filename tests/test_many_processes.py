"""Runs over several processes: the same mathematics on any layout, and one end for all of them."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import yaml
from process_runs import Processes, run

from lckv_jax.checkpoint import load
from lckv_jax.train.metrics import read_metrics

MODEL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
    "head_dim": 8, "sharing": "0_2_2_3", "no_grad_passes": 1, "init_std": 0.1, "remat": "none",
}  # fmt: skip
STEPS = 10


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The config file of a run of 10 steps: an LCKV model, short documents packed into rows, already prepared."""
    folder = tmp_path_factory.mktemp("run")
    words = random.Random(0)
    for number in range(60):
        letters = words.choices("etaoin shrdlu", k=words.randrange(20, 400))
        (folder / f"{number:02}.txt").write_text("".join(letters))
    tree = {
        "out": "unused",
        "model": MODEL,
        "data": {"sources": f"{folder}/*.txt", "tokenizer": "bytes", "folder": str(folder / "data"), "seq_len": 32,
                 "batch_size": 8, "validation_fraction": 0.2},
        "optimizer": {"warmup_steps": 2, "learning_rate": 3e-3},
        "train": {"steps": STEPS, "eval_every": 5, "eval_batches": 2, "save_every": 5, "log_every": 1, "keep": 5},
        "processes": {"heartbeat_seconds": 10, "shutdown_seconds": 20},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    (done,) = run(["-m", "lckv_jax", "prepare", str(path)], 1, folder / "prepare")
    assert done.code == 0, done.text
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs for the runs of this module."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def train(settings, out, *overrides):
    return ["-m", "lckv_jax", "train", str(settings), f"out={out}", *overrides]


def records(out):
    return [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def losses(out):
    return np.array([record["loss"] for record in records(out)])


def grad_norms(out):
    return np.array([record["grad_norm"] for record in records(out)])


def text_of(ends):
    return "\n".join(f"--- {end.code}\n{end.text}" for end in ends)


@pytest.fixture(scope="module")
def alone(settings, cache, tmp_path_factory):
    """The folder of the run with one process and one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ends = run(train(settings, out), 1, out.parent, **cache)
    assert ends[0].code == 0, ends[0].text
    assert len(losses(out)) == STEPS
    assert losses(out)[-1] < losses(out)[0] - 0.5
    return out


LAYOUTS = [  # processes, devices of each, and the mesh
    (2, 1, {"data": 2}),
    (2, 2, {"data": 1, "fsdp": 4}),
    (2, 2, {"tensor": 4}),  # the tensor axis spans processes: both read all rows
    (4, 1, {"data": 2, "tensor": 2}),
    (4, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
]


def mesh_overrides(mesh):
    return [f"mesh.{axis}={size}" for axis, size in ({"data": 1, "fsdp": 1, "tensor": 1} | mesh).items()]


@pytest.mark.parametrize(("count", "devices", "mesh"), LAYOUTS)
def test_every_layout_trains_alike(settings, cache, alone, tmp_path, count, devices, mesh):
    out = tmp_path / "run"
    ends = run(train(settings, out, *mesh_overrides(mesh)), count, tmp_path, devices, **cache)
    assert [end.code for end in ends] == [0] * count, text_of(ends)
    np.testing.assert_allclose(losses(out), losses(alone), rtol=0, atol=5e-5)
    np.testing.assert_allclose(grad_norms(out), grad_norms(alone), rtol=1e-3)
    assert not any(re.search("step|loss|attention", end.text) for end in ends[1:])  # the first one talks


def test_a_run_goes_on_with_other_processes(settings, cache, alone, tmp_path):
    """2 processes save, the same layout goes on bit for bit, 1 and 4 processes up to rounding."""
    meshes = {"2": (2, 2, {"fsdp": 4}), "1": (1, 1, {}), "4": (4, 1, {"data": 2, "tensor": 2})}
    for name in ("whole", "begun"):
        command = train(settings, tmp_path / name, *mesh_overrides(meshes["2"][2]))
        if name == "begun":
            command = ["tests/faulty_train.py", "saved", "1", "10", *command[2:]]  # the 8th step: 2 batches validate
        ends = run(command, 2, tmp_path / f"{name}-logs", 2, **cache)
        assert {end.code for end in ends} == {0 if name == "whole" else 2}, text_of(ends)
    assert sorted(path.name for path in (tmp_path / "begun" / "checkpoints").iterdir()) == ["5"]
    for name, (count, devices, mesh) in meshes.items():
        out = tmp_path / f"on-{name}"
        shutil.copytree(tmp_path / "begun", out)
        ends = run(train(settings, out, *mesh_overrides(mesh)), count, tmp_path / f"{name}-logs", devices, **cache)
        assert {end.code for end in ends} == {0}, text_of(ends)
        assert "resuming" in ends[0].text
        np.testing.assert_allclose(losses(out), losses(alone), rtol=0, atol=5e-5)
    ours, theirs = (load(tmp_path / name)[0] for name in ("whole", "on-2"))
    assert json.dumps(losses(tmp_path / "whole").tolist()) == json.dumps(losses(tmp_path / "on-2").tolist())
    np.testing.assert_array_equal(ours["layers"]["wq"], theirs["layers"]["wq"])
    np.testing.assert_array_equal(ours["embed"], theirs["embed"])


def test_sigterm_to_one_process_saves_and_ends_all(settings, cache, tmp_path):
    out = tmp_path / "run"
    endless = [f"train.{name}=100000" for name in ("steps", "eval_every", "save_every")]
    with Processes(train(settings, out, *endless), 2, tmp_path, **cache) as both:
        both.wait_for(0, "step +3/")
        both.signal(1)
        ends = both.ends(60)
    assert [end.code for end in ends] == [42, 42], text_of(ends)
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", ends[0].text)
    assert (out / "checkpoints" / step / "meta").is_dir()
    assert [record["step"] for record in records(out)] == list(range(1, int(step) + 1))
    assert not (out / "FATAL").exists()


def faulty(settings, out, fault, *overrides, step=4):
    return ["tests/faulty_train.py", fault, "1", str(step), *train(settings, out, *overrides)[2:]]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [("raise", 1, "RuntimeError: a fault on purpose"), ("user", 2, "a mistake on purpose; mend it")],
)
def test_a_failure_in_one_process_ends_all_with_its_words(settings, cache, tmp_path, fault, code, words):
    ends = run(faulty(settings, tmp_path / "run", fault), 2, tmp_path, **cache)
    assert [end.code for end in ends] == [code, code], text_of(ends)
    assert all(words in end.text for end in ends)
    assert ("Traceback" in ends[1].text) == (fault == "raise")
    assert abs(ends[0].at - ends[1].at) < 2
    assert words in (tmp_path / "run" / "FATAL").read_text()
    ends = run(train(settings, tmp_path / "run"), 2, tmp_path / "again", **cache)
    assert [end.code for end in ends] == [0, 0]
    assert not (tmp_path / "run" / "FATAL").exists()


def test_a_killed_process_takes_the_others_with_it(settings, cache, tmp_path):
    ends = run(faulty(settings, tmp_path / "run", "kill"), 2, tmp_path, **cache)
    assert [end.code for end in ends] == [134, 137], text_of(ends)
    assert ends[0].at - ends[1].at < 10 + 5  # the heartbeat, and 5 seconds
    assert not (tmp_path / "run" / "FATAL").exists()


def test_a_process_that_hangs_ends_all_with_their_stacks(settings, cache, tmp_path):
    command = faulty(settings, tmp_path / "run", "hang", "processes.hang_seconds=8")
    with Processes(command, 2, tmp_path, **cache) as both:
        both.wait_for(1, "FAULT hang")
        ends = both.ends(8 + 5)
    assert {end.code for end in ends} <= {142, 134} and 142 in {end.code for end in ends}, text_of(ends)
    assert "in faulty" in ends[1].text  # where it hung
    assert "Current thread" in ends[0].text or ends[0].code == 134


def test_processes_with_another_config_are_refused(settings, cache, tmp_path):
    out = tmp_path / "run"
    ends = run([train(settings, out), train(settings, out, "seed=1")], 2, tmp_path, **cache)
    assert [end.code for end in ends] == [2, 2], text_of(ends)
    assert all("another config or code than in process 0: seed 0 -> 1" in end.text for end in ends)
    assert not out.exists()


def test_processes_that_do_not_see_one_folder_are_refused(settings, cache, tmp_path):
    words = train(settings, "run")[2:]
    commands = [["tests/faulty_train.py", "elsewhere", str(number), str(tmp_path), *words] for number in range(2)]
    ends = run(commands, 2, tmp_path, **cache)
    assert [end.code for end in ends] == [2, 2], text_of(ends)
    assert "run of process 0 is not seen on" in ends[1].text


def test_a_process_that_does_not_come_is_waited_for_only_so_long(settings, cache, tmp_path):
    command = train(settings, tmp_path / "run", "processes.initialize_seconds=3")
    away = ["-c", "pass"]
    ends = run([command, away], 2, tmp_path, **cache)
    assert ends[0].code == 134, ends[0].text
    assert re.search(r"process 0 waited 3 s for all 2 processes to meet at 127\.0\.0\.1:\d+", ends[0].text)


def test_the_roll_call_tells_processes_devices_and_a_sum(tmp_path):
    ends = run(["-m", "lckv_jax", "processes"], 2, tmp_path, devices=2)
    assert [end.code for end in ends] == [0, 0], text_of(ends)
    assert "detected: variables; 2 process(es)" in ends[0].text
    assert len(re.findall(r"process [01]: .* 2 device\(s\): cpu", ends[0].text)) == 2
    assert "the sum of 1 to 4 over all devices is 10" in ends[0].text
