"""Log-probabilities of continuations: equal to plain sums over the logits, whatever the batch."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from lckv_jax import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate import continuations
from lckv_jax.evaluate.continuations import Continuations, row_lengths
from lckv_jax.evaluate.perplexity import score
from lckv_jax.model.transformer import forward, init_params

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4}
SIZES |= {"num_kv_heads": 2, "head_dim": 4, "init_std": 0.3}
LONGEST = 32
CYCLIC = {"sharing": "0_2_2", "no_grad_passes": 2, "grad_passes": 2}
MAPS = {
    "cyclic": CYCLIC,
    "standard": {"sharing": "standard"},
    "from the input": {**CYCLIC, "start": "input"},
    "one pass": {**CYCLIC, "no_grad_passes": 0, "grad_passes": 1},
}


@lru_cache
def make(name="cyclic"):
    config = ModelConfig(**SIZES, **MAPS[name])
    params = init_params(config, jax.random.key(0))
    return params, config, Continuations(params, config, max_length=LONGEST, batch_tokens=256)


def make_requests(count, seed=0, longest=LONGEST):
    """Contexts and continuations of random lengths that together fit in rows of `longest`."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 2))
        start = int(rng.integers(max(1, length - 12), length))
        ids = rng.integers(0, 61, length).tolist()
        requests.append((ids[:start], ids[start:]))
    return requests


def answers(scorer, requests, passes="trained"):
    found = dict(answer for batch in scorer.score(requests, passes) for answer in batch)
    return [found[n] for n in range(len(requests))]


def plain(params, config, requests):
    """Sums in float64 over the logits of `forward`, whose rows go on with random tokens instead of padding."""
    tokens = np.random.default_rng(9).integers(0, 61, (len(requests), LONGEST + 1)).astype(np.int32)
    for row, (context, continuation) in zip(tokens, requests):
        row[: len(context) + len(continuation)] = context + continuation
    logits = np.asarray(jax.jit(forward, static_argnames="config")(params, config, tokens), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for n, (context, continuation) in enumerate(requests):
        at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
        found.append((logp[n, at, continuation].sum(), bool((logp[n, at].argmax(-1) == continuation).all())))
    return found


@pytest.mark.parametrize("name", MAPS)
def test_they_are_the_sums_over_the_logits_of_the_same_passes(name):
    params, config, scorer = make(name)
    requests = make_requests(50)
    greedy = np.asarray(forward(params, config, np.array([requests[0][0]]))).argmax(-1)[0, -1]
    requests[1] = (requests[0][0], [int(greedy)])  # so that one is greedy
    found, want = answers(scorer, requests), plain(params, config, requests)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in want], rtol=0, atol=1e-4)
    assert [g for _, g in found] == [g for _, g in want] and found[1][1] and not all(g for _, g in found)


def test_exact_passes_are_those_of_the_perplexity():
    params, config, scorer = make()
    requests = [request for request in make_requests(24) if len(request[0]) > 20]
    lists = score(params, config, [context + continuation for context, continuation in requests])
    want = [row[len(context) - 1 :].sum() for row, (context, _) in zip(lists, requests)]
    exact = answers(scorer, requests, "exact")
    np.testing.assert_allclose([a for a, _ in exact], want, rtol=0, atol=1e-4)
    trained = answers(scorer, requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(exact, trained)) > 1e-3  # or the test could not tell


@pytest.mark.parametrize("passes", ["trained", "exact", 1e-2])
def test_a_batch_is_its_single_rows_in_any_order(passes):
    _, _, scorer = make()
    requests = make_requests(24, seed=3)
    batch = answers(scorer, requests, passes)
    single = [answers(scorer, [request], passes)[0] for request in requests]
    np.testing.assert_allclose([a for a, _ in batch], [a for a, _ in single], rtol=0, atol=1e-5)
    assert [g for _, g in batch] == [g for _, g in single]
    order = np.random.default_rng(1).permutation(len(requests))
    permuted = answers(scorer, [requests[n] for n in order], passes)
    assert [permuted[np.flatnonzero(order == n)[0]] for n in range(len(requests))] == batch


def test_requests_that_read_the_same_share_a_row(monkeypatch):
    _, _, scorer = make()
    context = list(range(20))
    requests = [(context, [5]), (context, [7]), (context, [5]), ([*context, 5], [9]), (context, [5, 9])]
    rows = []
    run = scorer._run
    monkeypatch.setattr(scorer, "_run", lambda batch, *rest: rows.extend(batch) or run(batch, *rest))
    found = answers(scorer, requests)
    assert sorted(len(row.inputs) for row in rows) == [20, 21]
    assert found[0] == found[2] and found[0] != found[1]
    np.testing.assert_allclose(found[4][0], found[0][0] + found[3][0], rtol=0, atol=1e-5)
    rows.clear()
    answers(scorer, [([3], [n]) for n in range(4)])  # more is wanted of one column than there is room for
    assert [len(row.inputs) for row in rows] == [1] * 4


def test_at_most_eight_programs_serve_all_lengths_and_passes():
    for longest in (*range(1, 300), 1000, 1024, 2048, 4097, 100_000):
        lengths = row_lengths(longest)
        assert lengths == sorted(set(lengths)) and 1 <= len(lengths) <= 8 and lengths[-1] >= longest
    assert row_lengths(1024) == [32, 48, 64, 96, 128, 256, 512, 1024]
    params, config, _ = make()
    scorer = Continuations(params, config, max_length=64, batch_tokens=200)
    requests = make_requests(40, longest=64)
    answers(scorer, requests)
    many = scorer.compilations
    assert many == 3 == len(row_lengths(64))
    answers(scorer, requests, "exact")
    answers(scorer, requests[:20], 1e-2)
    assert scorer.compilations == many


def test_one_pass_and_exact_ones_share_the_number_of_programs(monkeypatch):
    monkeypatch.setattr(continuations, "_MOST_SHAPES", 2)
    params, config, _ = make("one pass")
    scorer = Continuations(params, config, max_length=64, batch_tokens=32)
    requests = [([1] * length, [2]) for length in (5, 60)]
    answers(scorer, requests)
    answers(scorer, requests, "exact")
    assert scorer.compilations == 2


def test_what_has_no_number_is_told():
    params, config, _ = make()
    params = {**params, "final_norm": params["final_norm"] * np.nan}
    with pytest.raises(UserError, match="not finite"):
        answers(Continuations(params, config, max_length=32), make_requests(2, longest=20))
    with pytest.raises(UserError, match="did you mean 'exact'"):
        answers(make()[2], make_requests(2), "exakt")
    with pytest.raises(UserError, match="max_length=0"):
        Continuations(params, config, max_length=0)


def test_eight_devices_give_the_same():
    done = subprocess.run(
        [sys.executable, "tests/continuation_meshes.py"],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
