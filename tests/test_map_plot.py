"""The picture of a map: every reading layer hangs on exactly one bus, buses never lie on each other, files are made."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv_jax import KVSharing, ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.map_plot import buses, draw_map

MIXED = "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s"


def model(sharing, num_layers):
    return ModelConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=num_layers, num_heads=2, num_kv_heads=1,
        head_dim=4, sharing=sharing,
    )  # fmt: skip


@given(st.lists(st.integers(0, 6), min_size=7, max_size=7))
def test_buses_show_every_edge_once_and_apart(sources):
    sharing = KVSharing.parse(sources, 7)
    found = buses(sharing)
    edges = sorted((reader, bus.source) for bus in found for reader in bus.readers)
    assert edges == [(layer, source) for layer, source in enumerate(sources) if layer != source]
    cells = [
        (bus.lane, layer)
        for bus in found
        for layer in range(min(*bus.readers, bus.source), max(*bus.readers, bus.source) + 1)
    ]
    assert len(cells) == len(set(cells))


@pytest.mark.parametrize(
    ("sharing", "num_layers"),
    [("0_6_6_6_6_6_6_7", 8), ("0 10*20 21", 22), ("yoco", 22), (MIXED, 22), ("standard", 1), ("1_0", 2)],
)
def test_the_picture_tells_owners_readers_and_windows(sharing, num_layers, tmp_path):
    config = model(sharing, num_layers)
    draw_map(config, tmp_path / "map.svg")
    draw_map(config, tmp_path / "map.png")
    text = (tmp_path / "map.svg").read_text()  # matplotlib writes each text as a comment beside its outlines
    for layer in range(num_layers):
        assert f"<!-- layer {layer}{'  K,V' if layer in config.sharing.owners else ''} -->" in text
    kv = config.sharing
    assert ("from above" in text) == any(kv.upward)
    assert ("sliding window of 4,096 tokens" in text) == any(kv.windowed)
    assert ("<!-- 7 + 2" in text) == kv.cyclic
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"map\.gif: the file ends in \.png, \.svg, \.pdf"):
        draw_map(model("standard", 2), Path("map.gif"))
    with pytest.raises(UserError, match="cannot be written"):
        draw_map(model("standard", 2), tmp_path / "none" / "map.png")
