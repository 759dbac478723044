"""Every preset loads, is described and initialised abstractly, and its header tells the truth."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from lckv_jax.config import load_config
from lckv_jax.describe import count_parameters, describe
from lckv_jax.memory import memory, planned_mesh, train_state
from lckv_jax.model.kernels import choose_backend

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
PARAMETERS = {  # from the shapes in the papers' tables, by hand
    "lckv-50m": 51_651_072 - 5 * 2 * 512 * 4 * 64,
    "lckv-110m": 127_027_968 - 9 * 2 * 768 * 6 * 64,
    "tinyllama-1b": 1_100_048_384,
    "tinyllama-1b-lckv-w2": 1_100_048_384 - 19 * 2 * 2048 * 4 * 64,
    "tinyllama-1b-lckv-w10": 1_100_048_384 - 11 * 2 * 2048 * 4 * 64,
    "tinyllama-1b-sandwich-middle": 1_100_048_384 - 19 * 2 * 2048 * 4 * 64,
    "tinyllama-1b-cla": 1_100_048_384 - 11 * 2 * 2048 * 4 * 64,
    "tinyllama-1b-yoco": 1_100_048_384 - 10 * 2 * 2048 * 4 * 64,
    "llama-7b": 6_738_415_616,
    "lckv-7b": 6_738_415_616 - 29 * 2 * 4096 * 4096,
}
FAMILIES = {
    "lckv-50m": "lckv(2)",
    "lckv-110m": "lckv(2)",
    "tinyllama-1b-lckv-w2": "lckv(2)",
    "tinyllama-1b-lckv-w10": "lckv(10)",
    "tinyllama-1b-sandwich-middle": "grid(sandwich, middle, 3)",
    "tinyllama-1b-cla": "cla(2)",
    "tinyllama-1b-yoco": "yoco",
    "lckv-7b": "lckv(2)",
}


def header(path):
    """The comment at the top of a preset, without its number signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:].removeprefix(" ") for line in lines[: lines.index(next(x for x in lines if x[0] != "#"))])


def by_name(names):
    return pytest.mark.parametrize("name", sorted(names))


presets = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)


def test_the_promised_presets_are_there():
    assert {path.stem for path in PRESETS} >= PARAMETERS.keys() | {"quickstart", "llama-50m"}


@presets
def test_describes_and_initialises_abstractly(path):
    config = load_config(path)
    assert str(config.model.sharing) in describe(config)
    _, state = train_state(config, planned_mesh(config.mesh))
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in jax.tree.leaves(state["params"])) == count_parameters(config.model)


@presets
def test_header_says_command_hardware_time_and_loss(path):
    text = header(path)
    (command,) = re.findall(r"^ +python -m lckv_jax (.*)$", text, re.M)
    action, config, *overrides = shlex.split(command)
    assert (action, config) == ("train", f"configs/{path.name}")
    load_config(path, overrides)
    for label in ("Hardware", "Time", "Expect"):
        assert re.search(rf"^{label}: +\S", text, re.M), label
    sources = {override.partition("=")[0] for override in overrides}
    assert path.stem == "quickstart" or sources == {"data.tokenizer", "data.sources"}


@presets
def test_time_by_formula_follows_from_the_config(path):
    number = r"([\d.,]+)"
    found = re.search(
        rf"about {number} \S+-hours, by formula: {number} GFLOPs a token x {number} ([MBT]) tokens at 40 % of {number}",
        header(path),
    )
    if path.stem == "quickstart":
        assert found is None
        return
    assert found
    hours, gigaflops, tokens, unit, peak = (x if x in "MBT" else float(x.replace(",", "")) for x in found.groups())
    config = load_config(path)
    flops, read = config.model.flops(config.data.seq_len).train, config.data.batch_size * config.data.seq_len
    assert gigaflops * 1e9 == pytest.approx(flops, rel=5e-3)
    assert tokens * {"M": 1e6, "B": 1e9, "T": 1e12}[unit] == pytest.approx(config.train.steps * read, rel=5e-3)
    assert hours == pytest.approx(flops * config.train.steps * read / (0.4 * peak * 1e12) / 3600, rel=0.05)


@presets
def test_fits_the_hardware_with_a_fused_kernel(path):
    """By the formula, which may be wrong by half, with 15 % of the device left to the rest."""
    found = re.search(r"GPUs? of (\d+) GB|one (\d+) GB GPU", header(path))
    if path.stem == "quickstart":
        return
    assert found
    alone = re.search(r"on one: (mesh\S+ train\S+?)\.?$", header(path), re.M)
    for overrides in ([], *([alone[1].split()] if alone else [])):
        config = load_config(path, overrides)
        needs = memory(config, choose_backend(config.model, "gpu", seq_len=config.data.seq_len)[0])
        assert sum(needs.state.values()) + 1.5 * needs.step < 0.85e9 * int(found[1] or found[2])
    assert ("1b" in path.stem) == (alone is not None)


@by_name(PARAMETERS)
def test_parameters_are_the_papers(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert count_parameters(config.model) == PARAMETERS[name]


@by_name(FAMILIES)
def test_maps_are_their_families(name):
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(path)
    assert f'sharing: "{config.model.sharing}"' in path.read_text(), "the official string, quoted"
    assert load_config(path, [f"model.sharing={FAMILIES[name]}"]).model.sharing == config.model.sharing


@by_name(name for name in PARAMETERS if name.startswith("tinyllama"))
def test_hyper_parameters_of_the_1b_models_are_the_papers(name):
    """2405.10637, 3.2."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (optimizer.learning_rate, optimizer.final_fraction, optimizer.warmup_steps) == (4e-4, 0.1, 200)
    assert (config.data.seq_len, config.data.batch_size * config.data.seq_len) == (2048, 2**21)
    assert config.train.steps * 2**21 == pytest.approx(100e9, abs=2**21)
    assert (config.model.no_grad_passes, config.model.grad_passes, config.model.norm_eps) == (7, 2, 1e-5)
