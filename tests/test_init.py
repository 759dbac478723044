"""`init_from`: a run starts from the parameters of another, converted to its map, and only once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_tiny_config

from lckv_jax import checkpoint
from lckv_jax.config import load_config
from lckv_jax.convert.reshare import reshare
from lckv_jax.data.batches import iterate
from lckv_jax.data.prepare import prepare
from lckv_jax.errors import UserError
from lckv_jax.model.loss import loss_sum
from lckv_jax.parallel.mesh import make_mesh
from lckv_jax.train import loop, warm_start
from lckv_jax.train.loop import train
from lckv_jax.train.metrics import read_metrics
from lckv_jax.train.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.steps=4", "train.eval_every=4", "train.save_every=2"]


@pytest.fixture(scope="module")
def source(trained, tmp_path_factory) -> Path:
    """The folder of a run of the standard map with averaged parameters. Only to be read."""
    folder = tmp_path_factory.mktemp("unshared")
    params, config, tokenizer = checkpoint.load(trained / "run")
    params, model = reshare(params, config.model, "standard")
    kept = config.train.model_copy(update={"ema_decay": 0.5})
    state = {"params": jax.tree.map(jnp.zeros_like, params), "ema": params, "opt": {"count": 4}, "step": jnp.int32(4)}
    with checkpoint.open_checkpoints(folder / "run" / "checkpoints", 1) as manager:
        run = config.model_copy(update={"model": model, "train": kept})
        checkpoint.save(manager, jax.tree.map(jnp.asarray, state), run, tokenizer=tokenizer.fingerprint)
    shutil.copy(trained / "run" / "tokenizer.model", folder / "run")
    return folder / "run"


@pytest.fixture
def make(source, trained, tmp_path):
    """A config on the source's data with an `out` of its own that starts from the source; with overrides."""

    def make(*overrides, out="new"):
        usual = [f"out={tmp_path / out}", f"init_from={source}", *SHORT]
        return load_config(trained / "tiny.yaml", [*usual, *overrides])

    return make


def trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def start(config, say=lambda line: None):
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return warm_start.first_state(config, make_optimizer(config.optimizer, config.train.steps), mesh, say)


@pytest.mark.parametrize("how", ["mean", "own"])
def test_the_state_begins_with_the_converted_averages_and_a_fresh_optimiser(source, make, how):
    told = []
    config = make("train.ema_decay=0.9", "model.num_kv_heads=1", f"init_how={how}")
    state = start(config, told.append)
    params, before, _ = checkpoint.load(source)
    assert before.train.ema_decay == 0.5
    want, _ = reshare(params, before.model, "0_2_2_3", how, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), state["params"], want)
    trees_equal(state["ema"], state["params"])
    assert int(state["step"]) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.float32.dtype}
    projections = "averaged over the layers that read them" if how == "mean" else "copied, dropped from layer 1"
    assert told == [
        f"starting from {source} (step 4, averaged parameters): map 0_1_2_3 -> 0_2_2_3, K/V projections "
        f"{projections}, 2 K/V heads averaged to 1"
    ]


def test_means_of_a_bfloat16_source_are_not_rounded(source, make, tmp_path):
    params, config, _ = checkpoint.load(source)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with checkpoint.open_checkpoints(tmp_path / "low" / "checkpoints", 1) as manager:
        checkpoint.save(manager, {"params": low, "step": jnp.int32(1)}, config)
    state = start(make(f"init_from={tmp_path / 'low'}"), lambda line: None)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), low)
    want, _ = reshare(wide, config.model, "0_2_2_3")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state["params"], want)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.float32.dtype}


def test_the_first_loss_is_that_of_the_converted_parameters(source, make, capsys):
    config = make()
    train(config)
    params, before, _ = checkpoint.load(source)
    params, _ = reshare(params, before.model, config.model.sharing)
    manifest = prepare(config.data, config.model.vocab_size)
    batch = next(iter(iterate(loop._batches(config, manifest, "train", make_mesh(config.mesh)), 0)))
    total, aux = jax.jit(lambda params: loss_sum(params, config.model, batch, chunk=256))(params)
    records = [record for record in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in record]
    assert records[0]["loss"] == pytest.approx(float(total / aux["count"]), abs=1e-5)
    assert records[0]["loss"] < np.log(512) - 0.1  # it knows something
    assert f"starting from {source} (step 4, averaged" in capsys.readouterr().out
    assert json.loads((Path(config.out) / "config.json").read_text())["init_from"] == str(source)


