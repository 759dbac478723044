"""Log-probabilities by the decode path: exact for every map and cache, each list alone, and `evaluate` with caches."""

import gzip
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import token_by_token
from stories260k import write_tokenizer

from lckv_jax import ModelConfig
from lckv_jax.checkpoint import load
from lckv_jax.config import read_overrides
from lckv_jax.convert.hub import load_hub
from lckv_jax.data.tokenizer import load_tokenizer
from lckv_jax.decode.cache import fill
from lckv_jax.decode.spec import CacheSpec, slot_specs
from lckv_jax.decode.step import decode_step, decode_weights
from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import measure_caches
from lckv_jax.evaluate.decode_path import Prompt, segment
from lckv_jax.evaluate.perplexity import EvaluateConfig, evaluate, measure, score
from lckv_jax.evaluate.rows import Text, read_text, text_pieces
from lckv_jax.model.transformer import hidden_states, init_params

MAPS = ["0_1_2_3", "0_2_2_3", "3_3_3_3", "0s_1s_2_2"]
CACHES = {
    "window(5)": {"window": 5},
    "sinks(2,5)": {"window": 5, "sinks": 2},
    "int8": {"largest": 127},
    "int4": {"largest": 7},
}


@pytest.fixture(autouse=True)
def fast_compiling():
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def small(sharing, **changes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 6, "window": 4, "dtype": "float64", "init_std": 0.5}
    return ModelConfig(**(sizes | {"sharing": sharing} | changes))


def make_params(config, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape) + (x.ndim == 1), dtype), shapes)


def texts(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, length).tolist() for length in lengths]


def log_probabilities(logits, tokens):
    """Of each token after the first, from logits [T, V]."""
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logp[np.arange(len(tokens) - 1), tokens[1:]]


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("sharing", MAPS)
def test_the_full_cache_gives_what_exact_passes_give(sharing, x64):
    config = small(sharing)
    params, lists = make_params(config), texts(23, 9)
    want = score(params, config, lists)
    for cache in ("full", CacheSpec.parse("sinks(1,99)")):
        for got, right in zip(score(params, config, lists, cache=cache), want):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sharing", MAPS)
def test_small_caches_equal_the_oracle(sharing, cache, x64):
    config = small(sharing)
    params, (tokens,) = make_params(config), texts(21)
    want = log_probabilities(token_by_token(params, config, tokens, prompt=0, **CACHES[cache]), tokens)
    (got,) = score(params, config, [tokens], cache=cache)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cache", ["full", "sinks(2,5)", "int8"])
def test_lists_of_any_length_are_scored_as_each_alone(cache, x64):
    config = small("0_2_2_3")
    params = make_params(config)
    lists = [*texts(30, 29, 26, 25, 3), [], [7], *texts(12, 2)]
    together = score(params, config, lists, cache=cache)
    assert [len(row) for row in together] == [max(0, len(tokens) - 1) for tokens in lists]
    for tokens, row in zip(lists, together):
        np.testing.assert_allclose(row, score(params, config, [tokens], cache=cache)[0], rtol=0, atol=1e-11)
    assert score(params, config, [], cache=cache) == []


