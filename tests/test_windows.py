"""Sliding windows against plain float64 computations: what each token is predicted from, and what is made of it."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_jax import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate.perplexity import measure, score
from lckv_jax.evaluate.rows import Text
from lckv_jax.evaluate.statistics import ratio
from lckv_jax.evaluate.windows import measure_windows, pack_rows, plan_windows, score_windows
from lckv_jax.model.transformer import forward, init_params

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(
    vocab_size=61, hidden_size=16, intermediate_size=20, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4,
    init_std=0.4, no_grad_passes=1, grad_passes=1, remat="none",
)  # fmt: skip
LENGTHS = [2, 41, 16, 17, 1, 9, 30]


def make(spec, **changes):
    config = ModelConfig(**SIZES | {"sharing": spec} | changes)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return config, jax.tree.map(lambda p: rng.normal(0.0, 0.4, p.shape).astype(np.float32), shapes)


def some_streams(lengths=LENGTHS):
    rng = np.random.default_rng(2)
    return [rng.integers(3, 61, length).astype(np.int32) for length in lengths]


forward_jit = jax.jit(forward, static_argnums=1)


def by_hand(params, config, tokens, seq_len, stride):
    """-log p of each token after the first, from the last logits of a forward over the tokens before it that the first
    window to reach it shows, in float64."""
    with jax.enable_x64():
        config = config.model_copy(update={"dtype": "float64"})
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        found = []
        for place in range(1, len(tokens)):
            start = next(start for start in range(0, len(tokens), stride) if place <= start + seq_len)
            shown = np.pad(tokens[start:place], (0, seq_len - (place - start)))  # causal: what follows is not read
            logits = np.asarray(forward_jit(params, config, jnp.asarray(shown[None]))[0, place - start - 1])
            top = logits.max()
            found.append(top + math.log(np.exp(logits - top).sum()) - logits[tokens[place]])
        return np.array(found)


# ---------------------------------------------------------------- windows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 20), st.data())
def test_each_token_is_predicted_once_from_enough(lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    seen = [np.zeros(max(0, length - 1), int) for length in lengths]
    for stream, start, first, stop in plan_windows(lengths, seq_len, stride):
        assert start <= first < stop <= start + seq_len
        seen[stream][first:stop] += 1
        assert start % stride == 0
        assert start == 0 or first - start + 1 > seq_len - stride
        assert start == 0 or stop - first <= stride
    assert all((counts == 1).all() for counts in seen)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 60), max_size=30), st.integers(1, 20))
def test_rows_hold_every_window_once(lengths, columns):
    windows = plan_windows(lengths, columns, columns)
    rows = pack_rows(windows, columns)
    assert sorted(number for row in rows for number in row) == list(range(len(windows)))
    sizes = [sum(windows[number].stop - windows[number].start for number in row) for row in rows]
    assert all(0 < size <= columns for size in sizes)
    assert sum(size <= columns // 2 for size in sizes) <= 1  # two such rows had been one


@pytest.mark.parametrize("spec", ["0_2_2_3", "standard"])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_nats_are_those_of_a_forward_for_each_token(spec, stride):
    config, params = make(spec)
    streams = some_streams([2, 41, 16, 1])
    scored = score_windows(params, config, streams, 16, stride, passes="trained", batch_size=2)
    for tokens, nats, reads in zip(streams, scored.nats, scored.reads):
        np.testing.assert_allclose(nats, by_hand(params, config, tokens, 16, stride), atol=2e-5)
        places = np.arange(1, len(tokens))
        assert (reads >= np.minimum(places, 16 - stride + 1)).all() and (reads <= np.minimum(places, 16)).all()


def test_windows_that_do_not_overlap_are_pieces():
    config, params = make("standard")
    streams = some_streams()
    scored = score_windows(params, config, streams, 16, 16, passes="exact")
    for tokens, nats in zip(streams, scored.nats):
        pieces = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
        right = [-x for x in score(params, config, pieces)]
        np.testing.assert_allclose(nats, np.concatenate([np.zeros(0), *right]), atol=2e-5)


def test_what_else_is_scored_changes_nothing():
    config, params = make("0_2_2_3")
    alone = score_windows(params, config, some_streams()[1:2], 16, 8, passes="trained", batch_size=2)
    among = score_windows(params, config, some_streams(), 16, 8, passes="trained", batch_size=2)
    np.testing.assert_allclose(alone.nats[0], among.nats[1], atol=1e-5)


def test_more_context_is_what_a_stride_buys():
    """The numbers move where a window shows more, and only there."""
    config, params = make("standard")
    long, short = (score_windows(params, config, some_streams(), 16, s, passes="exact").nats[1] for s in (16, 4))
    np.testing.assert_allclose(long[:16], short[:16], atol=1e-5)
    assert np.abs(long[16:20] - short[16:20]).max() > 1e-3


def test_a_stride_longer_than_a_window():
    with pytest.raises(UserError, match=r"stride=17 is longer than seq_len=16, .* give a stride of at most 16"):
        plan_windows([40], 16, 17)


def test_a_loss_that_is_not_finite():
    config, params = make("0_2_2_3")
    params["final_norm"][0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        score_windows(params, config, some_streams(), 16, 8, passes="trained")


# ---------------------------------------------------------------- report


def a_text(documents, bos=1, eos=2, names=None):
    tokens = np.concatenate([[bos, *document, *([eos] * (eos != bos))] for document in documents]).astype(np.int32)
    known = names and tuple((name, 3 * len(document)) for name, document in zip(names, documents))
    return Text("some text", tokens, 3 * sum(map(len, documents)), bos, eos, known)


def some_documents(number=12, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, rng.integers(3, 40)).tolist() for _ in range(number)]


def test_the_report_is_made_of_the_documents():
    config, params = make("0_2_2_3")
    documents = some_documents()
    names = [f"{number}.txt" for number in range(12)]
    report = measure_windows(
        params, config, a_text(documents, names=names), 16, 8, passes="exact", by_position=5, by_document=True
    )
    streams = [np.array([1, *document, 2], np.int32) for document in documents]
    scored = score_windows(params, config, streams, 16, 8, passes="exact")
    sums, counts = np.array([x.sum() for x in scored.nats]), np.array([len(x) for x in scored.nats])
    mean = sums.sum() / counts.sum()
    assert (report.tokens, report.documents, report.clusters) == (counts.sum(), 12, 12)
    assert report.clustered_over == "documents"
    np.testing.assert_allclose(report.nats.value, mean, rtol=1e-6)
    np.testing.assert_allclose(report.perplexity.value, math.exp(mean), rtol=1e-6)
    np.testing.assert_allclose(report.perplexity.stderr, math.exp(mean) * report.nats.stderr, rtol=1e-6)
    bits = sums.sum() / math.log(2) / sum(3 * len(document) for document in documents)
    np.testing.assert_allclose(report.bits_per_byte.value, bits, rtol=1e-6)
    assert [score.name for score in report.by_document] == names
    np.testing.assert_allclose([score.nats for score in report.by_document], sums / counts, rtol=1e-6)
    assert [score.bytes for score in report.by_document] == [3 * len(document) for document in documents]
    reads = np.concatenate(scored.reads)
    for bucket in report.by_position:
        here = (reads > bucket.start) & (reads <= bucket.stop)
        assert bucket.tokens == here.sum()
        np.testing.assert_allclose(bucket.nats.value, np.concatenate(scored.nats)[here].mean(), rtol=1e-6)
    assert sum(bucket.tokens for bucket in report.by_position) == report.tokens


def test_standard_errors_are_those_of_drawing_documents_again():
    """The bootstrap over documents agrees; an error that took tokens for independent would be a third of it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 80, 200)
    sums = np.array([(rng.normal(3.0, 1.0) + rng.normal(0, 1.0, n)).sum() for n in tokens])
    drawn = rng.integers(0, 200, (4000, 200))
    spread = (sums[drawn].sum(1) / tokens[drawn].sum(1)).std()
    estimate = ratio(sums, tokens)
    assert abs(estimate.stderr / spread - 1) < 0.05
    assert ratio(sums[:1], tokens[:1]).stderr is None
    few = ratio(np.array([1.0, 2.0, 6.0]), np.ones(3))  # of equal clusters: that of a mean
    np.testing.assert_allclose(few, (3.0, np.std([1.0, 2.0, 6.0], ddof=1) / math.sqrt(3)))


