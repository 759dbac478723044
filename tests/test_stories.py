"""A really trained model, stories260K: from its documented file through `import` to its text, its losses and logits."""

import gzip
import itertools
import json
import struct
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax import checkpoint
from lckv_jax.convert.import_hub import import_hub
from lckv_jax.evaluate.perplexity import score
from lckv_jax.model.transformer import forward


@pytest.fixture(scope="session")
def stories(stories_hub, tmp_path_factory):
    """The imported model: (params, config)."""
    out = tmp_path_factory.mktemp("imported") / "stories260K"
    import_hub(str(stories_hub), str(out))
    params, config, tokenizer = checkpoint.load(out)
    assert tokenizer is None
    return params, config.model


def test_what_was_imported(stories, reference):
    _, model = stories
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (8, 4, 8)
    assert model.tie_embeddings and str(model.sharing) == "0_1_2_3_4" and model.norm_eps == reference["rms_eps"]


def test_logits(stories, weights):
    params, model = stories
    with np.load(weights / "reference_logits.npz") as want:
        got = jax.jit(partial(forward, config=model))(params, tokens_BT=jnp.asarray(want["tokens"])[None])[0]
        np.testing.assert_allclose(got, want["logits"], rtol=0, atol=1e-4)


def test_greedy_text(stories, reference):
    """If each token is the best one after those before it, then the text is the greedy one."""
    params, model = stories
    tokens = np.asarray(reference["greedy_from_bos"])
    logits = jax.jit(partial(forward, config=model))(params, tokens_BT=jnp.asarray(tokens)[None, :-1])[0]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), tokens[1:])
    best = np.sort(np.asarray(logits), axis=-1)
    assert (best[:, -1] - best[:, -2]).min() == pytest.approx(reference["greedy_min_margin"], abs=1e-4)


def test_losses_of_single_stories(stories, reference):
    params, model = stories
    sums = [
        -found.sum(dtype=np.float64) for found in score(params, model, [e["tokens"] for e in reference["examples"]])
    ]
    np.testing.assert_allclose(sums, [example["nll_sum"] for example in reference["examples"]], rtol=1e-5)


def test_loss_of_the_first_hundred_stories(stories, reference, weights, test_data):
    params, model = stories
    encode = llama2c_encoder((weights / "tok512.bin").read_bytes())
    with gzip.open(test_data / "tinystories" / "stories.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(100), lines)]
    lists = [encode(text)[:512] for text in texts]
    assert lists[: len(reference["examples"])] == [example["tokens"] for example in reference["examples"]]
    found, corpus = np.concatenate(score(params, model, lists)), reference["corpus"]
    assert len(found) == corpus["tokens"]
    assert -found.mean(dtype=np.float64) == pytest.approx(corpus["nll_mean"], abs=1e-5)


def llama2c_encoder(raw):
    """text -> ids as llama2.c encodes: BOS, a leading space, then the best-scored neighbours merged until none is left.

    No piece has a space but as its first character, so words never merge and each is encoded once.
    """
    pieces, at = [], 4
    while at < len(raw):
        value, length = struct.unpack_from("<fi", raw, at)
        pieces.append((raw[at + 8 : at + 8 + length], value))
        at += 8 + length
    ids = {piece: id for id, (piece, _) in reversed(list(enumerate(pieces)))}
    assert not any(b" " in piece[1:] for piece, _ in pieces)
    words: dict[str, list[int]] = {}

    def encode_word(word):
        found = []
        for character in word:
            whole = character.encode()
            found += [ids[whole]] if whole in ids else [byte + 3 for byte in whole]
        while True:
            merged = [ids.get(pieces[a][0] + pieces[b][0]) for a, b in itertools.pairwise(found)]
            best = max(((pieces[id][1], -i) for i, id in enumerate(merged) if id is not None), default=None)
            if best is None:
                return found
            place = -best[1]
            found[place : place + 2] = [merged[place]]

    def encode(text):
        result = [1]
        for word in (" " + text).replace(" ", "\0 ").split("\0")[1:]:
            if word not in words:
                words[word] = encode_word(word)
            result += words[word]
        return result

    return encode
