"""The text of a cache, and what it means for the slots of a model."""

import pytest
from small_runs import run_config

from lckv_jax.decode.cache import bytes_held, bytes_read_per_step
from lckv_jax.decode.spec import CacheSpec, slot_specs
from lckv_jax.errors import UserError

TEXTS = [
    "full",
    "window(7)",
    "sinks(4,1020)",
    "full+int8",
    "window(7)+int4",
    "sinks(4,1020)+int8",
    "budget(64,8,h2o)+int4",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_round_trip(text):
    assert str(CacheSpec.parse(text)) == text
    assert CacheSpec.parse(CacheSpec.parse(text)) == CacheSpec.parse(text.replace("(", " ( ").replace("+", " + "))


def test_a_codec_alone_is_of_the_full_cache():
    assert CacheSpec.parse("int8") == CacheSpec.parse("full+int8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ful", "did you mean full"),
        ("sink(4,8)", "did you mean sinks"),
        ("full+int9", "did you mean int8"),
        ("full+fp8+int8", r"POLICY\+CODEC"),
        ("", r"POLICY\+CODEC"),
        ("window", r"write window\(window\)"),
        ("window(0)", "positive"),
        ("sinks(4)", r"write sinks\(sinks,window\)"),
        ("full(3)", "write full"),
        ("window(-3)", "positive"),
        ("sinks(4,8", "no policy"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        CacheSpec.parse(text)


def model(sharing="0_2_2_3", **changes):
    return run_config(sharing=sharing, **changes).model


def test_windows_of_the_model_stay_its_own():
    specs = slot_specs(model("0s_0s_2_2s", window=5), CacheSpec.parse("sinks(2,8)"), 64)
    assert [(spec.owner, spec.cells, spec.ring, spec.sinks) for spec in specs] == [(0, 5, True, 0), (2, 8, True, 2)]


def test_a_window_as_long_as_the_text_is_no_ring():
    for text in ("window(64)", "sinks(2,64)"):
        assert slot_specs(model(), CacheSpec.parse(text), 64) == slot_specs(model(), CacheSpec.parse("full"), 64)
    growing = slot_specs(model(), CacheSpec.parse("window(64)"), 32, total=65)
    assert {(spec.cells, spec.ring) for spec in growing} == {(64, True)}  # for it will be one


def test_bytes_by_hand():
    """K=2, H=4 in bfloat16: a cell is 2 x 2 x 4 x 2 bytes and its position."""
    config = model(dtype="bfloat16")
    specs = slot_specs(config, CacheSpec.parse("full"), 10)
    assert bytes_held(config, specs, 3) == 3 * 3 * 10 * (32 + 4)  # 3 owners
    assert bytes_read_per_step(config, specs, 3) == 4 * 3 * 10 * (32 + 4)  # 4 layers read
    codes = slot_specs(config, CacheSpec.parse("int8"), 10)
    assert bytes_held(config, codes, 1) == 3 * 10 * (16 + 2 * 2 * 4 + 4)
    assert bytes_held(config, slot_specs(config, CacheSpec.parse("int4"), 10), 1) == 3 * 10 * (8 + 16 + 4)
