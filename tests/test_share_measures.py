"""What `share` measures: each number beside the cache that it is of."""

import jax
import numpy as np
import pytest
from small_runs import run_config

from lckv_jax.evaluate.rows import Text
from lckv_jax.model.transformer import init_params
from lckv_jax.share.measures import Model, Setting, costs, quality
from lckv_jax.share.report import cache_records


@pytest.mark.parametrize("caches", [("full+int8", "full"), ("full", "full+int8")])
def test_losses_and_bytes_are_of_the_same_cache_in_any_order(caches):
    config = run_config(sharing="0_1_1", num_layers=3, init_std=0.3).model
    model = Model(init_params(config, jax.random.key(0)), config)
    text = Text("noise", np.random.default_rng(0).integers(2, 64, 40).astype(np.int32), None, 0, 1)
    setting = Setting(text, 16, "joined", 4, "trained", caches, None, 1, 0)
    found = quality(model, setting)
    assert tuple(report.cache for report in found.caches) == caches and found.decode.cache == "full"
    rows = cache_records(found, found, [costs((model, model), cache, setting) for cache in caches])
    held = {row["cache"]: row["before"]["held"] for row in rows}
    assert held["full+int8"] < held["full"]