def test_one_program_for_each_size_of_the_cache():
    config = small("0_2_2_3", dtype="float32")
    params = make_params(config, np.float32)
    for cache, programs in {"full": 3, "sinks(4,28)": 1}.items():
        segment.clear_cache()
        found = score(params, config, texts(257 + 128 + 40), cache=cache)  # 256, 384 and 512 cells
        assert segment._cache_size() == programs, cache
        score(params, config, texts(257 + 128 + 3, seed=2), cache=cache)
        assert segment._cache_size() == programs, cache
    right = score(params, config, texts(257 + 128 + 40))
    np.testing.assert_allclose(score(params, config, texts(257 + 128 + 40), cache="full")[0], right[0], atol=2e-4)
    assert np.abs(found[0] - right[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("lists", "arguments", "message"),
    [
        ([[1, 2], [3, 40]], {"cache": "full"}, "list 1 has token 40 at place 1"),
        ([[1, 2]], {"cache": "ful"}, "did you mean full"),
        ([[1, 2]], {"cache": "full", "passes": "trained"}, "a decode step is exact by itself"),
        ([[1, 2]], {"cache": "budget(8,2,snapkv)"}, "here there is no prompt; measure it by `evaluate` with prompt_"),
        ([[1, 2]], {"cache": "budget(8,2,pyramidkv)+int8"}, "no prompt"),
    ],
)
def test_what_cannot_be_scored(lists, arguments, message):
    config = small("0_2_2_3", dtype="float32")
    with pytest.raises(UserError, match=message):
        score(make_params(config, np.float32), config, lists, **arguments)


def test_float64_that_would_be_float32_is_refused():
    config = small("0_2_2_3")
    with pytest.raises(UserError, match="JAX_ENABLE_X64"):
        score(make_params(config, np.float32), config, [[1, 2]], cache="full")


# ---------------------------------------------------------------- a trained model


def test_stories_by_the_decode_path(stories_hub, reference):
    """The full cache gives the reference's losses; codes of 8 bits cost little, few tokens more."""
    params, config = load_hub(stories_hub)
    lists = [example["tokens"] for example in reference["examples"]]
    caches = ["full", "int8", "sinks(4,28)"]
    sums = {
        cache: [-row.sum(dtype=np.float64) for row in score(params, config, lists, cache=cache)] for cache in caches
    }
    np.testing.assert_allclose(sums["full"], [example["nll_sum"] for example in reference["examples"]], rtol=1e-5)
    means = {cache: sum(rows) / sum(len(tokens) - 1 for tokens in lists) for cache, rows in sums.items()}
    assert 0 < means["int8"] - means["full"] < 0.01
    assert means["full"] + 0.01 < means["sinks(4,28)"]


def test_the_tokenizer_of_the_stories(weights, test_data, reference, tmp_path):
    """docs/generate.md measures with it: its ids are those that the reference was made of."""
    write_tokenizer(weights, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    with gzip.open(test_data / "tinystories" / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(reference["examples"], lines)]
    for text, example in zip(texts, reference["examples"]):
        assert [tokenizer.bos_id, *tokenizer.encode(text)][:512] == example["tokens"]


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize(("bos", "eos"), [(1, 2), (1, 1)])
@pytest.mark.parametrize("packing", ["masked", "joined"])
def test_pieces_predict_the_tokens_that_rows_predict(packing, bos, eos):
    """As many tokens, and with the full cache as likely, as those of exact passes over packed rows."""
    config = small("0_2_2_3", dtype="float32")
    params, rng = make_params(config, np.float32), np.random.default_rng(3)
    end = [eos] * (bos != eos)
    tokens = np.concatenate([[bos, *rng.integers(3, 40, n), *end] for n in (4, 17, 1, 9, 30)]).astype(np.int32)
    text = Text("", tokens, 100, bos, eos)
    pieces = text_pieces(text, 16, packing)
    (want,) = measure(params, config, text, ["exact"], 16, 8, packing=packing)
    (got,) = measure_caches(params, config, pieces, ["full"], 3, text_bytes=text.bytes, by_position=5)
    assert got.tokens == want.tokens
    np.testing.assert_allclose(got.nats, want.nats, rtol=1e-5)
    np.testing.assert_allclose(got.bits_per_byte, want.bits_per_byte, rtol=1e-5)


def test_positions_add_up_and_lie_where_they_belong():
    config = small("0_2_2_3", dtype="float32")
    params, lists = make_params(config, np.float32), texts(20, 13, 7)
    pieces = [np.asarray(tokens, np.int32) for tokens in lists]
    (report,) = measure_caches(params, config, pieces, ["window(5)"], 2, by_position=8)
    rows = score(params, config, lists, cache="window(5)")
    assert [(b.start, b.stop, b.tokens) for b in report.positions] == [(0, 8, 8 + 8 + 6), (8, 16, 8 + 4), (16, 24, 3)]
    second = np.concatenate([rows[0][8:16], rows[1][8:16]])
    np.testing.assert_allclose(report.positions[1].nats, -second.mean(), rtol=1e-5)
    total = sum(bucket.nats * bucket.tokens for bucket in report.positions)
    np.testing.assert_allclose(total, report.nats * report.tokens, rtol=1e-12)
    np.testing.assert_allclose(report.perplexity, math.exp(report.nats))


@pytest.mark.parametrize(("sharing", "cache"), [("0_2_2_3", "full"), ("0_2_2_3", "sinks(2,5)"), ("0_1_2_3", "int8")])
def test_tokens_after_a_prompt_are_scored_as_a_decoder_goes_on(sharing, cache):
    """On the cache that a decoder has then; not the first, which a prefill predicts whatever the cache keeps."""
    config = small(sharing, dtype="float32")
    params, lists = make_params(config, np.float32), texts(20, 13, 8)
    pieces = [np.asarray(tokens, np.int32) for tokens in lists]
    (report,) = measure_caches(params, config, pieces, [cache], 2, prompt=Prompt(7, "exact"), by_position=10)
    assert report.tokens == 12 + 5  # nothing is decoded of the last text
    assert [(b.start, b.tokens) for b in report.positions] == [(0, 3 + 3), (10, 9 + 2)]
    want = [x for tokens in lists[:2] for x in after_prompt(params, config, tokens, 7, cache)]
    np.testing.assert_allclose(-report.nats * 17, sum(want), rtol=1e-4)


def after_prompt(params, config, tokens, prompt, cache):
    """Log-probabilities of the tokens but one after a prompt, step by step from the cache that it fills."""
    hidden = hidden_states(params, config, jnp.asarray([tokens[:prompt]]), passes="exact")
    specs = slot_specs(config, CacheSpec.parse(cache), len(tokens), prompt=prompt)
    state, weights = fill(specs, hidden.slots, jnp.zeros(1, jnp.int32)), decode_weights(params, config)
    step = jax.jit(lambda state, token: decode_step(weights, config, specs, state, token, jnp.ones(1, bool)))
    for token, label in itertools.pairwise(tokens[prompt:]):
        logits, state = step(state, jnp.asarray([token]))
        yield float(jax.nn.log_softmax(logits[0])[label])


def test_texts_shorter_than_the_prompt_leave_nothing():
    config = small("0_2_2_3", dtype="float32")
    pieces = [np.arange(5, dtype=np.int32)]
    with pytest.raises(UserError, match="prompt_tokens=5 leaves nothing to decode"):
        measure_caches(make_params(config, np.float32), config, pieces, ["full"], 1, prompt=Prompt(5, "exact"))


def test_numbers_that_are_none_are_refused():
    config = small("0_2_2_3", dtype="float32")
    params = make_params(config, np.float32)
    params["final_norm"] = params["final_norm"].at[0].set(np.nan)
    with pytest.raises(UserError, match="cache=full: the loss is not finite"):
        measure_caches(params, config, [np.arange(5, dtype=np.int32)], ["full"], 1)


@pytest.mark.parametrize(
    ("value", "caches"),
    [
        ("sinks(4,60)+int8", ("sinks(4,60)+int8",)),
        ("[full,window(64)]", ("full", "window(64)")),
        ("[full, sinks(4,60)+int4, int8]", ("full", "sinks(4,60)+int4", "full+int8")),
        ('["sinks(4,60)", kivi(2,32,128)]', ("sinks(4,60)", "full+kivi(2,32,128)")),
        ("full,sinks(4,60),full", ("full", "sinks(4,60)")),
    ],
)
def test_caches_on_the_command_line(value, caches):
    assert read_overrides(EvaluateConfig, [f"cache={value}"], "evaluate").cache == caches


def test_the_command(trained, tmp_path, capsys):
    out, plot = tmp_path / "new" / "report.json", tmp_path / "new" / "positions.svg"
    settings = ["cache=[full,sinks(2,6)]", "max_tokens=150", "by_position=8", f"out={out}", f"plot={plot}"]
    evaluate(str(trained / "run"), settings)
    told, written = capsys.readouterr().out, json.loads(out.read_text())
    params, run, tokenizer = load(trained / "run")
    pieces = text_pieces(read_text(run, (), 150, tokenizer), run.data.seq_len, run.data.packing)
    assert written["seq_len"] == 32 and written["packing"] == "masked" and written["prompt_tokens"] is None
    for report in written["reports"]:
        rows = score(params, run.model, [piece.tolist() for piece in pieces], cache=report["cache"])
        np.testing.assert_allclose(report["nats"], -np.concatenate(rows).mean(dtype=np.float64), rtol=1e-5)
        assert report["positions"][1]["start"] == 8
        assert f"{report['perplexity']:,.3f}" in told
    full, sinks = written["reports"]
    heads = 4 + 2 * 2 * run.model.head_dim * 4  # of a cell: its position, keys and values of 2 heads in float32
    assert (full["row_bytes"], sinks["row_bytes"]) == (3 * 32 * heads, 3 * 8 * heads)
    assert "sinks(2,6)" in plot.read_text() and "trained on rows" not in plot.read_text()
    assert "predicted one by one" in told and f"wrote {plot}" in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cache=ful"], "^override 'cache=ful': cache: there is no policy 'ful'; did you mean full"),
        (["cache=[]"], "cache"),
        (["prompt_tokens=5"], "prompt_tokens needs cache; add, for example, cache=full"),
        (["by_position=5"], "by_position needs cache"),
        (["cache=full", "plot=a.png"], "plot needs by_position"),
        (["cache=full", "by_position=5", "plot=a.gif"], "a.gif ends in none of"),
        (["cache=full", "passes=trained"], "passes are those of the prompts"),
        (["cache=full", "prompt_tokens=5", "passes=[trained,exact]"], "passes are those of the prompts: give one"),
        (["cache=budget(8,2,snapkv)"], "here there is no prompt"),
    ],
)
def test_mistakes_are_one_sentence(trained, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate(str(trained / "run"), settings)
