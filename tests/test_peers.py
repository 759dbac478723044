"""The transformers cells of bench: the tokens are those of `generate`, the record is whole, refusals are sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
from conftest import needs_torch

needs_torch()

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

from lckv_jax.decode import bench_record, peers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "init_std": 0.3,
}  # fmt: skip
IDENTITY = {
    "model": "tiny", "decoder": "transformers dynamic", "sharing": "0_1", "cache": "full", "dtype": "float32",
    "prompt": 5, "new": 4, "batch": 2, "passes": "trained", "memory_cap_bytes": None,
}  # fmt: skip
RESULTS = {
    "prefill_ms", "passes_used", "residual", "decode_step_ms", "decode_tokens_per_s", "tokens_per_s", "compile_s",
    "peak_bytes", "peak_bytes_kind", "cache_bytes_held", "cache_bytes_read_per_step", "weight_bytes_read_per_step",
    "copy_bandwidth", "copy_bandwidth_how", "share_of_roofline", "largest", "memory_model_bytes",
}  # fmt: skip
FACTS = {
    "parameters", "device", "threads", "attention", "versions", "commit", "repeats", "random_weights", "started",
}  # fmt: skip
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # wq and wo, wk and wv, the MLP, two norms
PARAMETERS = 2 * 61 * 32 + 2 * LAYER + 32
STATIC = {"decoder": "transformers static"}


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(bench_record, "COPY_BYTES", 2**20)


@pytest.fixture
def write(tmp_path):
    def write_cell(model=None, repeats=5, **identity):
        path = tmp_path / "cell.json"
        tree = {"identity": {**IDENTITY, **identity}, "model": {**MODEL, **(model or {})}, "repeats": repeats}
        path.write_text(json.dumps({**tree, "bucket": 256, "seed": 1}))
        return path

    return write_cell


@pytest.fixture
def cell(write):
    return lambda *args, **identity: peers.read_cell(write(*args, **identity))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_are_those_of_generate(cell, dtype, kind):
    model = peers.build(cell(dtype=dtype), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    prompt = torch.randint(61, (3, 5))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, max_new_tokens=9, **options)[:, 5:]
    assert len(set(expected.flatten().tolist())) > 9  # rows and steps differ
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=14)
    for _ in range(2):  # the second time with a cache that was used
        tokens, times = peers.generate(model, model, prompt, 9, cache)
        assert torch.equal(tokens, expected)
        assert min(times) > 0
        cache.reset()


def test_record_of_a_dynamic_cell(write, tmp_path):
    result = tmp_path / "result.json"
    assert peers.main([str(write(batch=3, new=6)), str(result)]) == 0
    record = json.loads(result.read_text())
    assert record["identity"] == {**IDENTITY, "batch": 3, "new": 6}
    assert record["error"] is None
    facts, results = record["facts"], record["results"]
    assert set(facts) == FACTS and set(results) == RESULTS
    assert facts["parameters"] == PARAMETERS
    assert facts["threads"] == torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert facts["versions"]["torch"] == torch.__version__
    for name in ("prefill_ms", "decode_step_ms"):
        spread = results[name]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    check_rates(results, batch=3, new=6, cells_read=5 + 3)
    assert results["cache_bytes_held"] == 3 * (5 + 5) * 256  # the last token's keys and values are never computed
    assert (results["compile_s"], results["largest"]) == (0, False)


def check_rates(results, *, batch, new, cells_read):
    """Rates and bytes by formula; a token is 2 layers of keys and values, 2 heads, 8 numbers, 4 bytes."""
    token, weights = 2 * 2 * 2 * 8 * 4, 4 * (PARAMETERS - 61 * 32)
    assert token == 256
    step = results["decode_step_ms"]["median"] / 1e3
    assert results["decode_tokens_per_s"] == pytest.approx(batch / step)
    spreads = results["prefill_ms"], results["decode_step_ms"]
    low, high = (sum(s[end] * n for s, n in zip(spreads, (1, new - 1))) / 1e3 for end in ("min", "max"))
    assert batch * new / high <= results["tokens_per_s"] * (1 + 1e-9) and results["tokens_per_s"] <= batch * new / low
    assert results["weight_bytes_read_per_step"] == weights
    assert results["cache_bytes_read_per_step"] == batch * cells_read * token
    moved = weights + batch * (cells_read + 1) * token
    assert results["share_of_roofline"] == pytest.approx(moved / step / results["copy_bandwidth"])


def test_embedding_that_is_the_head_is_read(cell):
    model = peers.build(cell({"tie_embeddings": True}), "cpu")
    assert peers.weight_bytes(model) == 4 * (PARAMETERS - 61 * 32)  # there once, and read


@pytest.mark.slow
def test_record_of_a_static_cell(cell):
    record = peers.measure(cell(**STATIC))
    if record["error"] is None:
        assert set(record["results"]) == RESULTS
        assert record["results"]["compile_s"] > 0
        assert record["results"]["cache_bytes_held"] == 2 * (5 + 4) * 256
        check_rates(record["results"], batch=2, new=4, cells_read=5 + 4)
    else:  # there is no C++ compiler
        assert record["results"] is None
        assert record["error"].startswith("torch.compile cannot compile the decode step: ")
        assert "\n" not in record["error"]


def test_a_decode_step_that_cannot_be_compiled_is_the_cells_error(cell, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no working compiler\nin many lines")

    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.get_compiled_call", lambda self, _: torch.compile(self, backend=broken)
    )
    record = peers.measure(cell(**STATIC))
    assert record["results"] is None
    said = "RuntimeError: no working compiler"
    assert record["error"] == f"torch.compile cannot compile the decode step: {said}"
    assert record["facts"]["parameters"] == PARAMETERS


def test_what_does_not_fit_is_the_cells_error(cell):
    record = peers.measure(cell(batch=10**13))
    assert record["results"] is None
    assert record["error"].startswith("does not fit: ")


def test_other_faults_are_not_hidden(cell, monkeypatch):
    monkeypatch.setattr(peers, "copy_bandwidth", lambda device: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        peers.measure(cell())


def test_a_cap_is_for_gpus(cell):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    record = peers.measure(cell(memory_cap_bytes=10**9))
    assert (record["results"], record["error"]) == (None, "cannot be capped: torch caps the memory of GPUs only")


@pytest.mark.parametrize(
    ("model", "identity", "said"),
    [
        ({"sharing": "1_1"}, {}, "knows no map but the standard one, and model.sharing is 1_1"),
        ({"sharing": "0s_1"}, {}, "model.sharing is 0s_1"),
        ({"strict_everywhere": True}, {}, "the standard one"),
        ({}, {"cache": "int8"}, "identity.cache"),
        ({}, {"decoder": "lckv_jax"}, "identity.decoder"),
        ({}, {"batch": "largest"}, "identity.batch"),
        ({}, {"new": 1}, "identity.new"),
    ],
)
def test_refusals(write, tmp_path, capsys, model, identity, said):
    path, result = write(model, **identity), tmp_path / "result.json"
    assert peers.main([str(path), str(result)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: ") and said in message and message.count("\n") == 1
    assert not result.exists()


def test_a_cell_that_is_not_there(tmp_path, capsys):
    assert peers.main([str(tmp_path / "none.json"), "result.json"]) == 2
    assert "cannot be read as a cell" in capsys.readouterr().err


def test_only_torch_is_loaded_beside_a_peer():
    """A second framework in the process would take threads and memory, on a GPU most of it."""
    code = "import sys; import lckv_jax.decode.peers; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
