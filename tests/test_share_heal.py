"""Healing: the overrides of its training mean what they say, whatever the folders are called."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import run_config

from lckv_jax.config import build_config, config_json
from lckv_jax.config_text import apply_override
from lckv_jax.errors import Stopped
from lckv_jax.share import heal
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


def test_a_stopped_healing_names_the_command_that_goes_on(tmp_path, monkeypatch):
    def stopped(config):
        raise Stopped("stopped by SIGTERM after step 3, which is saved; the same command goes on from it")

    run, said = run_config(sharing="0_1_1", num_layers=3), []
    (tmp_path / "config.json").write_text(json.dumps(config_json(run)), encoding="utf-8")
    wanted = SimpleNamespace(heal=30, heal_learning_rate=None)
    job = SimpleNamespace(loaded=SimpleNamespace(config=run), wanted=wanted, target=tmp_path, say=said.append)
    monkeypatch.setattr(heal, "train", stopped)
    with pytest.raises(Stopped) as caught:
        heal._trained(job, "healed", [])  # pyright: ignore
    told = f"stopped by SIGTERM after step 3, which is saved; {tmp_path} is whole, and only the healing goes on, by: "
    assert str(caught.value) == told + said[0] and said[0].startswith("python -m lckv_jax train ")
