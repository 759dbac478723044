"""Checkpoints come back bit for bit or not at all: damage of any kind is noticed, said and survived."""

import errno
import os
import random
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lckv_jax import step_folder
from lckv_jax.checkpoint import load, newest_meta, open_checkpoints, restore, save
from lckv_jax.config import RunConfig, build_config
from lckv_jax.errors import UserError

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4)
TREE = dict(out="x", model=SIZES | {"sharing": "0_2_2s"}, train=dict(steps=100, no_grad_passes_schedule=[[0, 2]]))
CONFIG = build_config(RunConfig, TREE, "test")
DECAYED = {"embed": True, "layers": {"wq": True}, "final_norm": False}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mask=DECAYED))


def make_state(step):
    """A train state whose leaves are of several dtypes and depend on the step."""
    rng = np.random.default_rng(step)
    params = {
        "embed": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
        "layers": {"wq": jnp.asarray(rng.normal(size=(3, 32, 2, 4)), jnp.bfloat16)},
        "final_norm": jnp.ones(32),
    }
    _, opt = OPTIMIZER.update(params, OPTIMIZER.init(params), params)
    return {"params": params, "opt": opt, "step": jnp.int32(step)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_steps(folder, *steps, keep=5):
    with open_checkpoints(folder, keep) as manager:
        for step in steps:
            save(manager, make_state(step), CONFIG, manifest="hash of shards", tokenizer="print")


def restore_lines(folder, target=None, **kwargs):
    """(state, meta, reported lines) of a restore."""
    lines = []
    with open_checkpoints(folder, 5) as manager:
        return *restore(manager, target or abstract(make_state(0)), report=lines.append, **kwargs), lines


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same_state(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert bits(left) == bits(right)


def data_file(step_folder, item="params"):
    """The largest file of an item: array data."""
    return max((step_folder / item).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_round_trip_is_exact_and_carries_what_a_resume_compares(tmp_path):
    save_steps(tmp_path, 1, 2)
    state, meta, lines = restore_lines(tmp_path)
    assert_same_state(state, make_state(2))
    assert (lines, build_config(RunConfig, meta["config"], "meta")) == ([], CONFIG)
    facts = {"step": 2, "sharing": "0_2_2s", "manifest": "hash of shards", "tokenizer": "print"}
    assert meta | facts == meta and meta["versions"]["jax"] == jax.__version__


def test_no_checkpoint_is_none_and_an_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "50").mkdir()
    with open_checkpoints(tmp_path, 2) as manager:
        assert restore(manager, abstract(make_state(0))) is None
        save(manager, make_state(10), CONFIG)  # orbax alone would refuse a step below 50
    (tmp_path / "60").mkdir()
    assert restore_lines(tmp_path)[1]["step"] == 10


def test_buffers_may_be_donated_while_the_save_is_in_flight(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with open_checkpoints(tmp_path, 2) as manager:
        state = make_state(3)
        save(manager, state, CONFIG)
        jax.block_until_ready(overwrite(state))
    assert_same_state(restore_lines(tmp_path)[0], make_state(3))


WRITE_THAT_FAILS = """
import errno, os, resource, sys
import jax.numpy as jnp, numpy as np
from test_checkpoint import CONFIG, make_state
from lckv_jax.checkpoint import finish_saving, open_checkpoints, save
from lckv_jax.errors import UserError

ballast = jnp.asarray(np.random.default_rng(0).random((1000, 1000)))
def attempt(moment):
    with open_checkpoints(sys.argv[1], 2) as manager:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))  # as if the disk were full
        save(manager, make_state(2) | {"ballast": ballast}, CONFIG)
        if moment == "wait":
            finish_saving(manager)
        if moment == "save":
            save(manager, make_state(3), CONFIG)

with open_checkpoints(sys.argv[1], 2) as manager:
    save(manager, make_state(1), CONFIG)
for moment in ("wait", "save", "close"):
    try:
        attempt(moment)
    except UserError as error:
        print(moment, error)
"""


def test_a_write_that_fails_is_one_sentence_and_the_last_good_checkpoint_stays(tmp_path):
    child = run_python(WRITE_THAT_FAILS, tmp_path / "run")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")  # no pages of stacks
    sentence = (
        f"{tmp_path / 'run'}: a checkpoint could not be written: File too large; the last good one is of step 1; "
        "mend that and run the same command again"
    )
    assert out.splitlines() == [f"{moment} {sentence}" for moment in ("wait", "save", "close")]
    state, _, lines = restore_lines(tmp_path / "run")
    assert_same_state(state, make_state(1))
    assert lines == [] and steps_in(tmp_path / "run") == [1]


def test_an_error_that_is_not_the_systems_stays_what_it_is(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path, 2) as manager:

        def fail(*arguments, **keywords):
            raise TypeError("a bug")

        monkeypatch.setattr(manager, "save", fail)
        with pytest.raises(TypeError, match="a bug"):
            save(manager, make_state(1), CONFIG)


def test_retention_keeps_the_newest(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps_in(tmp_path) == [3, 4]


def test_retention_keeps_the_best_across_restarts(tmp_path):
    """The losses of an earlier process are read from the metadata; NaN is never best, nor is a damaged step."""
    losses = {1: 0.5, 2: 0.2, 3: float("nan"), 4: 3.0, 5: None, 6: 0.4, 7: 9.0}
    held = []
    for step, loss in losses.items():
        with open_checkpoints(tmp_path, 2, 1) as manager:
            save(manager, make_state(step), CONFIG, manifest="hash of shards", valid_loss=loss)
        held.append(steps_in(tmp_path))
    assert held == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
    falsify(tmp_path / "2")
    with open_checkpoints(tmp_path, 2, 1) as manager:
        save(manager, make_state(8), CONFIG, valid_loss=8.0)
    assert steps_in(tmp_path) == [6, 7, 8]
    assert restore_lines(tmp_path)[1]["valid_loss"] == 8.0


def test_retention_in_one_process(tmp_path):
    with open_checkpoints(tmp_path, 1, 2) as manager:
        for step, loss in ((1, 0.5), (2, 0.2), (3, float("inf")), (4, 0.3), (5, 0.9)):
            save(manager, make_state(step), CONFIG, valid_loss=loss)
    assert steps_in(tmp_path) == [2, 4, 5]


def test_newest_meta(tmp_path):
    assert newest_meta(tmp_path / "absent") is None
    save_steps(tmp_path, 1, 2)
    assert newest_meta(tmp_path)["step"] == 2
    falsify(tmp_path / "2")
    assert newest_meta(tmp_path)["step"] == 1
    shutil.rmtree(tmp_path / "1" / "meta")
    assert newest_meta(tmp_path) is None


def test_a_step_that_orbax_would_skip_in_silence_is_an_error(tmp_path):
    with open_checkpoints(tmp_path, 3) as manager:
        save(manager, make_state(5), CONFIG)
        for step in (5, 4):
            with pytest.raises(RuntimeError, match=f"step {step} was not saved: .* holds step 5"):
                save(manager, make_state(step), CONFIG)


def test_flipped_bits_fall_back_and_say_so(tmp_path):
    save_steps(tmp_path / "whole", 1, 2)
    fallen, rng = 0, random.Random(0)
    for trial in range(8):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(trial))
        path = data_file(folder / "2", "params" if trial % 2 else "rest")
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        state, meta, lines = restore_lines(folder)
        assert_same_state(state, make_state(meta["step"]))  # whatever was hit: never a wrong number
        if meta["step"] == 1:
            fallen += 1
            assert lines[0].startswith("checkpoints: step 2 is unusable: ")
            assert lines[1:] == [
                "checkpoints: going back to step 1; moved the unusable 2 to " + f"{folder.name}.unusable/"
            ]
            assert steps_in(folder) == [1]
    assert fallen >= 6


DTYPES = ("float32", "bfloat16", "float16", "int8", "bool", "uint32", "float64", "int64")


def test_one_bit_of_every_dtype_is_guarded(tmp_path):
    """The parameters of step 2 are replaced by ones that load, but differ in one bit of one leaf."""
    with jax.enable_x64(True):
        params = {name: jnp.arange(6).reshape(2, 3).astype(name) for name in DTYPES} | {"scalar": jnp.float32(0.5)}
        state = {"params": params, "step": jnp.int32(2)}
        with open_checkpoints(tmp_path / "run", 5) as manager:
            save(manager, state | {"step": jnp.int32(1)}, CONFIG)
        for name, leaf in params.items():
            with open_checkpoints(tmp_path / "run", 5) as manager:
                save(manager, state, CONFIG)
            assert restore_lines(tmp_path / "run", abstract(state))[1]["step"] == 2
            array = np.array(leaf)
            array.reshape(-1).view(np.uint8)[-1] ^= 1 if name == "bool" else 128  # little endian: the sign
            with open_checkpoints(tmp_path / name, 1) as manager:
                save(manager, state | {"params": params | {name: jnp.asarray(array)}}, CONFIG)
            shutil.rmtree(tmp_path / "run" / "2" / "params")
            shutil.copytree(tmp_path / name / "2" / "params", tmp_path / "run" / "2" / "params")
            _, meta, lines = restore_lines(tmp_path / "run", abstract(state))
            assert meta["step"] == 1
            assert lines[0] == f"checkpoints: step 2 is unusable: params.{name} differs from what was saved"


def truncate(folder):
    path = data_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def falsify(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace("hash of shards", "hash of shreds"))


DAMAGES = {
    "truncated": truncate,
    "falsified": falsify,
    "deleted": lambda folder: data_file(folder).unlink(),
    "emptied": lambda folder: data_file(folder, "rest").write_bytes(b""),
    "no parameters": lambda folder: shutil.rmtree(folder / "params"),
    "no metadata": lambda folder: shutil.rmtree(folder / "meta"),
    "half metadata": lambda folder: (folder / "meta" / "metadata").write_text('{"step": 3, "dig'),
    "no tree": lambda folder: (folder / "params" / "_METADATA").write_text("{}"),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_other_damage_falls_back_past_several_steps_and_saving_goes_on(tmp_path, damage):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    damage(tmp_path / "2")
    lines = []
    with open_checkpoints(tmp_path, 5) as manager:
        state, _ = restore(manager, abstract(make_state(0)), report=lines.append)
        assert_same_state(state, make_state(1))
        steps = [
            "step 3 is unusable",
            "step 2 is unusable",
            f"going back to step 1; moved the unusable 3, 2 to {tmp_path.name}.unusable/",
        ]
        assert [line.split(": ")[1] for line in lines] == steps
        assert all(len(line) < 240 and "\n" not in line for line in lines)
        save(manager, make_state(2), CONFIG)
    aside = tmp_path.parent / f"{tmp_path.name}.unusable"
    assert sorted(path.name for path in aside.iterdir()) == ["2", "3"]  # nothing is thrown away
    state, _, lines = restore_lines(tmp_path)
    assert_same_state(state, make_state(2))
    assert lines == []


def test_when_nothing_is_usable_it_stops_and_deletes_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in ("1", "2"):
        truncate(tmp_path / step)
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is usable \(step 2: .*start afresh"):
        restore_lines(tmp_path)
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)}, r"float32\[64, 32\] there but bfloat16\[64, 32\]"),
        ({"embed": jax.ShapeDtypeStruct((64, 16), jnp.float32)}, r"float32\[64, 32\] there but float32\[64, 16\]"),
        ({"head": jax.ShapeDtypeStruct((32, 64), jnp.float32)}, r"params\.head is absent there but float32\[32, 64\]"),
        ({"final_norm": {}}, r"params\.final_norm is float32\[32\] there but absent in this run"),
    ],
)
def test_another_tree_dtype_or_shape_is_refused_at_once(tmp_path, change, message):
    save_steps(tmp_path, 1, 2)
    target = abstract(make_state(0))
    with pytest.raises(UserError, match=message):
        restore_lines(tmp_path, target | {"params": target["params"] | change})
    assert steps_in(tmp_path) == [1, 2]


