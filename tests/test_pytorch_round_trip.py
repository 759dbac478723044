"""From a run to PyTorch, a step of training there, and back: the numbers are those of staying here."""

import json
import os
import re
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
from conftest import needs_torch

needs_torch()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaForCausalLM, dynamic_module_utils  # noqa: E402

from lckv_jax import checkpoint  # noqa: E402
from lckv_jax.convert.export import export  # noqa: E402
from lckv_jax.convert.import_hub import import_hub  # noqa: E402
from lckv_jax.model.loss import loss  # noqa: E402
from lckv_jax.model.transformer import forward  # noqa: E402

RATE = 1.0


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """transformers copies the module of a folder into a cache; here into one that no other process shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The finished tiny run (a map with a cyclic span) as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("somewhere") / "exported"
    export(trained / "run", folder)
    return folder


def test_one_step_there_and_back_is_one_step_here(trained, exported, tmp_path):
    params, config, _ = checkpoint.load(trained / "run")
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, 24))

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    there = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    there.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    import_hub(str(tmp_path / "tuned"), str(tmp_path / "back"))
    back, back_config, _ = checkpoint.load(tmp_path / "back")

    here, grads = jax.jit(jax.value_and_grad(partial(loss, config=config.model, tokens_BT=jnp.asarray(tokens))))(params)
    assert abs(there.item() - float(here)) < 1e-5
    stepped = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    named = dict(jax.tree_util.tree_leaves_with_path(back))
    for path, want in jax.tree_util.tree_leaves_with_path(stepped):
        np.testing.assert_allclose(named[path], want, rtol=0, atol=2e-6, err_msg=jax.tree_util.keystr(path))
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(params))
    ]
    assert min(moved) > 1e-5  # so that each leaf was compared after a step that can be seen
    kept = ("sharing", "no_grad_passes", "grad_passes", "window", "norm_eps", "rope_theta", "start", "tolerance")
    assert all(getattr(back_config.model, name) == getattr(config.model, name) for name in kept)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_and_import_are_lossless(trained, tmp_path, dtype):
    export(trained / "run", tmp_path / "hf", dtype=dtype)
    import_hub(str(tmp_path / "hf"), str(tmp_path / "run"))
    (params, _, before), (back, _, after) = (checkpoint.load(run) for run in (trained / "run", tmp_path / "run"))
    for want, got in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        want = want if dtype is None else want.astype(dtype)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert before.fingerprint == after.fingerprint
    export(tmp_path / "run", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer.model", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_the_readme_generates_text(trained, exported, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(exported.parent)
    names = {}
    exec(code, names)  # as a user who copies it
    _, _, ours = checkpoint.load(trained / "run")
    text = re.findall(r'tokenizer\("(.*?)"', code)[0]
    assert names["inputs"].input_ids[0].tolist() == [ours.bos_id, *ours.encode(text)]
    assert text in capsys.readouterr().out


# ---------------------------------------------------------------- a really trained model


@pytest.fixture(scope="module")
def stories_torch(stories_hub, tmp_path_factory):
    """stories260K through import and export, in stock transformers."""
    folder = tmp_path_factory.mktemp("stories")
    import_hub(str(stories_hub), str(folder / "run"))
    assert export(folder / "run", folder / "hf").format == "llama"
    model, info = LlamaForCausalLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_stories_in_stock_transformers(stories_torch, reference):
    want = reference["greedy_from_bos"]
    prompt = torch.tensor([want[:1]])
    with torch.no_grad():
        new = stories_torch.generate(prompt, max_new_tokens=len(want) - 1, do_sample=False, eos_token_id=None)
        assert new[0].tolist() == want
        for example in reference["examples"]:
            tokens = torch.tensor([example["tokens"]])
            nll = stories_torch(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
            assert nll == pytest.approx(example["nll_sum"], rel=1e-5)


@pytest.mark.parametrize("how", ["mean", "own"])
def test_stories_with_another_map_in_our_module(stories_hub, tmp_path, reference, how):
    """A finished model on a shared map: our module and our own forward agree, and the card says what it is."""
    import_hub(str(stories_hub), str(tmp_path / "run"), sharing="lckv(warmup=2)", how=how)
    assert export(tmp_path / "run", tmp_path / "hf").format == "lckv"
    params, config, _ = checkpoint.load(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = np.asarray(reference["examples"][0]["tokens"])[None, :64]
    with torch.no_grad():
        got = model(torch.tensor(tokens)).logits
    want = jax.jit(partial(forward, config=config.model))(params, tokens_BT=jnp.asarray(tokens))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["sharing"] == str(config.model.sharing)
