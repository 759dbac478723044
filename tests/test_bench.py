"""`bench`: cells that tell the truth about bytes and memory, kept whatever happens, and one sentence for mistakes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from lckv_jax.__main__ import main
from lckv_jax.config import build_config
from lckv_jax.decode import bench, bench_cell, bench_programs, bench_record, capacity, loop
from lckv_jax.decode.bench_programs import (
    abstract_weights,
    compile_needs,
    generation,
    plan_work,
    random_prompts,
    random_weights,
    read_per_step,
    tree_bytes,
)
from lckv_jax.decode.bench_record import Cell, Identity
from lckv_jax.decode.bench_table import table
from lckv_jax.decode.cache import bytes_held
from lckv_jax.decode.generate import generate
from lckv_jax.decode.spec import CellsSpec
from lckv_jax.decode.step import decode_weights
from lckv_jax.model.transformer import init_params
from lckv_jax.model_config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "configs" / "bench").glob("*.yaml"))
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
CONFIG = """
out: {out}
model: {sizes}
maps: {{standard: standard, mine: "1_1"}}
caches: [full, "sinks(2,4)+int8"]
lengths: [[6, 7]]
batches: [1, largest]
memory_gb: 0.0005
"""
FACTS = {"parameters", "device", "versions", "commit", "repeats", "random_weights", "started"}
RESULTS = {  # the shared schema
    "prefill_ms", "passes_used", "residual", "decode_step_ms", "decode_tokens_per_s", "tokens_per_s", "compile_s",
    "peak_bytes", "peak_bytes_kind", "cache_bytes_held", "cache_bytes_read_per_step", "weight_bytes_read_per_step",
    "copy_bandwidth", "copy_bandwidth_how", "share_of_roofline", "largest", "memory_model_bytes",
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(CONFIG.format(out=tmp_path / "out", sizes=SIZES))
    return path


@pytest.fixture(autouse=True)
def plotted(monkeypatch):
    """The records that were handed over to be drawn, which is tested elsewhere."""
    calls = []
    module = types.ModuleType("lckv_jax.decode.bench_plots")
    module.plot = lambda records, folder: calls.append(records) or []
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def model(sharing="standard", **changes):
    return build_config(ModelConfig, SIZES | {"sharing": sharing} | changes, "model")


def cell(sharing="standard", cache="full", batch=2, cap=None, prompt=6, new=7):
    identity = Identity(
        model="mine",
        decoder="lckv_jax",
        sharing=str(model(sharing).sharing),
        cache=cache,
        dtype="float32",
        prompt=prompt,
        new=new,
        batch=batch,
        passes="trained",
        memory_cap_bytes=cap,
    )
    return Cell(identity=identity, model=model(sharing), repeats=5, bucket=None, sample=None, seed=0)


# ---------------------------------------------------------------- a cell


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr(bench_record, "COPY_BYTES", 2**16)


def test_a_record_is_complete_and_its_bytes_are_those_of_the_formulas(small_copies):
    record = bench_cell.measure(cell("1_1"))
    assert set(record) == {"identity", "facts", "results", "error"} and record["error"] is None
    assert set(record["facts"]) >= FACTS
    params = init_params(model("1_1"), jax.random.key(0))
    assert record["facts"]["parameters"] == tree_bytes(params) // 4
    results = record["results"]
    assert set(results) == RESULTS
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    # 2 rows of 6 + 7 cells in 1 slot, which 2 layers read: float32 keys and values of 1 head of 8, and a position
    assert results["cache_bytes_held"] == 2 * 13 * 68
    assert results["cache_bytes_read_per_step"] == 2 * 2 * 13 * 68
    weights = decode_weights(params, model("1_1"))
    read = tree_bytes(weights) - 4 * 64 * 16
    assert results["weight_bytes_read_per_step"] == read
    moved = read + results["cache_bytes_read_per_step"] + 2 * 64
    step = results["decode_step_ms"]
    assert results["share_of_roofline"] == pytest.approx(
        moved / (step["median"] / 1e3) / results["copy_bandwidth"], rel=1e-3
    )
    assert step["min"] <= step["median"] <= step["max"]
    assert results["decode_tokens_per_s"] == pytest.approx(2e3 / step["median"])
    assert results["tokens_per_s"] < results["decode_tokens_per_s"]
    assert results["passes_used"] == 9.0
    assert results["memory_model_bytes"] == results["peak_bytes"] > tree_bytes(weights)


def test_the_largest_batch_runs_and_is_named_where_another_does_not_fit(monkeypatch, small_copies):
    largest = bench_cell.measure(cell(batch="largest", cap=300_000))
    batch = largest["identity"]["batch"]
    assert largest["results"]["largest"] and batch > 1
    assert largest["results"]["memory_model_bytes"] <= 300_000
    monkeypatch.setattr(bench_cell, "_largest", lambda work, limit: batch)
    unfit = bench_cell.measure(cell(batch=4 * batch, cap=300_000))
    assert unfit["results"] is None and unfit["identity"]["batch"] == 4 * batch
    assert re.fullmatch(
        rf"does not fit: a batch of {4 * batch} needs [\d.]+ MB of 0.30 MB \(a cap, emulated by what compiled programs "
        rf"need\); the largest that does is {batch}",
        unfit["error"],
    )


def test_weights_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(bench_cell, "compile_needs", lambda *_, **__: 5_000_000)
    error = bench_cell.measure(cell(batch="largest", cap=1_000_000))["error"]
    assert error.startswith("does not fit: a batch of 1 needs 5.00 MB of 1.00 MB")


def test_memory_that_the_device_lacks_steps_down(monkeypatch, small_copies):
    """The analysis is a lower bound where an allocator has holes: what it lets through is confirmed by running."""
    tried = []

    def run(cell, work, limit, fitted):
        tried.append(fitted.batch)
        if len(tried) < 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"batch": fitted.batch}

    monkeypatch.setattr(bench_cell, "_run", run)
    monkeypatch.setattr(bench_cell, "_largest", lambda work, limit: 100)
    monkeypatch.setattr(bench_cell, "compile_needs", lambda *_, **__: 1)
    record = bench_cell.measure(cell(batch="largest"))
    assert tried == [100, 97, 94] and record["identity"]["batch"] == 94
    tried.clear()
    error = bench_cell.measure(cell(batch=50))["error"]
    assert tried == [50]
    assert error.startswith("does not fit: by analysis a batch of 50 needs 0.00 MB of") and "when it ran" in error


def test_copy_bandwidth_moves_every_byte(monkeypatch, small_copies):
    copied = []
    real = np.copyto
    monkeypatch.setattr(bench_record.np, "copyto", lambda into, x: (copied.append(x.nbytes), real(into, x)))
    rate, how = bench_cell.copy_bandwidth(10**9)
    assert rate > 0 and "numpy.copyto" in how
    assert sum(copied) == (1 + bench_record.COPIES) * 2**16


def test_copies_fit_into_a_cap(monkeypatch):
    """What a small cap has no room for is no reason to say that the batch does not fit."""
    sizes = []
    real = bench_cell._device_copy_bandwidth
    monkeypatch.setattr(bench_cell, "_device_copy_bandwidth", lambda size: sizes.append(size) or real(2**20))
    monkeypatch.setattr(bench_cell.jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
    rate, how = bench_cell.copy_bandwidth(2 * 10**9)
    assert rate > 0 and "a jitted copy of 1 MiB" in how
    bench_cell.copy_bandwidth(10**11)
    assert sizes == [2 * 10**9 // 8, 2**31]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [(cell(cache="kivi(2,3,6)"), "groups of 3"), (cell(), "not finite; choose a smaller model.init_std")],
)
def test_what_a_cell_cannot_be_is_its_error(wanted, words, monkeypatch, small_copies):
    real = bench_cell.generation
    monkeypatch.setattr(bench_cell, "generation", lambda *a: real(*a)._replace(finite=False))
    record = bench_cell.measure(wanted)
    assert record["results"] is None and words in record["error"]


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize(("sharing", "cache"), [("standard", "full"), ("1_1", "sinks(2,4)+int8")])
def test_what_is_timed_is_what_generate_does(sharing, cache, monkeypatch):
    """The same tokens, whatever the sizes of the cache on the way."""
    config = model(sharing)
    params = init_params(config, jax.random.key(1))
    work = plan_work(config, cache, 6, 7, "exact", 8, None)
    tokens_BT, keys_B = random_prompts(work, 3, 0)
    seen = []
    real = jax.device_get
    monkeypatch.setattr("lckv_jax.decode.bench_programs.jax.device_get", lambda x: seen.append(real(x)) or seen[-1])
    timing = generation(work, decode_weights(params, config), tokens_BT, keys_B)
    assert timing.finite and timing.prefill > 0 and timing.decode > 0
    new = np.concatenate([np.atleast_2d(chosen.token) for chosen in seen[0]]).T
    assert new.tolist() == generate(params, config, np.asarray(tokens_BT).tolist(), 7, cache=cache)


def test_segments_of_a_growing_cache():
    work = plan_work(model("1_1"), "full", 6, 12, "trained", 4, None)
    assert [(segment.specs[0].cells, segment.steps, segment.timed) for segment in work.segments] == [
        (8, 2, 2), (12, 4, 4), (16, 4, 4), (18, 1, 1)
    ]  # fmt: skip
    assert work.steps == 11
    assert read_per_step(work, 5) == 5 * 2 * 68 * (2 * 8 + 4 * 12 + 4 * 16 + 18) / 11
    sampled = plan_work(model("1_1"), "full", 6, 12, "trained", 4, 3)
    assert [segment.timed for segment in sampled.segments] == [2, 3, 3, 1]
    assert read_per_step(sampled, 5) == read_per_step(work, 5)
    (only,) = plan_work(model("1_1"), "window(4)", 6, 12, "trained", 4, None).segments
    assert only.specs[0] == CellsSpec(1, 4, True, 0, 4, "raw") and only.steps == 11
    sizes = [segment.specs[0].cells for segment in plan_work(model(), "full", 5, 8187, "trained", None, 32).segments]
    assert sizes == [1024 * n for n in range(1, 9)]


def test_random_weights_are_those_of_a_fresh_model_in_shape_and_spread():
    config = model("1_1", dtype="bfloat16", attention_bias=True, init_std=0.05)
    weights, real = random_weights(config, 3), decode_weights(init_params(config, jax.random.key(0)), config)
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(f"{x.shape}"), weights, real)
    assert jax.tree.structure(weights) == jax.tree.structure(real)
    assert np.all(np.asarray(weights.final_norm_D) == 1.0) and np.all(np.asarray(weights.layers[1]["mlp_norm"]) == 1.0)
    for x in jax.tree.leaves((weights.embed_VD, weights.head, weights.layers[1]["down"])):
        assert np.std(np.asarray(x, np.float32)) == pytest.approx(0.05, rel=0.2)
    assert not np.array_equal(*(layer["gate_up"].array for layer in weights.layers[:2]))
    assert not np.array_equal(weights.embed_VD, random_weights(config, 4).embed_VD)


def test_large_weights_are_made_first(monkeypatch):
    """So that the peak of a cell's memory is never that of making them."""
    sizes = []
    real = bench_programs._normal
    monkeypatch.setattr(bench_programs, "_normal", lambda *a: sizes.append(np.prod(a[2])) or real(*a))
    random_weights(model(), 0)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_groups_of_prompts_are_not_there_twice(monkeypatch):
    """While one is computed the others are in their places: the analysis counts on it."""
    work, alive = plan_work(model(), "full", 6, 3, "trained", None, None), []
    monkeypatch.setattr(loop, "_GROUP_TOKENS", 12)
    weights, (tokens_BT, keys_B) = random_weights(work.model, 0), random_prompts(work, 8, 0)
    real = loop.prefill_group
    monkeypatch.setattr(loop, "prefill_group", lambda *a: alive.append(cells_alive()) or real(*a))

    def cells_alive():
        return sum(x.shape[:1] == (2,) and x.ndim == 4 for x in jax.live_arrays())

    before = cells_alive()
    generation(work, weights, tokens_BT, keys_B)
    assert alive == [before] * 4


