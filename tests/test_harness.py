"""The adapter: tokens as the harness' own model makes them, rolling text, and generation that stops where it should."""

import hashlib
import string
from functools import lru_cache

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from lckv_jax import ModelConfig
from lckv_jax.decode.generate import generate
from lckv_jax.errors import UserError
from lckv_jax.evaluate.harness import HarnessModel
from lckv_jax.evaluate.perplexity import score
from lckv_jax.model.transformer import init_params

LETTERS = string.ascii_letters + string.digits + " \n"
BOS, EOS = 64, 65


class Letters:
    """A token for each of 64 characters."""

    vocab_size, bos_id, eos_id, fingerprint = 66, BOS, EOS, hashlib.sha256(b"letters").hexdigest()

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def encode_batch(self, texts):
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids):
        return "".join(LETTERS[id] for id in ids if id < 64)


ids = Letters().encode
CONFIG = ModelConfig(
    vocab_size=68, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
    sharing="0_2_2", no_grad_passes=2, init_std=0.3,
)  # fmt: skip


@lru_cache
def params():
    return init_params(CONFIG, jax.random.key(0))


@lru_cache
def model(**more):
    return HarnessModel(params(), CONFIG, Letters(), **{"max_length": 32, "passes": "exact", **more})


def requests(kind, *arguments):
    return [Instance(kind, {}, args, 0, metadata=("test", n, 1)) for n, args in enumerate(arguments)]


