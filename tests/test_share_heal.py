"""Healing: the overrides of its training mean what they say, whatever the folders are called."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import run_config

from lckv_jax.config import build_config, config_json
from lckv_jax.config_text import apply_override
from lckv_jax.share.heal import _quoted, overrides


@pytest.mark.parametrize(
    "name", ["plain", "12", "a #b", "a: b", "[x, y]", "it's", 'the "new" one', "2024-01-01", "ü😀"]
)
def test_any_folder_may_be_trained_in(name):
    run = run_config(sharing="0_1_1", num_layers=3)
    wanted = SimpleNamespace(heal=30, heal_learning_rate=None)
    for target in (Path(name), Path("/tmp") / name):
        job = SimpleNamespace(loaded=SimpleNamespace(config=run), wanted=wanted, target=target)
        tree = config_json(run)
        for change in [*overrides(job, "healed"), f"init_from={_quoted(name)}"]:  # pyright: ignore
            apply_override(tree, change)
        config = build_config(type(run), tree, "heal")
        assert config.out == str(target / "healed") and config.init_from == name
        assert config.optimizer.learning_rate == run.optimizer.learning_rate / 3