def test_few_documents_have_errors_over_windows():
    config, params = make("standard")
    report = measure_windows(params, config, a_text(some_documents(3)), 16, 8, passes="exact")
    assert (report.clustered_over, report.documents) == ("windows", 3)
    assert report.clusters == report.windows > 3
    one = measure_windows(params, config, a_text([[5, 6, 7]]), 16, 8, passes="exact")
    assert one.nats.stderr is None and one.perplexity.stderr is None and one.bits_per_byte.stderr is None


def test_one_window_of_everything_is_what_evaluate_reports():
    config, params = make("0_2_2_3")
    text = a_text(some_documents(4))
    mine = measure_windows(params, config, text, 256, 256, passes="trained")
    (theirs,) = measure(params, config, text, ["trained"], 256, 1)
    assert mine.tokens == theirs.tokens
    np.testing.assert_allclose(mine.nats.value, theirs.nats, rtol=1e-5)
    np.testing.assert_allclose(mine.bits_per_byte.value, theirs.bits_per_byte, rtol=1e-5)


def test_joined_documents_are_one_text():
    """Each BOS but the first is predicted, too, and belongs to the document that it begins."""
    config, params = make("standard")
    documents = some_documents(3)
    text = a_text(documents)
    report = measure_windows(params, config, text, 16, 8, passes="exact", packing="joined", by_document=True)
    (nats,) = score_windows(params, config, [text.tokens], 16, 8, passes="exact").nats
    assert report.tokens == len(text.tokens) - 1
    np.testing.assert_allclose(report.nats.value, nats.mean(), rtol=1e-6)
    assert [score.tokens for score in report.by_document] == [
        len(documents[0]) + 1,
        *(len(d) + 2 for d in documents[1:]),
    ]