# ---------------------------------------------------------------- capacity


@pytest.mark.parametrize(
    ("needs", "limit"),
    [
        (lambda n: 1000 + 7 * n, 10_000),
        (lambda n: 1000 + 7 * n, 10**7),
        (lambda n: 1000 + 7 * n + 500 * min(n, 64), 60_000),  # groups of rows: a steep start
        (lambda n: 1000 + 7 * n + 3000 * (n > 300), 5_000),  # a jump
        (lambda n: 1000 + 7 * (-(-n // 64) * 64), 9_000),  # steps
        (lambda n: 10 + n, 11),
    ],
)
@pytest.mark.parametrize("guess", [1, 40, 10**6])
def test_the_largest_batch_is_found_in_few_calls(needs, limit, guess):
    calls = []

    def counted(batch):
        calls.append(batch)
        return needs(batch)

    batch, size = capacity.largest_batch(counted, limit, guess)
    best = next(n for n in range(1, 2 * 10**6) if needs(n + 1) > limit)
    assert size == needs(batch) <= limit
    assert batch >= 0.98 * best - 1
    assert len(calls) <= 13 and len(set(calls)) == len(calls)


def test_nothing_fits():
    assert capacity.largest_batch(lambda n: 10 + n, 10, 5) == (0, 11)


def test_programs_need_weights_and_cache_at_least_and_grow_evenly():
    """What the search builds on."""
    work = plan_work(model(num_layers=1), "full", 4, 2000, "trained", None, 2)
    weights = abstract_weights(work.model)
    needs = {batch: compile_needs(work, weights, batch, every=False) for batch in (4, 8, 12)}
    for batch, size in needs.items():
        assert size >= tree_bytes(weights) + bytes_held(work.model, work.segments[-1].specs, batch)
    assert needs[8] == pytest.approx((needs[4] + needs[12]) / 2, rel=0.02)


# ---------------------------------------------------------------- the command


def record_of(asked, rate=100.0, batch=8):
    """What a process would write."""
    identity = asked["identity"] | {
        "batch": batch if asked["identity"]["batch"] == "largest" else asked["identity"]["batch"]
    }
    spread = {"median": 1.0, "min": 0.9, "max": 1.1}
    numbers = dict.fromkeys(RESULTS, 1.0) | {"prefill_ms": spread, "decode_step_ms": spread}
    numbers |= {
        "decode_tokens_per_s": rate,
        "tokens_per_s": rate / 2,
        "largest": asked["identity"]["batch"] == "largest",
    }
    facts = {"device": "a machine", "memory_limit": "the cap", "sample": None}
    return {"identity": identity, "facts": facts, "results": numbers, "error": None}


@pytest.fixture
def processes(monkeypatch):
    """Cells that were run, by stand-ins for the processes; what `act` does with one may be changed."""
    ran = types.SimpleNamespace(keys=[], act=record_of)

    def run(command, environment, output):
        asked = json.loads(Path(command[-2]).read_text())
        ran.keys.append(Path(command[-1]).stem)
        record = ran.act(asked)
        if record is None:
            output.write("Traceback\nSomeError: no luck\n")
            return 1
        Path(command[-1]).write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(bench, "_run", run)
    monkeypatch.setattr(bench, "_machine", lambda: {"device": "a machine", "platform": "cpu", "memory_bytes": 10**10})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    return ran


def test_finished_cells_are_kept_and_only_the_others_run(config, processes, plotted, tmp_path, capsys):
    assert main(["bench", str(config)]) == 0
    assert len(processes.keys) == 8 and len(plotted[0]) == 8
    everything = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [record["identity"]["model"] for record in everything["cells"]]
    assert names == ["standard", "standard", "mine", "mine"] * 2
    written = sorted(path.name for path in (tmp_path / "out" / "cells").iterdir())
    assert written == sorted(f"{key}.json" for key in processes.keys), "no log, no partial file"
    assert re.fullmatch(r"mine--sinks-2-4-int8--6\+7--blargest--[0-9a-f]{8}", processes.keys[-1]), processes.keys
    processes.keys.clear()
    assert main(["bench", str(config)]) == 0
    assert processes.keys == [] and len(plotted[1]) == 8
    (tmp_path / "out" / "cells" / written[3]).unlink()
    assert main(["bench", str(config)]) == 0
    assert processes.keys == [written[3].removesuffix(".json")]
    processes.keys.clear()
    assert main(["bench", str(config), "repeats=6", "batches=1"]) == 0
    assert len(processes.keys) == 4, "another setting is another cell"
    assert not set(f"{key}.json" for key in processes.keys) & set(written)


def test_failed_cells_are_told_and_tried_again(config, processes, tmp_path, capsys):
    def fail(asked):
        return None if asked["identity"]["model"] == "mine" else record_of(asked)

    processes.act = fail
    assert main(["bench", str(config), "batches=1"]) == 2
    said = capsys.readouterr()
    assert "2 of 4 cells have no numbers" in said.err and "SomeError: no luck" in said.err and "standard" in said.out
    (log, _) = (tmp_path / "out" / "cells").glob("mine*.log")
    assert "Traceback" in log.read_text()
    processes.act, processes.keys = record_of, []
    assert main(["bench", str(config), "batches=1"]) == 0
    assert len(processes.keys) == 2 and not list((tmp_path / "out" / "cells").glob("*.log"))


def test_the_table_compares_with_standard_at_equal_and_at_best_batch(config, processes, tmp_path, capsys):
    rates = {("standard", 1): 10.0, ("standard", "largest"): 40.0, ("mine", 1): 20.0, ("mine", "largest"): 60.0}

    def act(asked):
        name, batch = asked["identity"]["model"], asked["identity"]["batch"]
        return record_of(asked, rates[name, batch], {"standard": 8, "mine": 24}[name])

    processes.act = act
    assert main(["bench", str(config), "caches=full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 120
    assert sum("decode x" in line for line in lines) == 2
    assert any(re.match(r"mine +1  decode x2.00, all x2.00", line) for line in lines), lines
    best = r"mine +best  decode x1.50 \(batches 24 and 8\), all x1.50 \(batches 24 and 8\): each at its best batch$"
    assert any(re.match(best, line) for line in lines), lines
    assert any("in 0.0005 GB (the cap)" in line for line in lines)
    assert any(line.startswith("mine") and "24*" in line for line in lines)


def test_the_table_has_room_for_errors_and_for_what_peers_cannot_tell():
    asked = {"identity": cell().identity.model_dump()}
    peer = record_of(asked)
    peer["identity"]["decoder"] = "transformers dynamic"
    unknown = ("passes_used", "residual", "peak_bytes", "peak_bytes_kind", "memory_model_bytes")
    peer["results"] |= dict.fromkeys(unknown)
    broken = record_of(asked) | {"results": None, "error": "does not fit: so it is"}
    again = [record_of(asked), peer | {"identity": peer["identity"] | {"batch": 3}}]
    text = "\n".join(table([record_of(asked), peer, *again, broken]))
    assert text.count("best  decode") == 1
    assert "mine, transformers dynamic" in text and "does not fit: so it is" in text and "decode x1.00" in text


def test_the_best_batch_is_that_of_each_rate_and_not_known_where_the_largest_failed():
    standard, mine = cell().identity.model_dump(), cell("1_1").identity.model_dump()
    few, many = record_of({"identity": mine}, 10.0), record_of({"identity": mine | {"batch": 64}}, 40.0)
    few["results"]["tokens_per_s"] = 30.0  # prompts cost more and more
    records = [record_of({"identity": standard | {"model": "standard"}}, 20.0), few, many]
    best = "best  decode x2.00 (batches 64 and 2), all x3.00 (batches 2 and 2): each at its best batch"
    assert best in "\n".join(table(records))
    lost = record_of({"identity": standard | {"model": "standard", "batch": 10**6}})
    lost |= {"results": None, "error": "does not fit: so it is"}
    assert best in "\n".join(table([*records, lost])), "too many rows are slow enough"
    lost["identity"]["batch"] = "largest"
    assert "best  not known, as a cell failed" in "\n".join(table([*records, lost]))


def test_a_table_without_numbers_has_no_legend():
    lost = record_of({"identity": cell().identity.model_dump()}) | {"results": None, "error": "does not fit: so it is"}
    assert list(table([lost]))[-1].endswith("does not fit: so it is")


def test_caches_stand_in_the_order_in_which_they_were_asked_for():
    asked = cell().identity.model_dump()
    records = [record_of({"identity": asked | {"cache": cache}}) for cache in ("sinks(4,252)", "sinks(4,1020)")]
    heads = [line for line in table(records) if ", cache " in line]
    assert [head.rpartition("cache ")[2] for head in heads] == ["sinks(4,252)", "sinks(4,1020)"]


def test_the_table_says_which_code_gave_the_numbers_and_what_a_peak_is():
    first, second = (record_of({"identity": cell(batch=batch).identity.model_dump()}) for batch in (1, 2))
    first["facts"]["commit"] = second["facts"]["commit"] = "abc"
    assert "code: commit abc" in list(table([first, second]))
    assert not any("peak: here" in line for line in table([first, second]))
    first["results"]["peak_bytes_kind"] = "compiled"
    assert sum("peak: here by compiled memory analysis" in line for line in table([first, second])) == 1
    second["facts"]["commit"] = "def-dirty"
    assert any(line.startswith("code: of 2 commits, abc, def-dirty") for line in table([first, second]))


@pytest.mark.parametrize("error", ["does not fit: so it is", "the logits are not finite"])
def test_cells_without_numbers_are_an_error_that_loses_nothing(config, processes, tmp_path, capsys, error):
    def act(asked):
        lost = {"results": None, "error": error} if asked["identity"]["model"] == "mine" else {}
        return record_of(asked) | lost

    processes.act = act
    assert main(["bench", str(config), "caches=full", "batches=1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 1 of 2 cells have no numbers") and said.count("\n") == 1
    assert f"mine, full, 6+7, batch 1: {error}; the others are kept" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["error"] for record in results["cells"]] == [None, error]


def test_a_peer_on_another_device_is_not_compared(config, processes, capsys, monkeypatch):
    def act(asked):
        record = record_of(asked)
        if asked["identity"]["decoder"] != "lckv_jax":
            record["facts"]["device"] = "another machine"
        return record

    processes.act = act
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    settings = ["peers=true", "memory_gb=null", "batches=1", "caches=full"]
    assert main(["bench", str(config), *settings]) == 2
    assert "failed: ran on another machine, not on a machine" in capsys.readouterr().err
    processes.keys.clear()
    assert main(["bench", str(config), *settings, "memory_gb=1", f"out={config.parent / 'else'}"]) == 2
    assert "torch caps the memory of GPUs only" in capsys.readouterr().err and processes.keys == []


def test_torch_sees_no_gpu_where_jax_uses_none(config, processes, monkeypatch):
    seen = []
    real = bench._run
    monkeypatch.setattr(bench, "_run", lambda *a: seen.append(a[1].get("CUDA_VISIBLE_DEVICES")) or real(*a))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert main(["bench", str(config), "peers=true", "memory_gb=null", "batches=1", "caches=full"]) == 0
    assert seen == ["1", "", "", "1"]


def test_the_command_itself_takes_no_device(config):
    """Its memory would be missing where cells are measured."""
    code = (
        "import sys; from lckv_jax.decode import bench\n"
        "bench._machine = lambda: {'device': 'a machine', 'platform': 'gpu', 'memory_bytes': 10**10}\n"
        "bench._run = lambda *_: 1\n"
        f"try: bench.bench({str(config)!r})\n"
        "except bench.UserError: pass\n"
        "from jax._src import xla_bridge; sys.exit(bool(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_passes_matter_to_cyclic_maps_only_and_peers_to_the_standard_map(config):
    settings = bench.load_bench_config(config, ["passes=[trained,1e-2]", "batches=[1,2]", "peers=true", "caches=full"])
    found = [cell.identity for cell in bench.cells(settings).values()]
    ours = [(wanted.model, wanted.batch, wanted.passes) for wanted in found if wanted.decoder == "lckv_jax"]
    assert ours == [("standard", 1, "trained"), ("standard", 2, "trained")] + [
        ("mine", batch, passes) for batch in (1, 2) for passes in ("trained", 1e-2)
    ]
    peers = [(wanted.model, wanted.batch, wanted.decoder) for wanted in found if wanted.decoder != "lckv_jax"]
    assert peers == [("standard", batch, f"transformers {kind}") for batch in (1, 2) for kind in ("dynamic", "static")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batchs=[1]", ["batchs", "did you mean 'batches'"]),
        ("maps={standard: standard, mine: lkcv}", ["maps: mine: 'lkcv' is", "lckv?"]),
        ("maps={mine: 0_9}", ["maps: mine", "layer 1 reads layer 9"]),
        ("maps={}", ["maps: each map has a name, as in maps.yoco=yoco"]),
        ("maps=yoco", ["maps: each map has a name", "{standard: standard, yoco: yoco}", "got 'yoco'"]),
        ("maps=[yoco]", ["maps: each map has a name", "got ['yoco']"]),
        ("caches=[full, ful]", ["caches: there is no policy 'ful'", "did you mean full"]),
        ('caches=["kivi(2,3,6)"]', ["groups of 3", "head_dim is 8"]),
        ('caches=["budget(8,8,snapkv)"]', ["no more cells than recent tokens"]),
        ("model.dtype=float64", ["JAX_ENABLE_X64=1"]),
        *(
            (f"lengths={given}", ["lengths: each is [prompt, new tokens]", "at least 2 new", "=[[64,64]], got " + got])
            for given, got in {
                "[[6, 1]]": "[6, 1]",
                "[[0, 6]]": "[0, 6]",
                "[6, 7]": "6",
                "[[16]]": "[16]",
                "16": "16",
                "[[6, few]]": "[6, 'few']",
            }.items()
        ),
        *(
            (f"batches={given}", ["batches: a batch is a positive number of rows or `largest`", f"got {got}\n"])
            for given, got in {"[1, most]": "'most'", "[0]": "0", "[-1]": "-1", "1.5": "1.5", "true": "True"}.items()
        ),
        ("repeats=3", ["repeats", "5"]),
        ("passes=exactly", ["passes", "did you mean 'exact'"]),
        ("model.sharing=standard", ["model", "maps"]),
        ("model.num_heads=a", ["model.num_heads"]),
        ("memory_gb=0", ["memory_gb"]),
        ("memory_gb=11", ["memory_gb=11", "10.0 GB"]),
        ("out=gs://bucket/bench", ["gs://bucket/bench"]),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_any_cell(config, processes, capsys, override, words):
    assert main(["bench", str(config), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert processes.keys == []


def test_a_config_of_train_is_told_apart(processes, capsys):
    assert main(["bench", str(ROOT / "configs" / "quickstart.yaml")]) == 2
    error = capsys.readouterr().err
    assert "no config of bench but one of train" in error and "configs/bench/" in error and error.count("\n") == 1
    assert processes.keys == []


@pytest.mark.parametrize(("load", "warned"), [(1.1, True), (0.9, False), (None, False)])
def test_a_busy_machine_is_told_before_the_first_cell(config, processes, capsys, monkeypatch, load, warned):
    monkeypatch.setattr(bench, "cores", lambda: 2)
    if load is None:
        monkeypatch.delattr(os, "getloadavg")
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    assert main(["bench", str(config), "batches=1"]) == 0
    said = capsys.readouterr().out
    warning = "other programs use this machine (load 1.1 on 2 cores"
    assert (warning in said) == warned and ("other programs" in said) == warned
    assert not warned or said.index(warning) < said.index("[1/4]")
    assert main(["bench", str(config), "batches=1"]) == 0
    assert "other programs" not in capsys.readouterr().out, "nothing is left to measure"


def test_the_time_left_is_told_in_seconds_where_it_is_short(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 200.0, 230.0])
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    list(bench._told(["a--0", "b--0", "c--0"], Console()))
    assert capsys.readouterr().out.splitlines() == ["[1/3] a", "[2/3, about 7 min left] b", "[3/3, about 115 s left] c"]


def test_peers_need_their_libraries(config, processes, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", str(config), "peers=true"]) == 2
    assert "no torch and no transformers" in capsys.readouterr().err and processes.keys == []


def test_cells_of_another_machine_are_not_mixed_in(config, processes, capsys, monkeypatch):
    assert main(["bench", str(config), "batches=1"]) == 0
    monkeypatch.setattr(bench, "_machine", lambda: {"device": "another", "platform": "cpu", "memory_bytes": 10**10})
    assert main(["bench", str(config), "batches=1"]) == 0, "nothing is left to measure"
    assert main(["bench", str(config), "batches=[1,2]"]) == 2
    assert "measured on a machine, but this is another" in capsys.readouterr().err


def test_a_capped_accelerator_gets_a_memory_fraction_to_match(config, processes, monkeypatch):
    seen = []
    real = bench._run

    def run(command, environment, output):
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment, "jax refuses both names at once"
        seen.append(environment["XLA_CLIENT_MEM_FRACTION"])
        return real(command, environment, output)

    monkeypatch.setattr(bench, "_run", run)
    monkeypatch.setattr(bench, "_machine", lambda: {"device": "a machine", "platform": "gpu", "memory_bytes": 80e9})
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    cells = [str(config), "batches=1", "caches=full", "maps={mine: standard}"]
    for number, setting in enumerate(("memory_gb=20", "memory_gb=null")):
        assert main(["bench", *cells, f"out={config.parent / str(number)}", setting]) == 0
    for name, fraction in (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5"), ("XLA_CLIENT_MEM_FRACTION", "0.6")):
        monkeypatch.setenv(name, fraction)
        assert main(["bench", *cells, f"out={config.parent / fraction}", "memory_gb=null"]) == 0
    assert seen == ["0.2500", "0.92", "0.5", "0.6"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_what_is_finished_is_kept_when_the_command_is_stopped(config, processes, tmp_path, capsys, number, code):
    def act(asked):
        if asked["identity"]["model"] == "mine":
            signal.raise_signal(number)
        return record_of(asked)

    processes.act = act
    arguments = ["bench", str(config), "caches=full", "batches=1"]
    assert main(arguments) == code
    assert number == signal.SIGINT or "1 of 2 cells are kept" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["identity"]["model"] for record in results["cells"]] == ["standard"]
    processes.act, processes.keys = record_of, []
    assert main(arguments) == 0
    assert [key.partition("--")[0] for key in processes.keys] == ["mine"]


def test_a_stopped_command_leaves_no_process_behind(tmp_path):
    """The process that measures ends with what waits for it."""

    def stop(*_):
        raise KeyboardInterrupt

    pid = tmp_path / "pid"
    script = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            bench._run([sys.executable, "-S", "-c", script], dict(os.environ), subprocess.DEVNULL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    if pid.exists():  # it may have been stopped before it could write
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_sigterm_keeps_finished_cells_and_the_command_goes_on(config, tmp_path, capsys, monkeypatch):
    """The real thing: processes and all."""
    arguments = ["bench", str(config), "caches=full", "batches=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = subprocess.Popen(
        [sys.executable, "-m", "lckv_jax", *arguments], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    folder, deadline = tmp_path / "out" / "cells", time.monotonic() + 120
    while not (first := list(folder.glob("standard*b1--????????.json"))) or not list(folder.glob("mine*.log")):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 42
    assert "1 of 2 cells are kept" in command.stderr.read()
    before = first[0].read_bytes()
    assert not list(folder.glob("mine*--????????.json")) and json.loads(before)["error"] is None
    assert main(arguments) == 0
    assert first[0].read_bytes() == before
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert [record["identity"]["model"] for record in cells] == ["standard", "mine"]
    assert set(cells[1]["results"]) == RESULTS and cells[1]["results"]["share_of_roofline"] > 0


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_their_headers_say_what_to_expect(path):
    text = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    (command,) = re.findall(r"^ +python -m lckv_jax (.*)$", text, re.M)
    action, file, *overrides = shlex.split(command)
    assert (action, file) == ("bench", f"configs/bench/{path.name}") and "random weights" in text
    assert all(re.search(rf"^ {label}: +\S", text, re.M) for label in ("Hardware", "Time", "Expect"))
    assert len(bench.cells(bench.load_bench_config(path, overrides))) >= 8


def test_presets_have_the_promised_sizes():
    counted = {}
    for path in PRESETS:
        for found in bench.cells(bench.load_bench_config(path)).values():
            counted[path.stem, found.identity.model] = bench_cell.count_parameters(found.model)
    assert {name for name, _ in counted} == {"50m", "1b", "7b", "30b"}
    assert counted["7b", "standard"] == 6_738_415_616 and counted["1b", "lckv-w2"] == 1_080_125_440
    assert counted["30b", "standard"] == 32_528_943_616 and counted["50m", "lckv-w2"] == 50_340_352


def test_caches_are_a_list_although_they_have_commas(config):
    wanted = bench.load_bench_config(config, ["caches=[sinks(2,4)+int8,full,window(3)]"])
    assert wanted.caches == ("sinks(2,4)+int8", "full", "window(3)")
