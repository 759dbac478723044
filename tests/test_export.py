"""`export`: what is in the folder, that it is what the checkpoint holds, and that nothing is lost or half done."""

import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import types
import weakref
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file
from small_runs import run_config

from lckv_jax import checkpoint
from lckv_jax.__main__ import main
from lckv_jax.checkpoint import load, open_checkpoints, save
from lckv_jax.convert import export as export_module
from lckv_jax.convert import safetensors_writer
from lckv_jax.convert.export import export
from lckv_jax.convert.hub import load_hub, to_hub
from lckv_jax.convert.hub_config import read_config
from lckv_jax.data.tokenizer import tokenizer_contents
from lckv_jax.errors import UserError
from lckv_jax.model.transformer import init_params

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = dict(hidden_size=12, intermediate_size=20, num_heads=4, num_kv_heads=2, head_dim=6)  # no two sizes are equal


def random_params(config, dtype=np.float32, seed=0):
    """Normal numbers for every parameter, norms and biases too, that survive a cast to bfloat16 only by rounding."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(dtype)), shapes)


def save_run(folder, config, params, step=9, **facts):
    """A run folder with one more checkpoint: `params` and, if given, their average `ema`."""
    state = {"params": params, "step": jnp.int32(step)}
    state |= {"ema": facts.pop("ema")} if "ema" in facts else {}
    with open_checkpoints(folder / "checkpoints", keep=5) as manager:
        save(manager, state, config, **facts)
    return folder


def make_run(folder, dtype=np.float32, **model):
    """(run folder, its config, its parameters), random."""
    config = run_config(folder, **WIDTHS | model)
    params = random_params(config, dtype)
    return save_run(folder, config, params), config, params


def quiet(*arguments, **keywords):
    return export(*arguments, say=lambda line: None, **keywords)


def assert_same_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- what is written


MODELS = {
    "standard": {"sharing": "standard"},
    "lckv": {"sharing": "0_2_2_3"},
    "all-read-the-top": {"sharing": "3_3_3_3", "no_grad_passes": 2, "grad_passes": 3, "start": "input"},
    "windows": {"sharing": "0s_0_2s_2", "window": 7},
    "tied": {"sharing": "cla(group=2)", "tie_embeddings": True},
    "biases": {"sharing": "0_2_2_3", "attention_bias": True, "mlp_bias": True, "tolerance": 1e-3},
    "strict": {"sharing": "standard", "strict_everywhere": True},
    "rope": {
        "sharing": "standard",
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 5e5,
        "max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_holds_what_the_checkpoint_holds(tmp_path, name, dtype):
    run, config, params = make_run(tmp_path / "run", dtype, **MODELS[name])
    done = quiet(run, tmp_path / "out")
    found, model = load_hub(tmp_path / "out")
    assert_same_trees(found, params)
    context = config.model.max_position_embeddings or config.data.seq_len
    assert model == config.model.model_copy(update={"max_position_embeddings": context})
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == done.format == ("llama" if name in ("standard", "rope") else "lckv")
    assert raw["torch_dtype"] == done.dtype == np.dtype(dtype).name
    module = ["modeling_lckv.py"] if done.format == "lckv" else []
    assert names_in(tmp_path / "out") == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", *module]
    )
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == done.tensors
    assert names_in(tmp_path) == ["out", "run"]


def test_our_module_is_beside_the_weights_byte_for_byte(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    quiet(run, tmp_path / "out")
    source = Path(export_module.__file__).with_name("torch_model.py")
    assert (tmp_path / "out" / "modeling_lckv.py").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("format", ["lckv", "lckv-llama"])
@pytest.mark.parametrize("sharing", ["standard", "0_2_2s_3"])
def test_every_map_in_the_other_formats(tmp_path, format, sharing):
    run, config, params = make_run(tmp_path / "run", sharing=sharing, window=5, no_grad_passes=3)
    assert quiet(run, tmp_path / "out", format=format).format == format
    found, model = load_hub(tmp_path / "out")
    assert_same_trees(found, params)
    assert model == config.model.model_copy(update={"max_position_embeddings": 32})
    assert read_config(tmp_path / "out" / "config.json") == model


@pytest.mark.parametrize("case", ["p03_lckv_w2", "p07_lasagna_top_tied", "p08_yoco_window"])
def test_official_checkpoints_come_out_as_they_were(tmp_path, golden, case):
    """The official code's own files: the same tensors, names and bits, and the same words in config.json."""
    params, model = load_hub(golden / case)
    config = run_config(tmp_path).model_copy(update={"model": model})
    run = save_run(tmp_path / "run", config, jax.tree.map(jnp.asarray, params))
    quiet(run, tmp_path / "out", format="lckv-llama")
    ours, official = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", golden / case))
    assert {name: (x.dtype, x.shape, x.tobytes()) for name, x in ours.items()} == {
        name: (x.dtype, x.shape, x.tobytes()) for name, x in official.items()
    }
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", golden / case))
    odd = {key for key in theirs if mine.get(key, "absent") != theirs[key]}
    assert odd <= {
        "transformers_version",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "_attn_implementation_autoset",
    }