def test_the_caller_may_refuse_a_step_by_its_metadata(tmp_path):
    save_steps(tmp_path, 1, 2)

    def check(meta):
        raise UserError(f"step {meta['step']} was trained on {meta['manifest']}")

    with pytest.raises(UserError, match="step 2 was trained on hash of shards"):
        restore_lines(tmp_path, check=check)
    assert steps_in(tmp_path) == [1, 2]


def test_folder_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot hold checkpoints"), open_checkpoints(tmp_path / "file" / "steps", 2):
        pass


def test_load_a_run_and_a_step(tmp_path, monkeypatch):
    save_steps(tmp_path / "checkpoints", 1, 2)
    for folder, step in ((tmp_path, 2), (str(tmp_path / "checkpoints" / "1"), 1)):
        params, config, tokenizer = load(folder)
        assert_same_state(params, make_state(step)["params"])
        assert isinstance(params["embed"], jax.Array)
        assert (config, tokenizer) == (CONFIG, None)
    read = lambda folder: types.SimpleNamespace(fingerprint=(folder / "tokenizer.model").read_text())  # noqa: E731
    monkeypatch.setitem(sys.modules, "lckv_jax.data.tokenizer", types.SimpleNamespace(find_tokenizer=read))
    (tmp_path / "tokenizer.model").write_text("print")
    for folder in (tmp_path, tmp_path / "checkpoints" / "1"):
        assert load(folder)[2].fingerprint == "print"
    (tmp_path / "tokenizer.model").write_text("another")
    with pytest.raises(UserError, match="not the tokenizer that the run was trained with"):
        load(tmp_path)


