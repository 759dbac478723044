"""The PyTorch module beside exported weights, loaded as its users do, against golden numbers and our own forward."""

import ast
import copy
import json
import os
import shutil
import sys
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
from oracle import token_by_token  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, dynamic_module_utils  # noqa: E402

from lckv_jax import ModelConfig  # noqa: E402
from lckv_jax.convert import torch_model  # noqa: E402
from lckv_jax.convert.hub import load_hub, to_hub  # noqa: E402
from lckv_jax.convert.hub_config import MODULE, hub_config, read_config  # noqa: E402
from lckv_jax.model.transformer import forward, hidden_states, init_params  # noqa: E402

CASES = [
    "p01_llama_mha", "p02_cla2_gqa", "p03_lckv_w2", "p04_lckv_w0_mqa", "p05_sandwich_middle", "p06_pizza_top_b1",
    "p07_lasagna_top_tied", "p08_yoco_window", "p09_mixattention", "p10_pizza_bottom_tied",
]  # fmt: skip
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "window": 4, "no_grad_passes": 2, "grad_passes": 2, "init_std": 0.4, "dtype": "float64", "remat": "none",
}  # fmt: skip
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
MAPS = {
    "2_3_2_3": {"start": "input"},
    "3_1_2_3": {"mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "1_2_3_3": {"strict_everywhere": True, "attention_bias": True},
    "3_3_3_0": {"tie_embeddings": True, "num_kv_heads": 4},
    "0_3_3_3_2": {"rope_scaling": LLAMA3},
    "0s_3s_3_3_2s_4": {"attention_bias": True, "mlp_bias": True},
    "2s_2_2s_5_5s_5": {"start": "input", "strict_everywhere": True, "window": 3},
    "0s_0_2": {"num_kv_heads": 1},
    "0_0s_2": {"strict_everywhere": True, "window": 1},
}
CYCLIC = list(MAPS)[:-2]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """transformers copies the module of a folder into a cache; here into one that no other process shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


def write(folder, config, *, dtype="float32", **keys):
    """A folder of our own format, but for the weights."""
    folder.mkdir(exist_ok=True)
    tree = hub_config(config, format="lckv", max_position_embeddings=64, dtype=dtype, bos_id=1, eos_id=2)
    (folder / "config.json").write_text(json.dumps(tree | keys))
    shutil.copy(torch_model.__file__, folder / f"{MODULE}.py")
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def golden_model(golden, tmp_path_factory):
    """The model of a golden case, loaded once, with its numbers; each caller gets a copy."""
    made = {}

    def get(case):
        if case not in made:
            folder = write(tmp_path_factory.mktemp(case), read_config(golden / case / "config.json"))
            shutil.copy(golden / case / "model.safetensors", folder)
            want = {
                name: torch.from_numpy(array) for name, array in load_file(golden / case / "golden.safetensors").items()
            }
            made[case] = load(folder), want, json.loads((golden / case / "meta.json").read_text())
        model, want, meta = made[case]
        return copy.deepcopy(model), want, meta

    return get


def make(spec, folder, **changes):
    """A random model of a map in JAX and in torch, both float64 (JAX_ENABLE_X64 must be on), and tokens."""
    layers = spec.count("_") + 1
    config = ModelConfig(**SIZES | {"sharing": spec, "num_layers": layers} | changes)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(0.0, config.init_std, p.shape), shapes)
    for group in (params["layers"], params):  # norms around 1
        for name in [name for name in group if name.endswith("norm")]:
            group[name] = 1 + group[name] / 4
    write(folder, config, dtype="float64")
    save_file(to_hub(params, config), folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert model.dtype == torch.float64
    return model, config, params, rng.integers(0, config.vocab_size, (3, 11))


def random_model(spec, seed=0, **keys):
    """A random model of a map, in torch alone."""
    torch.manual_seed(seed)
    keys = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4} | keys
    config = torch_model.LckvConfig(sharing=spec, num_hidden_layers=spec.count("_") + 1, num_key_value_heads=2, **keys)
    return torch_model.LckvForCausalLM(config).eval()


def close(got, want, atol):
    np.testing.assert_allclose(got.detach().numpy(), np.asarray(want), rtol=0, atol=atol)


def new_tokens(model, prompt, new=16, **options):
    return model.generate(prompt, max_new_tokens=new, **GREEDY | options)[:, prompt.shape[1] :]


# ---------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_golden_logits_kv_loss_and_gradients(golden_model, case, dtype):
    model, want, meta = golden_model(case)
    tolerance = meta["tolerance_float32"] if dtype == "float32" else dict.fromkeys(meta["tolerance_float32"], 1e-6)
    model = model.to(getattr(torch, dtype))
    tokens = want["input_ids"].long()
    with torch.no_grad():
        out = model(tokens)
    assert out.logits.dtype == model.dtype
    close(out.logits, want["logits"], tolerance["logits"])
    for owner, slot in zip(model.model.sharing.owners, out.past_key_values.layers):
        close(slot.keys, want[f"kv.{owner}.key"], tolerance["kv"])
        close(slot.values, want[f"kv.{owner}.value"], tolerance["kv"])

    out = model.train()(tokens, labels=want["labels"].long())
    assert out.past_key_values is None
    assert abs(out.loss.item() - meta["loss"]) <= tolerance["loss"]
    out.loss.backward()
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    assert grads.keys() == {name for name in want if name.startswith("grad.")}
    for name, grad in grads.items():
        close(grad, want[name], tolerance["grads"])


@pytest.mark.parametrize("case", CASES)
def test_golden_tokens_and_exact_logits(golden_model, case):
    model, want, meta = golden_model(case)
    prompt = want["gen.prompt_ids"].long()
    if meta["cyclic"]:
        assert torch.equal(new_tokens(model, prompt), want["gen.tokens_prefill"].long())
    model.config.passes = "exact"
    assert torch.equal(new_tokens(model, prompt), want["gen.tokens"].long())
    assert torch.equal(new_tokens(model, prompt, 4, use_cache=False), want["gen.tokens"].long()[:, :4])
    with torch.no_grad():
        logits = model(want["input_ids"].long(), use_cache=False).logits
    close(logits, want["logits_exact" if meta["cyclic"] else "logits"], meta["tolerance_float32"]["logits"])


# ---------------------------------------------------------------- our own forward


@pytest.mark.parametrize("spec", CYCLIC)
def test_training_is_that_of_jax(spec, tmp_path, x64):
    model, config, params, tokens = make(spec, tmp_path, **MAPS[spec])

    def loss(params):
        logits = forward(params, config, jnp.asarray(tokens))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -chosen.mean(), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    out = model.train()(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    out.loss.backward()
    close(out.logits, logits, 1e-9)
    close(out.loss, value, 1e-10)
    want = to_hub(grads, config)
    assert want.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        close(p.grad, want[name], 1e-9)
    model.eval().zero_grad()  # where gradients are wanted in eval mode they are the same
    model(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
    for name, p in model.named_parameters():
        close(p.grad, want[name], 1e-9)


@pytest.mark.parametrize("spec", MAPS)
def test_cached_tokens_chunks_and_exact_passes_are_token_by_token(spec, tmp_path, x64):
    model, config, params, tokens = make(spec, tmp_path, **MAPS[spec])
    want = token_by_token(params, config, tokens[0])
    model.config.passes, ids = "exact", torch.from_numpy(tokens[:1])
    with torch.no_grad():
        close(model(ids, use_cache=False).logits[0], want, 1e-9)
        for sizes in ([1] * 11, [4, 1, 6], [9, 2]):
            cache = DynamicCache(config=model.config)  # as generate() makes it
            chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, 1)]
            close(torch.cat(chunks, 1)[0], want, 1e-9)
    assert len(cache.layers) == len(config.sharing.owners)


def test_exact_passes_of_a_longer_row_stop_when_all_stands_still(tmp_path, x64):
    """Where the K,V stand still before the passes run out, so that the tolerance of "exact" is what decides."""
    model, config, params, _ = make("1_2_3_3", tmp_path, init_std=0.2)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    model.config.passes, made = "exact", []
    kv_pass = model.model.kv_pass
    model.model.kv_pass = lambda *args: made.append(0) or kv_pass(*args)
    with torch.no_grad():
        close(model(torch.from_numpy(tokens)[None]).logits[0], token_by_token(params, config, tokens), 1e-9)
    assert len(made) < 35


@pytest.mark.parametrize("passes", ["exact", 0.4, 0.0])
def test_each_row_stops_as_in_jax(passes, tmp_path, x64):
    spec = "2s_2_2s_5_5s_5"
    model, config, params, tokens = make(spec, tmp_path, **MAPS[spec] | {"init_std": 0.25})
    positions = np.stack([np.arange(11), np.where(np.arange(11) < 5, np.arange(11), -1), np.arange(11) - 4])
    positions = np.maximum(positions, -1)
    model.config.passes = passes
    run = jax.jit(partial(hidden_states, config=config, passes=passes))
    hidden = run(params, tokens_BT=tokens, positions_BT=positions)
    if passes == 0.4:
        assert len(set(np.asarray(hidden.passes).tolist())) > 1
    with torch.no_grad():
        got = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(positions >= 0))
    want = hidden.x_BTD @ params["head"]
    close(got.logits[positions >= 0], want[positions >= 0], 1e-9)


def test_tolerance_in_training_is_that_of_jax(tmp_path, x64):
    model, config, params, tokens = make("0_3_3_3_4", tmp_path, no_grad_passes=9, tolerance=0.7)
    logits = jax.jit(partial(forward, config=config))(params, tokens_BT=tokens)
    close(model.train()(torch.from_numpy(tokens)).logits, logits, 1e-9)
    model.config.tolerance = 0.0
    assert not np.allclose(model(torch.from_numpy(tokens)).logits.detach(), logits, atol=1e-3)


# ---------------------------------------------------------------- batches


def padded(rows, side):
    length = max(map(len, rows))
    blank = [torch.full((length - len(row),), 30) for row in rows]
    pairs = [(b, row) if side == "left" else (row, b) for b, row in zip(blank, rows)]
    mask = [(torch.zeros_like(b), torch.ones_like(r)) if side == "left" else (torch.ones_like(r), torch.zeros_like(b))
            for b, r in zip(blank, rows)]  # fmt: skip
    return torch.stack([torch.cat(pair) for pair in pairs]), torch.stack([torch.cat(pair) for pair in mask])


@pytest.mark.parametrize("passes", ["trained", "exact"])
@pytest.mark.parametrize("case", ["p03_lckv_w2", "p07_lasagna_top_tied", "p09_mixattention"])
def test_a_left_padded_batch_generates_as_its_rows(golden_model, case, passes):
    model, want, _ = golden_model(case)
    model.config.passes = passes
    rows = [row[:n].long() for row, n in zip(want["input_ids"][[0, 1, 0, 1]], (12, 7, 1, 3))]
    ids, mask = padded(rows, "left")
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 8, **GREEDY}
    together = model.generate(ids, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **options)
        assert torch.equal(together.sequences[index, -8:], alone.sequences[0, -8:])
        close(torch.stack(together.logits)[:, index], torch.stack(alone.logits)[:, 0], 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("start", ["zero", "input"])
def test_a_row_stops_on_its_own(start, side, tmp_path, x64):
    model, *_, tokens = make("2_3_2_3", tmp_path, start=start)
    rows = [torch.from_numpy(row[:n]) for row, n in zip(tokens, (11, 5, 2))]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        for tolerance in np.linspace(0.05, 0.95, 15):
            model.config.passes = float(tolerance)
            logits = model(ids, attention_mask=mask).logits
            for index, row in enumerate(rows):
                close(logits[index][mask[index] == 1], model(row[None]).logits[0], 1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", ["1_2_3_3", "2s_2_2s_5_5s_5", "0s_0_2"])
def test_padding_on_either_side_changes_no_logit_and_no_gradient(spec, side, tmp_path, x64):
    model, *_, tokens = make(spec, tmp_path, **MAPS[spec])
    rows = [torch.from_numpy(row[:n]) for row, n in zip(tokens, (11, 6, 1))]
    ids, mask = padded(rows, side)
    model.train()

    def gradients(batch):
        model.zero_grad(set_to_none=False)
        out = model(**batch, num_items_in_batch=10)
        out.loss.backward()
        # one token reads nothing where all is strict, so that q_proj takes no part
        return out.logits, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    unseen = (mask == 0) | (mask.cumsum(1) == 1)  # a row's first token is predicted by none, or by padding
    logits, got = gradients({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(unseen, -100)})
    alone = [gradients({"input_ids": row[None], "labels": row[None]}) for row in rows]
    for index, (row_logits, _) in enumerate(alone):
        close(logits[index][mask[index] == 1], row_logits[0].detach(), 1e-9)
    assert logits.isfinite().all()
    for g, *singles in zip(got, *(grads for _, grads in alone)):
        close(g, sum(singles), 1e-9)


# ---------------------------------------------------------------- generate and its cache


def test_the_cache_holds_owners_only(golden_model):
    model, want, _ = golden_model("p03_lckv_w2")
    prompt = want["gen.prompt_ids"].long()
    cache = model.generate(prompt, max_new_tokens=5, return_dict_in_generate=True, **GREEDY).past_key_values
    config, (rows, length) = model.config, (prompt.shape[0], prompt.shape[1] + 4)
    held = sum(x.untyped_storage().nbytes() for slot in cache.layers for x in (slot.keys, slot.values))
    assert held == 3 * 2 * rows * length * config.num_key_value_heads * config.head_dim * 4
    assert cache.get_seq_length() == length


def test_sampling_follows_the_seed(golden_model):
    model, want, _ = golden_model("p05_sandwich_middle")
    prompt = want["gen.prompt_ids"].long()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(new_tokens(model, prompt, do_sample=True, temperature=1.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("case", ["p03_lckv_w2", "p09_mixattention"])
def test_beam_search_needs_no_more_than_the_cache(golden_model, case):
    model, want, _ = golden_model(case)
    model.config.passes = "exact"
    prompt = want["gen.prompt_ids"].long()
    with_cache, without = (
        new_tokens(model, prompt, 6, num_beams=3, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("passes", [(7, 2), (1, 1)])
def test_candidates_are_checked_as_exactly_as_single_tokens(passes):
    """Assisted decoding and prompt lookup find the greedy tokens: candidates are not part of the prompt."""
    for seed in range(6):
        model = random_model(
            "0_6_6_6_6_6_6_7", seed, no_grad_passes=passes[0], grad_passes=passes[1], initializer_range=0.25
        )
        prompt = torch.randint(0, 31, (1, 4)) if seed % 2 else torch.tensor([[3, 5, 3, 5]])
        want = new_tokens(model, prompt)
        assert torch.equal(new_tokens(model, prompt, prompt_lookup_num_tokens=10), want)
        assert torch.equal(new_tokens(model, prompt, assistant_model=model), want)
    with torch.no_grad():  # and so is any chunk, whatever `passes` is
        logits, cache = model(want, use_cache=False).logits, model(want[:, :1]).past_key_values
        model.config.passes = "exact"
        exact = model(want).logits
        for model.config.passes in ("trained", 0.9):
            chunk = model(want[:, 1:], past_key_values=copy.deepcopy(cache)).logits
            close(chunk, exact[:, 1:], 1e-4)
    assert passes == (7, 2) or (logits - exact).abs().max() > 1e-2


def test_logits_to_keep(golden_model):
    model, want, _ = golden_model("p02_cla2_gqa")
    ids = want["input_ids"].long()
    with torch.no_grad():
        close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:], 1e-5)
        close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, model(ids).logits[:, [0, 3]], 1e-5)
        loss, logits = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids, return_dict=False)[:2]
    assert loss.ndim == 0
    close(logits, want["logits"], 1e-3)


def test_bfloat16(golden_model):
    model, want, _ = golden_model("p05_sandwich_middle")
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(want["input_ids"].long()).logits
    assert logits.dtype == torch.float32
    assert (logits - want["logits"]).std() < 0.1 * want["logits"].std()
    assert new_tokens(model, want["gen.prompt_ids"].long(), 3).shape == (2, 3)


def test_bfloat16_keeps_far_positions_apart():
    """Tables in bfloat16 would round positions past 256, and all angles."""
    model = random_model("0_1", hidden_size=64, initializer_range=0.15)
    model.to(torch.bfloat16)
    ids = torch.randint(0, 31, (1, 400))
    with torch.no_grad():
        got = model(ids).logits[0, 300:]
        want = model.float()(ids).logits[0, 300:]
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_once(dtype):
    norm = torch_model.RMSNorm(64, eps=1e-6).to(dtype)
    x = 3000 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))  # squares exceed float16
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.3, 1.9, 64))
        x, weight = x.to(dtype), norm.weight.double()
        want = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        error = ((norm(x).double() - want) / want).abs().max()
    assert error <= 0.51 * torch.finfo(dtype).eps


def test_a_bias_of_the_output_is_read_by_its_own_module():
    """As offloading needs, which loads weights when their module is called."""
    model = random_model("2_2_2", attention_bias=True, initializer_range=0.3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_()
        want = model(torch.tensor([[5]])).logits
        for layer in model.model.layers:
            module = layer.self_attn.o_proj
            kept = dict(module.named_parameters())
            for name, p in kept.items():
                setattr(module, name, torch.nn.Parameter(p.to("meta")))
            module.register_forward_pre_hook(lambda module, _, kept=kept: module._parameters.update(kept))
        close(model(torch.tensor([[5]])).logits, want, 0)


def test_mixed_precision_trains_every_weight(golden_model):
    """autocast keeps the weights that it has cast: those of passes without gradient must not serve those with it."""
    model, want, _ = golden_model("p03_lckv_w2")
    ids = want["input_ids"].long()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(ids, labels=ids).loss
    loss.backward()
    for name, p in model.named_parameters():
        exact = want[f"grad.{name}"]
        assert (p.grad - exact).norm() < 0.2 * exact.norm(), name


# ---------------------------------------------------------------- folders


def test_a_tuned_model_is_saved_read_again_and_imported(tmp_path, x64):
    model, config, _, tokens = make("0s_3s_3_3_2s_4", tmp_path / "exported", rope_scaling=LLAMA3, tie_embeddings=True)
    out = model.train()(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    out.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / f"{MODULE}.py").read_bytes() == Path(torch_model.__file__).read_bytes()
    again = load(tmp_path / "out")
    want = dict(model.named_parameters())
    for name, p in again.named_parameters():
        assert torch.equal(p, want[name])
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        close(again(ids).logits, model.eval()(ids).logits, 0)
    params, read = load_hub(tmp_path / "out")
    unknown_to_torch = {"dtype": read.dtype, "remat": read.remat}
    assert read.model_copy(update={"max_position_embeddings": None}) == config.model_copy(update=unknown_to_torch)
    assert {name: array.tobytes() for name, array in to_hub(params, read).items()} == {
        name: p.detach().numpy().tobytes() for name, p in want.items()
    }


def test_the_file_stands_alone():
    tree = ast.parse(Path(torch_model.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "transformers"}


@pytest.mark.parametrize("spec", ["0_1", "0_2", "0__2", "0_\uff11_2", "0_x_2", "1_2_3", "", "-1_0_0"])
def test_a_wrong_map_is_refused(spec):
    with pytest.raises(ValueError, match="it must name a source from 0 to 2 for each layer"):
        torch_model.read_sharing(spec, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"start": "one"}, "start is 'one'; this model computes only zero, input"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "must divide"),
        ({"grad_passes": 0}, "grad_passes is 0; .* at least 1"),
        ({"no_grad_passes": -1}, "no_grad_passes is -1; .* at least 0"),
        ({"sliding_window": None}, "sliding_window is None; .* at least 1"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"head_dim": 5}, "head_dim.* is 5; it must be even"),
        ({"hidden_size": 20, "num_attention_heads": 8}, "is 2.5; it must be even"),
        ({"sharing": [0, 1, 2]}, r"sharing is \[0, 1, 2\]; it must name a source"),
        ({"sharing": ""}, "sharing is ''; it must name a source"),
        *(({"passes": passes}, "passes is .*; use 'trained'") for passes in (None, 3, 1.0, -0.1, "exakt", True, "nan")),
    ],
)
def test_a_wrong_config_is_refused(keys, message):
    assert torch_model.LckvConfig(passes="1e-2").passes == 0.01
    with pytest.raises(ValueError, match=message):
        torch_model.LckvConfig(**keys)


@pytest.mark.parametrize(
    ("rope", "meaning"),
    [
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear", 5.0)),
        ({"rope_theta": 5.0, "rope_scaling": None}, ("default", 5.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}, ("linear", 7.0)),
        ({}, ("default", 10000.0)),
    ],
)
def test_both_spellings_of_the_rotary_embedding(rope, meaning):
    read = torch_model.LckvConfig(**rope).rope_parameters
    assert (read["rope_type"], read["rope_theta"]) == meaning


def test_what_cannot_be_computed_is_refused(golden_model):
    model, want, _ = golden_model("p03_lckv_w2")
    ids = want["gen.prompt_ids"].long()
    with pytest.raises(ValueError, match="does not take position_ids"):
        model(ids, position_ids=torch.arange(12)[None])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\]; .* \[2, 12\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    for kind, name in {"static": "StaticCache", "offloaded": "DynamicCache"}.items():
        with pytest.raises(ValueError, match=f"without offloading, not in this {name}$"):
            model.generate(ids, cache_implementation=kind, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="cached in a DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    other = golden_model("p10_pizza_bottom_tied")[0]
    other.model.sharing = other.model.sharing._replace(owners=(0, 1))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="has 3 layers, but this model 2 owners"):
        other(ids, past_key_values=cache)
    for batch in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 12, 32)}):
        with pytest.raises(ValueError, match="does not take both or neither of input_ids and inputs_embeds"):
            model(**batch)
    with pytest.raises(ValueError, match="does not take labels together with logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=1)
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="does not take output_hidden_states"):
        model(ids)
    model(ids, output_hidden_states=False)
    model.config.output_hidden_states = False
    for passes in ("exakt", -1.0, float("nan"), True):
        model.config.passes = passes
        with pytest.raises(ValueError, match=r"config\.passes is"):
            model(ids)