def test_bos_is_first_and_spaces_belong_to_the_continuation():
    lm = model()
    pairs = [("ab ", "cd"), ("ab", " cd"), ("", "cd"), ("ab", " ce")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    texts = [[BOS, *ids("ab cd")], [BOS, *ids("cd")], [BOS, *ids("ab ce")]]
    first, empty, other = score(params(), CONFIG, texts)
    want = [first[2:].sum(), first[2:].sum(), empty.sum(), other[2:].sum()]
    np.testing.assert_allclose([logp for logp, _ in found], want, rtol=0, atol=1e-4)
    assert found[0] == found[1] and lm.tok_encode("ab") == [BOS, 0, 1]
    tokens = [(("", ""), [BOS, *ids("ab")], ids(" cd"))]  # what the harness itself would ask for
    assert lm._loglikelihood_tokens(tokens) == found[:1]


def test_requests_longer_than_the_context_lose_their_beginning_and_are_counted():
    lm = model().with_passes("exact")
    fits, long = "a" * 30, "b" * 50
    found = lm.loglikelihood(requests("loglikelihood", (fits, "xy"), (long, "xy")))
    assert lm.cut == {("test", 1)}  # BOS + 30 + 2 is one more than 32, but the last token is not read
    (want,) = score(params(), CONFIG, [ids("b" * 31 + "xy")])
    np.testing.assert_allclose(found[1][0], want[-2:].sum(), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="task test, item 0: a continuation of 33 tokens is longer than max_length=32"):
        lm.loglikelihood(requests("loglikelihood", ("a", "x" * 33)))
    with pytest.raises(UserError, match="task test, item 0: a continuation has no tokens"):
        lm.loglikelihood(requests("loglikelihood", ("a", "")))


def test_rolling_text_is_predicted_once_in_windows_that_share_nothing():
    texts = ["", "short", "x" * 20 + "y" * 57]
    found = model().loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    long = [BOS, *ids(texts[2])]
    short = score(params(), CONFIG, [[BOS, *ids("short")]])[0].sum()
    # windows of 32 tokens to read; the last one reads as much as it can before the 13 that are left to predict
    windows = [long[:33], long[32:65], long[45:78]]
    first, second, last = score(params(), CONFIG, windows)
    want = first.sum() + second.sum() + last[-13:].sum()
    np.testing.assert_allclose(found, [0.0, short, want], rtol=0, atol=1e-3)


# ---------------------------------------------------------------- generation


@lru_cache
def continued():
    """A context that greedy decoding goes on from with two letters that come for the first time in the middle, and the
    16 letters."""
    rows = generate(params(), CONFIG, [[BOS, n] for n in range(62)], 16)
    texts = {LETTERS[n]: Letters().decode(row) for n, row in enumerate(rows)}
    return next((a, text) for a, text in texts.items() if len(text) == 16 and 3 <= text.index(text[6:8]) <= 6)


def ask(lm, *arguments):
    return lm.generate_until(requests("generate_until", *arguments))


def test_text_ends_before_the_first_stop_string_also_one_across_tokens():
    lm = model(max_length=64)
    context, whole = continued()
    two = whole[6:8]
    cut = whole[: whole.index(two)]
    kwargs = {"max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
    found = ask(
        lm,
        (context, {**kwargs, "until": []}),
        (context, {**kwargs, "until": [two]}),
        (context, {**kwargs, "until": whole[3]}),
        (context, {**kwargs, "until": ["not there", two, ""]}),
        (context, {**kwargs, "max_gen_toks": 4}),
    )
    assert found == [whole, cut, whole[: whole.index(whole[3])], cut, whole[:4]]


def test_text_does_not_depend_on_what_is_asked_beside_it():
    lm = model(max_length=64)
    arguments = [("ab" * n, {"until": ["\n"], "max_gen_toks": 4}) for n in range(1, 7)]
    together = HarnessModel(params(), CONFIG, Letters(), max_length=64, passes="exact", batch_tokens=60)
    assert [ask(lm, argument)[0] for argument in arguments] == ask(together, *arguments[::-1])[::-1]


def test_long_prompts_lose_their_beginning_and_are_counted():
    lm = model().with_passes("exact")
    long = "abcdefghij" * 5
    (found,) = ask(lm, (long, {"until": [], "max_gen_toks": 8}))
    assert found == Letters().decode(generate(params(), CONFIG, [ids(long[-24:])], 8)[0]) and lm.cut == {("test", 0)}
    with pytest.raises(UserError, match="max_gen_toks=32 leaves no room for a prompt in max_length=32"):
        ask(lm, ("a", {"until": [], "max_gen_toks": 32}))


def test_sampling_is_as_asked_for():
    lm = model(max_length=64)
    kwargs = {"until": [], "max_gen_toks": 8, "do_sample": True}
    context, whole = continued()
    greedy = whole[:8]
    assert ask(lm, (context, {**kwargs, "temperature": 0})) == [greedy]
    warm = (context, {**kwargs, "temperature": 2.0, "top_k": 0})
    lm.seed = 1
    first = ask(lm, warm)
    assert first == ask(lm, warm) and first != [greedy]
    lm.seed = 2
    assert first != ask(lm, warm)
    with pytest.raises(UserError, match="generation_kwargs: num_beams is not known here; use until, max_gen_toks"):
        ask(lm, ("ab", {**kwargs, "num_beams": 4}))
    with pytest.raises(UserError, match="top_p"):
        ask(lm, ("ab", {**kwargs, "top_p": 2.0}))


def test_repeats_of_one_context_are_drawn_anew_in_each_batch():
    lm = HarnessModel(params(), CONFIG, Letters(), max_length=64, passes="exact", batch_tokens=256)
    found = ask(lm, *[("ab", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0})] * 12)
    assert len(set(found)) == 12


def test_finished_texts_are_kept(tmp_path):
    arguments = [("ab", {"until": ["\n"], "max_gen_toks": 4}), ("cd", {"until": ["\n"], "max_gen_toks": 4})]
    first = ask(model(finished=tmp_path / "a.jsonl"), *arguments)
    again = HarnessModel(params(), CONFIG, Letters(), max_length=32, passes="exact", finished=tmp_path / "a.jsonl")
    again._texts = None  # so that nothing can be generated
    assert ask(again, *arguments) == first


def test_answers_of_another_model_are_not_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    pair = requests("loglikelihood", ("ab", "cd"))
    found = [
        HarnessModel(tree, CONFIG, Letters(), max_length=32, passes="exact", finished=path).loglikelihood(pair)
        for tree in (params(), init_params(CONFIG, jax.random.key(1)), params())
    ]
    assert found[0] == found[2] != found[1] and len(path.read_text().splitlines()) == 2


def test_a_tokenizer_of_another_model():
    small = CONFIG.model_copy(update={"vocab_size": 64})
    with pytest.raises(UserError, match="the tokenizer has 66 tokens, but the model only 64; give the tokenizer that"):
        HarnessModel(params(), small, Letters(), max_length=32)
    with pytest.raises(UserError, match="did you mean 'trained'"):
        model(passes="train")