def test_load_gives_the_average_of_the_parameters_where_there_is_one(tmp_path):
    state = make_state(1) | {"ema": make_state(7)["params"]}
    with open_checkpoints(tmp_path / "checkpoints", 5) as manager:
        save(manager, state, CONFIG)
    assert_same_state(load(tmp_path)[0], make_state(7)["params"])
    assert_same_state(restore_lines(tmp_path / "checkpoints", abstract(state))[0], state)


def test_load_reads_the_parameters_only_and_changes_nothing(tmp_path):
    save_steps(tmp_path / "checkpoints", 1, 2)
    (leftover := tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # a save in flight, maybe
    for item in ("1", "2"):
        shutil.rmtree(tmp_path / "checkpoints" / item / "rest")
    truncate(tmp_path / "checkpoints" / "2")
    assert_same_state(load(tmp_path, report=(lines := []).append)[0], make_state(1)["params"])
    assert len(lines) == 1 and lines[0].startswith("checkpoints: step 2 is unusable: ")
    assert steps_in(tmp_path / "checkpoints") == [1, 2] and leftover.exists()
    with pytest.raises(UserError, match=r"checkpoints/2: cannot be read .*; give another step"):
        load(tmp_path / "checkpoints" / "2")


def test_load_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="neither a run folder"):
        load(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load(tmp_path)


ON_FOUR_DEVICES = """
import os, sys
from pathlib import Path
import absl.logging, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_checkpoint import CONFIG, abstract, bits, make_state, truncate
from lckv_jax.checkpoint import open_checkpoints, restore, save

absl.logging.set_verbosity("info")  # as some libraries do
folder = Path(sys.argv[1])
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
def place(x):
    return NamedSharding(mesh, {2: P("fsdp", "tensor"), 4: P(None, "fsdp", "tensor")}.get(x.ndim, P()))
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state(0))

with open_checkpoints(folder, 5) as manager:
    state, meta = restore(manager, target)
    assert bits(state) == bits(make_state(1))
    assert state["params"]["embed"].sharding == place(state["params"]["embed"])
    for step in (2, 3):
        save(manager, jax.tree.map(lambda x: jax.device_put(x, place(x)), make_state(step)), CONFIG)
truncate(folder / "3")
with open_checkpoints(folder, 5) as manager:
    state, meta = restore(manager, target)
    assert bits(state) == bits(make_state(2))
manager = open_checkpoints(folder, 5).__enter__()
save(manager, make_state(9) | {"ballast": jax.numpy.asarray(np.random.default_rng(0).random((4000, 4000)))}, CONFIG)
while not (left := list(folder.glob("*.orbax-checkpoint-tmp"))):
    pass
print("killed", left[0].name, flush=True)
os._exit(9)
"""


def run_python(script, *arguments, flags=""):
    here = Path(__file__).resolve().parent
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    warnings = ["-W", "always::DeprecationWarning:lckv_jax.checkpoint"]
    command = [sys.executable, *warnings, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_other_mesh_killed_save_and_a_quiet_terminal(tmp_path):
    """A step of one device is restored on four, and back; a process killed in a save leaves nothing behind."""
    save_steps(tmp_path, 1)
    child = run_python(ON_FOUR_DEVICES, tmp_path, flags="--xla_force_host_platform_device_count=4")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (9, "")
    told, gone_back, killed = out.splitlines()
    assert told.startswith("checkpoints: step 3 is unusable: ")
    assert (gone_back, killed) == (
        f"checkpoints: going back to step 2; moved the unusable 3 to {tmp_path.name}.unusable/",
        "killed 9.orbax-checkpoint-tmp",
    )
    assert (tmp_path / "9.orbax-checkpoint-tmp").exists()
    with open_checkpoints(tmp_path, 5) as manager:
        assert_same_state(restore(manager, abstract(make_state(0)))[0], make_state(2))
        save(manager, make_state(4), CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "4"]


IN_TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process = int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, process)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_checkpoint import CONFIG, abstract, make_state
from lckv_jax import checkpoint, step_folder

mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
def spread(x):
    sharding = NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])