def test_what_lckv_llama_has_no_word_for_is_refused(tmp_path):
    run, *_ = make_run(tmp_path / "run", start="input")
    with pytest.raises(UserError, match=r"lckv-llama has no word for model\.start=input"):
        quiet(run, tmp_path / "out", format="lckv-llama")
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_shards_hold_layer_after_layer_and_the_index_finds_all(tmp_path, dtype):
    run, config, params = make_run(tmp_path / "run", dtype)
    done = quiet(run, tmp_path / "out", max_shard_size="6KB")
    count = len(done.files)
    assert count > 2
    assert done.files == tuple(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    right = to_hub(params, config.model)
    assert index["metadata"]["total_size"] == done.nbytes == sum(x.nbytes for x in right.values())
    assert index["weight_map"].keys() == right.keys()
    sizes = []
    for file in done.files:
        held = load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        sizes.append(sum(x.nbytes for x in held.values()))
    assert all(a <= 6000 or a == max(x.nbytes for x in right.values()) for a in sizes)
    assert all(a + b > 6000 for a, b in itertools.pairwise(sizes))  # else the next tensor fitted
    assert index["weight_map"]["model.embed_tokens.weight"] == done.files[0]
    layers = [name.split(".")[2] for name in index["weight_map"] if ".layers." in name]
    assert layers == sorted(layers)
    assert_same_trees(load_hub(tmp_path / "out")[0], params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("held", [np.float32, ml_dtypes.bfloat16])
def test_another_dtype_is_the_nearest_number(tmp_path, held, dtype):
    run, _, params = make_run(tmp_path / "run", held)
    assert quiet(run, tmp_path / "out", dtype=dtype).dtype == dtype
    wanted = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert_same_trees(load_hub(tmp_path / "out")[0], jax.tree.map(lambda x: np.asarray(x).astype(wanted), params))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_leaves_of_several_dtypes_keep_theirs(tmp_path):
    config = run_config(tmp_path / "run", **WIDTHS)
    params = random_params(config, ml_dtypes.bfloat16)
    params["layers"]["attn_norm"] = params["layers"]["attn_norm"].astype(jnp.float32)
    done = quiet(save_run(tmp_path / "run", config, params), tmp_path / "out")
    assert_same_trees(load_hub(tmp_path / "out")[0], params)
    assert done.dtype == "float32"  # what transformers load it in, and holds them all


def test_the_average_is_exported_where_there_is_one(tmp_path):
    tree = run_config(tmp_path / "run", **WIDTHS)
    config = tree.model_copy(update={"train": tree.train.model_copy(update={"ema_decay": 0.9})})
    average = random_params(config, seed=1)
    run = save_run(tmp_path / "run", config, random_params(config), ema=average)
    lines = []
    export(run, tmp_path / "out", say=lines.append)
    assert_same_trees(load_hub(tmp_path / "out")[0], average)
    assert_same_trees(load(run)[0], average)
    assert "averaged parameters" in lines[0]
    assert "moving average, decay 0.9" in (tmp_path / "out" / "README.md").read_text()


def test_one_leaf_is_in_memory_at_a_time(tmp_path, monkeypatch):
    run, *_ = make_run(tmp_path / "run")
    read_leaf, seen = checkpoint.read_leaf, []

    def watched(*arguments):
        gc.collect()
        assert [leaf() for leaf in seen if leaf() is not None] == []
        leaf = read_leaf(*arguments)
        seen.append(weakref.ref(leaf))
        return leaf

    monkeypatch.setattr(checkpoint, "read_leaf", watched)
    quiet(run, tmp_path / "out")
    assert len(seen) == 12  # those of an untied model without biases


# ---------------------------------------------------------------- beside the weights


def test_a_trained_run_says_what_it_is(trained, tmp_path):
    quiet(trained / "run", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lckv-jax", "lckv", "custom_code"],
    }
    params, config, tokenizer = load(trained / "run")
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = [record["valid_loss"] for record in records if "valid_loss" in record][-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for fact in (
        "# model",
        config.model.sharing.diagram(),
        "`0_2_2_3`",
        f"| parameters | {count:,} (float32) |",
        "| K,V cache per token | 192 bytes in bfloat16; 256 with the standard map (0.750 x) |",
        "| steps | 6 of 6 |",
        "| tokens seen | 768 |",
        f"`{config.data.sources[0].path}`",
        "| batch | 4 rows of 32 tokens |",
        "| optimiser | adamw,",
        "| learning rate | 0.01, cosine schedule after 2 steps of warm-up |",
        "m = 2 without and b = 2 with gradient",
        f"perplexity {np.exp(loss):,.2f} (loss {loss:.4f} nats a token) at step 6",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "tokenizer.pad_token = tokenizer.eos_token",
        'from_pretrained(..., passes="exact")',
    ):
        assert fact in body, fact
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    assert {**raw, **ids} == raw
    assert {**generation, **ids} == generation
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (trained / "run" / "tokenizer.model").read_bytes()


def test_the_card_of_a_checkpoint_between_validations(trained, tmp_path):
    """Step 4 of the tiny run was not validated; step 3 was. (One that never was says so.)"""
    quiet(trained / "run" / "checkpoints" / "4", tmp_path / "out")
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = next(record["valid_loss"] for record in records if record["step"] == 3 and "valid_loss" in record)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"(loss {loss:.4f} nats a token) at step 3" in text
    assert "| steps | 4 of 6 |" in text
    run, *_ = make_run(tmp_path / "run", sharing="standard")
    quiet(run, tmp_path / "unvalidated")
    text = (tmp_path / "unvalidated" / "README.md").read_text()
    assert "| validation | never validated |" in text
    assert "from_pretrained(folder)\n```" in text and "AutoTokenizer" not in text and "passes over" not in text


def card_of(folder, *, step=9, init_from=None, out="out", **model):
    config = run_config(folder, **WIDTHS | model).model_copy(update={"init_from": init_from})
    run = save_run(folder, config, random_params(config), step=step)
    quiet(run, folder.parent / out)
    return (folder.parent / out / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_no_training_that_was_not(tmp_path):
    """The config of an import proposes a training; its checkpoint, of step 0, has had none."""
    text = card_of(tmp_path / "imported", step=0, init_from=str(tmp_path / "imported"), out="a")
    assert "are those of another model" in text and "not trained further" in text
    untrained = card_of(tmp_path / "new", step=0, out="b")
    assert "its weights are random" in untrained
    for card in (text, untrained):
        for word in (
            "retrained with",
            "## Training",
            "optimiser",
            "learning rate",
            "batch |",
            "tokens seen",
            "builtin",
        ):
            assert word not in card, word
    trained = card_of(tmp_path / "trained", init_from=str(tmp_path / "secret" / "llama" / "checkpoints" / "7"), out="c")
    assert "Trained with lckv_jax from the weights of `llama`." in trained and "Pretrained" not in trained
    assert "| started from | `llama` |" in trained and "secret" not in trained


def test_the_card_counts_grammatically(tmp_path):
    text = card_of(tmp_path / "run", sharing="3_3_3_3")
    assert "share keys and values: one of them computes K,V" in text
    assert "2 of them compute K,V" in card_of(tmp_path / "run2", sharing="0_3_3_3", out="out2")


@pytest.mark.parametrize("name", ["\U0001f999 llama", "it's", 'a"b\\c', os.fsdecode(b"latin-\xe9"), "two\nlines"])
def test_the_code_on_the_card_holds_any_name_of_the_folder(tmp_path, name):
    card_of(tmp_path / "run", out=name)
    text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (line,) = (line for line in code.splitlines() if line.startswith("folder = "))
    held = {}
    exec(line, held)
    assert held["folder"] == name


def test_odd_lines_of_metrics_are_left_out(tmp_path):
    config = run_config(tmp_path / "run", **WIDTHS)
    run = save_run(tmp_path / "run", config, random_params(config))
    good = [b'{"step": 3, "valid_loss": 2.5}', b'{"step": 7, "valid_loss": 1.5}', b'{"step": 10, "valid_loss": 1.0}']
    odd = [b"null", b'{"valid_loss": 9.0}', b'{"step": 8, "valid_loss": "low"}', b'{"step": "8", "valid_loss": 9.0}',
           b"\xff\xfe", b"[" * 9999, b'{"step": 8, "valid_loss": NaN}', b"[8]", b"", b'{"step": 9, "va']  # fmt: skip
    (run / "metrics.jsonl").write_bytes(b"\n".join([good[0], *odd, *good[1:], *odd]))
    quiet(run, tmp_path / "out")
    assert "(loss 1.5000 nats a token) at step 7" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_the_official_format_says_what_goes_wrong_there(tmp_path):
    for sharing, wrong in (("0_2_2_3", True), ("cla(group=2)", False)):
        run, *_ = make_run(tmp_path / sharing, sharing=sharing)
        quiet(run, tmp_path / f"{sharing}-out", format="lckv-llama")
        text = (tmp_path / f"{sharing}-out" / "README.md").read_text()
        assert "import models" in text and "trust_remote_code" not in text
        assert ("gives wrong tokens" in text) == wrong


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    run, *_ = make_run(tmp_path / "run")  # of 64 ids
    for name, content in tokenizer_contents("bytes").items():
        (run / name).write_bytes(content)
    with pytest.raises(UserError, match="its tokenizer has 258 ids, but the model only 64"):
        quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["run"]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    config = run_config(tmp_path / "run", **WIDTHS)
    params = random_params(config)
    params["layers"]["down"] = params["layers"]["down"].at[2, 3, 4].set(value)
    run = save_run(tmp_path / "run", config, params)
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds 1 numbers that are NaN"):
        quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["run"]


def test_numbers_too_large_for_the_wanted_dtype_are_named(tmp_path):
    config = run_config(tmp_path / "run", **WIDTHS)
    params = random_params(config)
    params["kv"]["wv"] = params["kv"]["wv"].at[1, 0].set(7e4)  # slot 1 is layer 2; float16 ends at 65504
    run = save_run(tmp_path / "run", config, params)
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.v_proj\.weight holds 12 numbers too large for float16"):
        quiet(run, tmp_path / "out", dtype="float16")
    assert names_in(tmp_path) == ["run"]
    quiet(run, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("words", ["", "5 apples", "-1GB", "0", "0.2B", "GB", "999B", "9" * 400])
def test_a_size_that_is_none(tmp_path, words):
    with pytest.raises(UserError, match="not a size from 1KB on; write, for example, 5GB"):
        quiet(tmp_path / "run", tmp_path / "out", max_shard_size=words)


def test_folders_that_are_no_run_or_are_there_already(tmp_path):
    with pytest.raises(UserError, match="neither a run folder"):
        quiet(tmp_path / "absent", tmp_path / "out")
    run, *_ = make_run(tmp_path / "run")
    for wrong, problem in (
        ("", "is empty"),
        ("~nosuchuser/x", "no such user"),
        ("a\0b", "NUL character"),
        ("x" * 300 + "/y", "too long"),
    ):
        with pytest.raises(UserError, match=f"OUT .*{problem}"):
            quiet(run, wrong)
        with pytest.raises(UserError, match=f"CHECKPOINT .*{problem}"):
            quiet(wrong, tmp_path / "out")
    before = names_in(run)
    with pytest.raises(UserError, match="run is not empty"):
        quiet(run, run)
    assert names_in(run) == before
    quiet(run, run / "exports" / "hf")  # inside the run is fine, and the run stays one
    quiet(run, tmp_path / "out")


def flip(path):
    """Changes one byte in the middle of the largest file of a checkpoint's parameters."""
    file = max((path / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_an_older_one(tmp_path):
    config = run_config(tmp_path / "run", **WIDTHS)
    old, new = random_params(config, seed=1), random_params(config, seed=2)
    run = save_run(tmp_path / "run", config, old, step=1)
    save_run(tmp_path / "run", config, new, step=2)
    flip(run / "checkpoints" / "2")
    lines = []
    export(run, tmp_path / "out", say=lines.append)
    assert_same_trees(load_hub(tmp_path / "out")[0], old)
    assert lines[1].startswith("checkpoints: step 2 is unusable: ")
    assert "| steps | 1 of 9 |" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="give another step, or the run folder for the newest good one"):
        quiet(run / "checkpoints" / "2", tmp_path / "other")
    flip(run / "checkpoints" / "1")
    with pytest.raises(UserError, match="none of its 2 checkpoints is usable"):
        quiet(run, tmp_path / "other")
    assert names_in(tmp_path) == ["out", "run"]


def test_a_leaf_that_is_not_what_was_saved_is_noticed(tmp_path, monkeypatch):
    """Past the checksums of the files: the fingerprint of each leaf is compared."""
    run, *_ = make_run(tmp_path / "run")
    read = checkpoint.read_leaf.__globals__["_read"]

    def false(folder, **items):
        found = read(folder, **items)
        if "params" in found and "kv" in found["params"]:
            jax.tree.map(lambda leaf: leaf.reshape(-1)[:1].fill(1.0), found)
        return found

    monkeypatch.setitem(checkpoint.read_leaf.__globals__, "_read", false)
    with pytest.raises(UserError, match=r"params\.kv\.wk differs from what was saved"):
        quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["run"]


def test_what_the_disk_got_wrong_is_noticed(tmp_path, monkeypatch):
    run, *_ = make_run(tmp_path / "run")
    pwrite = os.pwrite

    def false(file, data, offset):
        wrong = bytearray(data)
        if offset > 10_000:
            wrong[len(wrong) // 2] ^= 1
        return pwrite(file, bytes(wrong), offset)

    monkeypatch.setattr(safetensors_writer.os, "pwrite", false)
    with pytest.raises(UserError, match="reads back other than it was written"):
        quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["run"]


FULL_DISK = """
import resource, sys
from lckv_jax.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # as if the disk were full
sys.exit(main(["export", *sys.argv[1:]]))
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    run, *_ = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, run, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    said = (
        rf"error: {tmp_path / 'out'} cannot be written: File too large; it needs 1\.\d\d MB; nothing was left there\n"
    )
    assert re.fullmatch(said, done.stderr)
    assert names_in(tmp_path) == ["run"]
    usage = types.SimpleNamespace(free=1_000_000)
    monkeypatch.setattr("lckv_jax.convert.new_folder.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"out needs 1\.\d\d MB, but .* has only 1\.00 MB free"):
        quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["run"]


HANGS = """
import sys, time
from lckv_jax.__main__ import main
from lckv_jax.convert.safetensors_writer import SafetensorsFile

check = SafetensorsFile.check
def hang(file, name, tensor):
    if "down_proj" in name:
        print("half", flush=True)
        time.sleep(60)
    check(file, name, tensor)
SafetensorsFile.check = hang
sys.exit(main(["export", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGKILL, -9, 1), (signal.SIGTERM, 42, 0), (signal.SIGINT, 130, 0)]
)
def test_an_export_that_is_killed_leaves_nothing_under_the_name(tmp_path, number, code, left):
    run, _, params = make_run(tmp_path / "run")
    command = [sys.executable, "-c", HANGS, run, tmp_path / "out"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.stdout.readline() != "half\n":
        assert child.poll() is None
    assert len(names_in(tmp_path)) == 2 and not (tmp_path / "out").exists()
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, len(names_in(tmp_path))) == (code, 1 + left)
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    quiet(run, tmp_path / "out")
    assert names_in(tmp_path) == ["out", "run"]
    assert_same_trees(load_hub(tmp_path / "out")[0], params)


# ---------------------------------------------------------------- the command


def test_the_command(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(trained / "run"), str(out), "--dtype", "bfloat16", "--max-shard-size", "50kB"]) == 0
    told = capsys.readouterr()
    first, second, third = told.out.splitlines()
    assert first == f"exporting step 6 of {trained / 'run'}"
    assert second == f"{out}: format lckv, 37 tensors, 125,504 bytes (bfloat16) in 3 files"
    assert third.startswith("every tensor read back and compared; ") and third.endswith(" s")
    assert told.err == ""
    assert main(["export", str(trained / "run"), str(out)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {out} is not empty; name a folder that is not there yet, or empty it first\n"
    )
    assert main(["export", str(trained / "run"), str(tmp_path / "plain"), "--format", "llama"]) == 2
    assert "invalid choice: 'llama'" in capsys.readouterr().err
    assert main(["export", str(trained / "run")]) == 2
    assert "required: OUT" in capsys.readouterr().err
    assert names_in(tmp_path) == ["out"]
