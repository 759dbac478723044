"""`generate`: golden tokens, rows that do not know each other, sampling, ends, mistakes; and its compiled program."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lckv_jax import ModelConfig
from lckv_jax.convert.hub import load_hub
from lckv_jax.decode import capacity
from lckv_jax.decode import generate as module
from lckv_jax.decode import loop as programs
from lckv_jax.decode.cache import empty
from lckv_jax.decode.generate import generate, generate_rows, stream
from lckv_jax.decode.sampling import Sampling
from lckv_jax.decode.spec import CacheSpec, slot_specs
from lckv_jax.errors import UserError
from lckv_jax.evaluate.perplexity import score

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 4}
SIZES |= {"num_kv_heads": 2, "head_dim": 6, "window": 4}
CASES = [
    "p01_llama_mha", "p02_cla2_gqa", "p03_lckv_w2", "p04_lckv_w0_mqa", "p05_sandwich_middle", "p06_pizza_top_b1",
    "p07_lasagna_top_tied", "p08_yoco_window", "p09_mixattention", "p10_pizza_bottom_tied",
]  # fmt: skip


@pytest.fixture(scope="module")
def lckv(golden):
    return load_hub(golden / "p03_lckv_w2")


@pytest.mark.parametrize("case", CASES)
def test_golden_tokens(golden, case):
    params, config = load_hub(golden / case)
    want = load_file(golden / case / "golden.safetensors")
    prompts = want["gen.prompt_ids"].tolist()
    assert generate(params, config, prompts, 16) == want["gen.tokens"].tolist()
    if "gen.tokens_prefill" in want:
        assert generate(params, config, prompts, 16, passes="trained") == want["gen.tokens_prefill"].tolist()


def test_log_probabilities_are_those_of_scoring(lckv):
    params, config = lckv
    (row,) = generate_rows(params, config, [[3, 1, 4, 1, 5]], 12)
    (want,) = score(params, config, [[3, 1, 4, 1, 5, *row.tokens]])
    np.testing.assert_allclose(row.logprobs, want[4:], rtol=0, atol=1e-5)
    assert row.passes == 5  # the prompt's tokens


@pytest.mark.parametrize("case", CASES)
def test_the_decode_path_gives_the_exact_logits(golden, case):
    """Token by token from an empty cache, against the golden logits of enough passes."""
    params, config = load_hub(golden / case)
    want = load_file(golden / case / "golden.safetensors")
    logits = want["logits_exact" if "logits_exact" in want else "logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    for row, got in enumerate(score(params, config, want["input_ids"].tolist(), cache="full")):
        labels = want["input_ids"][row, 1:]
        np.testing.assert_allclose(got, logprobs[row, :-1][np.arange(len(labels)), labels], rtol=0, atol=5e-5)


def test_a_row_is_the_same_bit_for_bit_beside_any_others(lckv):
    """In one padded shape: what the other rows hold, and that they have ended, changes no bit."""
    params, config = lckv
    first = list(range(20))
    busy = generate_rows(params, config, [first, [5, 6, 7]], 10)
    other = generate_rows(params, config, [first, [9]], 10)
    assert busy[0] == other[0]
    stop = busy[1].tokens[0]
    assert stop not in busy[0].tokens
    ended = generate_rows(params, config, [first, [5, 6, 7]], 10, stop=[stop])
    assert len(ended[1].tokens) == 1 and ended[0] == busy[0]


@pytest.mark.parametrize(
    ("cache", "sampling"),
    [
        ("full", None),
        ("full", Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3)),
        ("sinks(2,6)+int8", None),
    ],
    ids=["greedy", "drawn", "sinks"],
)
def test_rows_of_a_batch_are_rows_alone(lckv, cache, sampling):
    params, config = lckv
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(20))]
    together = generate_rows(params, config, prompts, 10, cache=cache, sampling=sampling)
    for number, prompt in enumerate(prompts):
        own = None if sampling is None else sampling.model_copy(update={"seed": 3 + number})
        (alone,) = generate_rows(params, config, [prompt], 10, cache=cache, sampling=own)
        assert alone.tokens == together[number].tokens
        np.testing.assert_allclose(alone.logprobs, together[number].logprobs, rtol=0, atol=1e-5)
        assert alone.passes == together[number].passes


def test_a_row_that_has_ended_leaves_the_others_as_they_are(lckv):
    params, config = lckv
    prompts = [[3, 1, 4], [2, 7, 1]]
    free = generate(params, config, prompts, 12)
    stop = free[0][4]
    assert stop not in free[1]
    ended = generate(params, config, prompts, 12, stop=[stop])
    assert ended == [free[0][: free[0].index(stop) + 1], free[1]]
    assert generate(params, config, prompts[:1], 1000, stop=[stop]) == ended[:1]  # and the rest is not computed


def test_growing_in_buckets_changes_nothing(lckv, monkeypatch):
    params, config = lckv
    want = generate_rows(params, config, [[3, 1, 4], [2, 7, 1, 8]], 40)
    monkeypatch.setattr(module, "_BUCKET", 16)
    monkeypatch.setattr(module, "_SEGMENT", 7)
    for row, same in zip(want, generate_rows(params, config, [[3, 1, 4], [2, 7, 1, 8]], 40)):
        assert row.tokens == same.tokens
        np.testing.assert_allclose(row.logprobs, same.logprobs, rtol=0, atol=1e-5)


def test_a_cache_grows_slot_by_slot(monkeypatch):
    """Only one slot is there twice, and one that keeps its size is not even copied."""
    config = ModelConfig(**SIZES, sharing="0s_1_2_2")
    few, many = (slot_specs(config, CacheSpec.parse("full"), columns) for columns in (16, 32))
    cache, grown = empty(config, few, 2), []

    def spying(specs, alone):
        grown.append([x.shape for x in jax.tree.leaves(alone.slots)])
        return grow(specs, alone)

    ring, grow = cache.slots[0], programs.grow
    monkeypatch.setattr(programs, "grow", spying)
    got = programs.with_room(many, few, cache)
    assert got.slots[0] is ring and [len(shapes) for shapes in grown] == [3, 3]
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(empty(config, many, 2))):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def test_a_stream_is_the_same_text(lckv):
    params, config = lckv
    want = generate(params, config, [[3, 1, 4]], 21)[0]
    pieces = list(stream(params, config, [3, 1, 4], 21, every=4))
    assert list(itertools.chain(*pieces)) == want and max(map(len, pieces)) == 4


def test_an_endless_stream_needs_a_cache_that_does_not_grow(lckv):
    params, config = lckv
    with pytest.raises(UserError, match=r"grows without end.*sinks\(4,1020\)"):
        next(stream(params, config, [3], None))
    tokens = itertools.chain.from_iterable(stream(params, config, [3], None, cache="sinks(2,6)", every=64))
    assert len(list(itertools.islice(tokens, 600))) == 600  # past several buckets


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [2, 10**6]], {}, "prompt 1 has token 1000000 at place 1"),
        ([[1.5]], {}, "integers"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"cache": "fool"}, "did you mean full"),
        ([[1]], {"passes": "exakt"}, "did you mean 'exact'"),
    ],
)
def test_mistakes_are_one_sentence(lckv, prompts, options, words):
    params, config = lckv
    with pytest.raises(UserError, match=words):
        generate(params, config, prompts, **{"max_new_tokens": 4, **options})


def test_float64_that_would_be_float32_is_refused(lckv):
    params, config = lckv
    with pytest.raises(UserError, match="JAX_ENABLE_X64"):
        generate(params, config.model_copy(update={"dtype": "float64"}), [[1, 2]], 4)


def test_logits_that_are_no_numbers_are_told(lckv):
    params, config = lckv
    broken = {**params, "final_norm": np.full_like(params["final_norm"], np.nan)}
    with pytest.raises(UserError, match="not finite"):
        generate(broken, config, [[1, 2]], 4)


def test_a_batch_that_cannot_fit_names_one_that_does(lckv, monkeypatch):
    params, config = lckv
    monkeypatch.setattr(capacity, "total_bytes", lambda: 3_000_000)
    with pytest.raises(UserError, match=r"a batch of 50 does not fit.*give at most \d+ at once") as error:
        generate(params, config, [[1, 2]] * 50, 1000)
    fit = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert 1 <= fit < 50
    with pytest.raises(UserError, match="give a cache that keeps less"):
        generate(params, config, [[1, 2]], 10**9)


def test_memory_that_is_full_is_told():
    with pytest.raises(UserError, match="a batch of 3 does not fit"), capacity.memory_told(3):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), capacity.memory_told(3):
        raise jax.errors.JaxRuntimeError("INTERNAL: no memory is meant")


@pytest.mark.parametrize(
    ("case", "text"), [("p01_llama_mha", "full"), ("p03_lckv_w2", "full"), ("p03_lckv_w2", "int4")]
)
def test_the_compiled_loop_copies_no_slot(golden, case, text):
    """Cache aliased, no copy as large as one slot, temporaries small: steps write one cell in place."""
    params, config = load_hub(golden / case)
    columns, B = 4096, 8
    specs = slot_specs(config, CacheSpec.parse(text), columns)
    weights = jax.eval_shape(lambda: programs.unstack(jax.tree.map(jnp.asarray, params), config))
    prompts = programs.Prompts(np.zeros((B, 16), np.int32), np.zeros(B, np.int32), module.row_keys(Sampling(), B))
    stops = np.zeros(0, np.int32)
    loop, _, _ = jax.eval_shape(lambda w: programs.prefill(w, config, specs, "trained", None, prompts, stops), weights)
    keys = prompts.keys_B
    compiled = programs.decode.lower(weights, config, specs, None, 8, loop, keys, stops).compile()
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(loop.cache))
    slot = B * config.num_kv_heads * columns * config.head_dim
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * cache
    assert text != "full" or memory.temp_size_in_bytes < 0.25 * cache  # codes are numbers again to be multiplied
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < slot for shape in copies), copies


@pytest.mark.parametrize("length", [1, 17, 1024, 16 * 257, 16 * 2053, 16 * 4093, 2**16 + 1])
def test_prompts_of_any_length_divide_into_large_chunks(lckv, length):
    config = lckv[1].model_copy(update={"num_heads": 32})
    columns = module._padded_prompts([[0] * length], 1)[0].shape[1]
    assert columns - length < max(16, length / 32)
    most = min(columns, programs._GROUP_TOKENS // 16, programs._GROUP_SCORES // (32 * columns))
    assert programs.tiles(config, 1, columns).chunk > most / 2


def test_one_program_for_all_seeds(lckv):
    params, config = lckv
    kinds = programs.prefill_group, programs.decode
    for kind in kinds:
        kind.clear_cache()
    samplings = [Sampling(top_k=30, seed=seed) for seed in (0, 8, 2**32 - 1)]
    drawn = [generate(params, config, [[3, 1]], 9, sampling=sampling) for sampling in samplings]
    assert drawn[0] != drawn[1] != drawn[2]
    assert [kind._cache_size() for kind in kinds] == [1, 1]


def test_one_program_for_each_bucket(lckv, monkeypatch):
    params, config = lckv
    programs.decode.clear_cache()
    for seed in range(3):  # prompts of other lengths, one shape
        generate(params, config, [list(range(3 + seed)), [seed]], 9)
    assert programs.decode._cache_size() == 1


def test_stories_in_their_own_words(stories_hub, reference):
    """A really trained model: its greedy text from BOS, through the cache."""
    params, config = load_hub(stories_hub)
    want = reference["greedy_from_bos"]
    assert len(want) > 100
    assert generate(params, config, [want[:1]], len(want) - 1) == [want[1:]]