read = step_folder._read
def read_or_fail(folder, **items):
    if process == 1 and folder.name == "2" and "params" in items:
        raise OSError("the disk of process 1 is gone")
    return read(folder, **items)
step_folder._read = read_or_fail

with checkpoint.open_checkpoints(sys.argv[1], 5) as manager:
    for step in (1, 2):
        checkpoint.save(manager, jax.tree.map(spread, make_state(step)), CONFIG)
    state, meta = checkpoint.restore(manager, abstract(jax.tree.map(spread, make_state(0))))
    for ours, whole in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(1))):
        for shard in ours.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(whole)[shard.index].tobytes()
print("step", meta["step"], int(meta["leaves"]["params.embed"][2]))
"""


def test_two_processes_fall_back_together(tmp_path):
    """A step that only one process cannot read is left by both; the fingerprints are those of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [run_python(IN_TWO_PROCESSES, tmp_path, port, process) for process in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    _, meta, _ = restore_lines(tmp_path)
    lines = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outputs]
    back = [
        f"checkpoints: going back to step 1; moved the unusable 2 to {tmp_path.name}.unusable/",
        f"step 1 {meta['leaves']['params.embed'][2]}",
    ]
    assert lines[0] == ["checkpoints: step 2 is unusable: another process could not read it", *back]
    assert "the disk of process 1 is gone" in lines[1][0] and lines[1][1:] == back
    assert steps_in(tmp_path) == [1]


