"""`init_from`: a run begins with the parameters of another run or of an imported model, converted to its own map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lckv_jax import checkpoint
from lckv_jax.config import RunConfig
from lckv_jax.convert.reshare import describe_change, resharded_config, reshare
from lckv_jax.data.manifest import MANIFEST, load_manifest
from lckv_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from lckv_jax.errors import UserError
from lckv_jax.model_config import ModelConfig
from lckv_jax.parallel.mesh import parameter_shardings
from lckv_jax.train.state import TrainState, init_state

_SIZES = (
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim", "vocab_size", "attention_bias",
    "mlp_bias",
)  # fmt: skip
_FUNCTION = ("norm_eps", "rope_theta", "rope_scaling", "strict_everywhere", "window")  # what the model computes


def check_start(config: RunConfig) -> None:
    """Raises UserError if the run cannot begin with `config.init_from`: told before any text is prepared."""
    if config.init_from is None:
        return
    before, tokenizer = checkpoint.load_config_of(config.init_from)
    _check_fits(config, before.model)
    if tokenizer is not None:
        _check_tokenizer(config, config.init_from, tokenizer)


def first_state(
    config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, say: Callable[[str], None]
) -> TrainState:
    """The state of step 0, laid out on the mesh: of `config.seed`, or with the parameters of `config.init_from`.

    Those are read, converted and cast to float32 where they lie, never whole on a device that holds only a part; a run
    that keeps averages gives them. The optimiser's state is fresh, and an average begins as the parameters.
    Raises UserError as `checkpoint.load` and `check_start` do.
    """
    if config.init_from is None:
        return init_state(config, optimizer, mesh)

    def place(before: RunConfig) -> Any:
        _check_fits(config, before.model)
        return parameter_shardings(before.model, mesh)

    loaded = checkpoint.load_step(config.init_from, place=place, report=say)
    before = loaded.config.model
    convert = jax.jit(partial(_converted, config, before), out_shardings=parameter_shardings(config.model, mesh))
    params = convert(loaded.params)
    averaged = ", averaged parameters" if loaded.config.train.ema_decay else ""
    change = describe_change(before, config.model, config.init_how)
    say(f"starting from {config.init_from} (step {loaded.step}{averaged}){': ' if change else ''}{change}")
    if loaded.tokenizer is None:
        say(f"{config.init_from} has no tokenizer to compare: see to it that data.tokenizer is the one it knows")
    for line in _differences(before, config.model):
        say(f"computed otherwise than in {config.init_from}: {line}")
    del loaded  # before the optimiser's state is made
    return init_state(config, optimizer, mesh, params)


def _converted(config: RunConfig, before: ModelConfig, params: Any) -> Any:
    after = config.model
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # first, so that no mean is rounded
    params, _ = reshare(params, before, after.sharing, config.init_how, after.num_kv_heads)
    if before.tie_embeddings and not after.tie_embeddings:
        params["head"] = params["embed"].T
    return params


def _check_fits(config: RunConfig, before: ModelConfig) -> None:
    init, after = config.init_from, config.model
    if odd := [name for name in _SIZES if getattr(before, name) != getattr(after, name)]:
        told = ", ".join(f"{name} is {getattr(before, name)} there but {getattr(after, name)} here" for name in odd)
        mend = " ".join(f"model.{name}={str(getattr(before, name)).lower()}" for name in odd)
        raise UserError(f"init_from={init} holds another model: {told}; set {mend}, or leave out init_from")
    if after.tie_embeddings and not before.tie_embeddings:
        raise UserError(
            f"init_from={init} has an output head of its own, for which model.tie_embeddings=true has no place; set "
            "model.tie_embeddings=false"
        )
    try:
        resharded_config(before, after.sharing, after.num_kv_heads)
    except UserError as error:
        raise UserError(f"init_from={init}: {error}") from error


def _check_tokenizer(config: RunConfig, init: str, tokenizer: Tokenizer) -> None:
    """The tokens to train on must be those that the parameters know."""
    data, folder = config.data, Path(config.data.folder).expanduser()
    if (folder / MANIFEST).exists():
        same = load_manifest(folder).tokenizer_fingerprint == tokenizer.fingerprint
        what, mend = f"{data.folder} was prepared with another tokenizer", " and another data.folder"
    elif data.tokenizer == "train":
        same, what, mend = False, "data.tokenizer=train would make another tokenizer", ""
    else:
        same = load_tokenizer(data.tokenizer).fingerprint == tokenizer.fingerprint
        what, mend = f"data.tokenizer={data.tokenizer} is another tokenizer", ""
    if not same:
        run = Path(init).expanduser()
        run = run if (run / "checkpoints").is_dir() else run.parent.parent
        file = tokenizer_files(run)[0]
        name = "bytes" if file.suffix == ".bytes" else str(file)
        raise UserError(f"{what} than that of init_from={init}; set data.tokenizer={name}{mend}")


def _differences(before: ModelConfig, after: ModelConfig) -> list[str]:
    """The settings that make the same parameters compute another function."""
    windowed = any(before.sharing.windowed) or any(after.sharing.windowed)
    names = [name for name in _FUNCTION if name != "window" or windowed]
    values = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [f"model.{name} was {old}, now {new}" for name, old, new in values if old != new]