def test_a_resumed_run_no_longer_reads_init_from(source, make, tmp_path, monkeypatch, capsys):
    (tmp_path / "source").symlink_to(source)
    from_link = f"init_from={tmp_path / 'source'}"
    whole, broken = make(from_link, out="whole"), make(from_link, out="broken")
    train(whole)

    class Killed(Exception):
        pass

    def killed(self, step, state, loss, save=loop._Run.save):
        save(self, step, state, loss)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "save", killed)
        with pytest.raises(Killed):
            train(broken)
    (tmp_path / "source").unlink()
    capsys.readouterr()
    train(broken)
    printed = capsys.readouterr().out
    assert "from step 2" in printed and "starting from" not in printed
    trees_equal(checkpoint.load(whole.out)[0], checkpoint.load(broken.out)[0])
    with pytest.raises(UserError, match="another config: init_from"):
        train(broken.model_copy(update={"init_from": None}))


def test_a_single_checkpoint_and_its_data_of_the_other_kind(trained, tmp_path):
    """From a step of a shared run to the standard map: every layer starts from what it read."""
    step = trained / "run" / "checkpoints" / "4"
    config = load_config(trained / "tiny.yaml", [f"init_from={step}", "model.sharing=standard"])
    warm_start.check_start(config)
    state, (params, _, _) = start(config), checkpoint.load(step)
    trees_equal(state["params"]["kv"]["wk"], params["kv"]["wk"][np.array([0, 1, 1, 2])])
    trees_equal(state["params"]["layers"], params["layers"])


def test_a_tied_model_gives_its_embedding_to_the_head(tmp_path):
    config = load_config(write_tiny_config(tmp_path), ["model.tie_embeddings=true", "train.steps=3"])
    with checkpoint.open_checkpoints(tmp_path / "run" / "checkpoints", 1) as manager:
        state = start(config)
        checkpoint.save(manager, state, config)
    untied = load_config(tmp_path / "tiny.yaml", [f"init_from={tmp_path / 'run'}", f"out={tmp_path / 'new'}"])
    warm_start.check_start(untied)
    begun = start(untied)
    trees_equal(begun["params"]["head"], state["params"]["embed"].T)
    trees_equal(begun["params"]["embed"], state["params"]["embed"])


def test_what_the_same_parameters_compute_otherwise_is_told(make):
    told = []
    start(make("model.norm_eps=1e-6", "model.rope_theta=5e5", "model.window=9", "model.no_grad_passes=3"), told.append)
    assert [line.split(": ", 1)[1] for line in told[1:]] == [
        "model.norm_eps was 1e-05, now 1e-06",
        "model.rope_theta was 10000.0, now 500000.0",
    ]
    told.clear()
    start(make("model.sharing=0s_2_2_3", "model.window=9"), told.append)
    assert told[1:] == [line for line in told[1:] if "model.window was 4096, now 9" in line] and len(told) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=nowhere"], "nowhere: neither a run folder"),
        (["model.hidden_size=64"], r"hidden_size is 32 there but 64 here; set model\.hidden_size=32"),
        (["model.num_layers=5", "model.sharing=lckv"], "num_layers is 4 there but 5 here"),
        (["model.num_heads=8"], "num_heads is 4 there but 8 here"),
        (
            ["model.head_dim=16", "model.intermediate_size=50"],
            "intermediate_size is 48 .* head_dim is 8 there",
        ),
        (["model.attention_bias=true"], "attention_bias is False there but True here; set model.attention_bias=false"),
        (["model.vocab_size=600"], "vocab_size is 512 there but 600 here"),
        (["model.num_kv_heads=4"], "init_from=.*run: 2 K/V heads cannot be merged to 4"),
        (["model.tie_embeddings=true"], "output head of its own.*set model.tie_embeddings=false"),
        (["data.folder=elsewhere"], r"train would make another .* set data\.tokenizer=\S*run/tokenizer\.model$"),
        (
            ["data.folder=elsewhere", "data.tokenizer=bytes"],
            r"bytes is another .*set data\.tokenizer=\S*\.model",
        ),
    ],
)
def test_refusals(make, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train(make(*overrides))
    assert list(tmp_path.iterdir()) == []  # no text was prepared for it


def test_data_prepared_with_another_tokenizer_is_refused_and_the_mend_works(make, tmp_path, capsys):
    elsewhere = [f"data.folder={tmp_path / 'data'}", "data.tokenizer=bytes"]
    prepare(make(*elsewhere).data, 512)
    with pytest.raises(
        UserError, match=r"data was prepared with another tokenizer .*; set (\S+) and another"
    ) as caught:
        train(make(*elsewhere))
    mend = str(caught.value).split("; set ")[1].split()[0]
    train(make(f"data.folder={tmp_path / 'data2'}", mend))
    assert "starting from" in capsys.readouterr().out


def test_the_state_is_the_same_on_any_mesh_and_never_whole_on_one_device():
    """In a process of its own, since the number of fake devices is fixed when jax starts."""
    script = [sys.executable, Path(__file__).parent / "init_meshes.py"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 3