def test_a_disk_that_fails_to_read_costs_no_checkpoint(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)

    def failing(*arguments, **keywords):
        raise OSError(errno.EIO, "Input/output error", "some/file")

    with monkeypatch.context() as patch:
        patch.setattr("lckv_jax.step_folder._read", failing)
        with pytest.raises(UserError, match="some/file cannot be read: Input/output error; mend that"):
            restore_lines(tmp_path)
    assert steps_in(tmp_path) == [1, 2]
    assert restore_lines(tmp_path)[1]["step"] == 2


def test_steps_that_a_live_run_removes_and_saves_meanwhile_are_no_damage(tmp_path):
    """Between listing and reading, the run saved step 2 and let go of step 1."""
    folder = tmp_path / "run" / "checkpoints"
    save_steps(folder, 1, keep=1)

    lines, reads, later = [], step_folder.read_meta, [2]

    def late(step):
        if later:
            save_steps(folder, later.pop(), keep=1)
        return reads(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_folder, "read_meta", late)
        params, _, _ = load(tmp_path / "run", report=lines.append)
    assert bits(params) == bits(make_state(2)["params"]) and lines == []


def test_wide_numbers_are_no_damage(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    jax.config.update("jax_enable_x64", True)
    try:
        with open_checkpoints(folder, 1) as manager:
            save(manager, {"params": {"embed": jnp.ones(3, jnp.float64)}, "step": jnp.int32(1)}, CONFIG)
    finally:
        jax.config.update("jax_enable_x64", False)
    with pytest.raises(UserError, match="holds float64 numbers; set JAX_ENABLE_X64=1"):
        load(tmp_path / "run")