def test_an_end_that_is_the_next_beginning():
    """With one token for BOS and EOS, that of the next document is predicted as the end of the one before it."""
    config, params = make("standard")
    documents = some_documents(3)
    text = a_text(documents, bos=1, eos=1)
    report = measure_windows(params, config, text, 64, 64, passes="exact", by_document=True)
    streams = [[1, *documents[0], 1], [1, *documents[1], 1], [1, *documents[2]]]
    right = [-x.mean() for x in score(params, config, streams)]
    np.testing.assert_allclose([score.nats for score in report.by_document], right, rtol=1e-5)


def test_nothing_to_predict():
    config, params = make("standard")
    with pytest.raises(UserError, match="some text has no token to predict"):
        measure_windows(params, config, Text("some text", np.array([1], np.int32), None, 1, 2), 16, 8, passes="exact")


# ---------------------------------------------------------------- mesh

MESHES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
from test_windows import make, some_streams
from lckv_jax.config import MeshConfig
from lckv_jax.evaluate.windows import score_windows
from lckv_jax.parallel.mesh import make_mesh, parameter_shardings
config, params = make("0_2_2_3", vocab_size=64)
want = score_windows(params, config, some_streams(), 16, 8, passes="trained")
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
placed = jax.device_put(params, parameter_shardings(config, mesh))
got = score_windows(placed, config, some_streams(), 16, 8, passes="trained", batch_size=3, mesh=mesh)
worst = max(np.abs(a - b).max(initial=0) for a, b in zip(got.nats, want.nats))
assert worst < 1e-5, worst
assert len(got.passes) == len(want.passes)
print("equal")
"""


def test_eight_devices_give_the_same():
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MESHES], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
