"""Scores and perplexities against plain float64 computations, and `evaluate` from the checkpoint to the report."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import token_by_token

from lckv_jax import ModelConfig
from lckv_jax.checkpoint import load
from lckv_jax.config import SourceConfig
from lckv_jax.data.batches import batches
from lckv_jax.data.prepare import load_manifest
from lckv_jax.errors import UserError
from lckv_jax.evaluate.perplexity import evaluate, measure, score
from lckv_jax.evaluate.rows import Text, read_text, text_batches
from lckv_jax.model.transformer import forward, init_params

SIZES = dict(
    vocab_size=61, hidden_size=16, intermediate_size=20, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4,
    init_std=0.4, no_grad_passes=1, grad_passes=1, remat="none",
)  # fmt: skip
LISTS = [[3, 1, 4, 1, 5, 9, 2, 6], [], [7], list(range(1, 35)), [8, 60], [3, 1, 4, 1, 5, 9, 2, 6]]


def make(spec, **changes):
    config = ModelConfig(**SIZES | {"sharing": spec} | changes)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return config, jax.tree.map(lambda p: rng.normal(0.0, 0.4, p.shape).astype(np.float32), shapes)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def log_probabilities(logits, tokens):
    """Of each token after the first, from logits [T, V]."""
    return log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("spec", ["0_2_2_3", "standard"])
def test_scores_are_those_of_the_oracle(spec):
    config, params = make(spec)
    got = score(params, config, LISTS)
    assert [len(x) for x in got] == [7, 0, 0, 33, 1, 7]
    assert {x.dtype for x in got} == {np.dtype(np.float32)}
    for tokens, row in zip(LISTS, got):
        if len(tokens) > 1:
            right = log_probabilities(token_by_token(params, config, tokens), tokens)
            np.testing.assert_allclose(row, right, atol=2e-4)
    np.testing.assert_array_equal(got[0], got[5])  # in the order of the input, and alike


def test_trained_passes_are_those_of_forward():
    config, params = make("0_2_2_3")
    trained, exact = (score(params, config, [LISTS[3]], passes=passes)[0] for passes in ("trained", "exact"))
    logits = forward(params, config, jnp.asarray([LISTS[3]]))[0]
    np.testing.assert_allclose(trained, log_probabilities(logits, LISTS[3]), atol=2e-4)
    assert np.abs(trained - exact).max() > 1e-2


def test_scores_do_not_depend_on_the_other_lists():
    """Bit for bit, where the batch has the same shape; else but for rounding."""
    config, params = make("0_2_2_3")
    mine, others = LISTS[0], [[60] * 12, [1, 2, 3, 4]]
    first = score(params, config, [mine, others[0]])[0]
    np.testing.assert_array_equal(first, score(params, config, [mine, others[0][::-1]])[0])
    np.testing.assert_array_equal(first, score(params, config, [others[1], mine])[1])
    np.testing.assert_allclose(first, score(params, config, [mine])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("lists", "passes", "message"),
    [
        ([[1, 2], [3, 61]], "exact", "list 1 has token 61 at place 1"),
        ([[1, -1]], "exact", "token -1"),
        ([[1.0, 2.0]], "exact", "integers"),
        ([[1, 2]], "exakt", "did you mean 'exact'"),
        ([[1, 2]], -1.0, "no tolerance"),
        ([[1, 2]], math.nan, "no tolerance"),
    ],
)
def test_what_cannot_be_scored(lists, passes, message):
    config, params = make("0_2_2_3")
    with pytest.raises(UserError, match=message):
        score(params, config, lists, passes=passes)


# ---------------------------------------------------------------- rows


def test_each_token_is_predicted_once_as_in_training(trained):
    _, run, tokenizer = load(trained / "run")
    text = read_text(run, (), None, tokenizer)
    manifest = load_manifest(trained / "data")
    assert len(text.tokens) == manifest.valid.tokens
    mine = list(text_batches(text, 32, 4, "masked"))
    theirs = batches(trained / "data", manifest, "valid", seq_len=32, batch_size=4, seed=0)
    for number in range(len(theirs) - 1):  # the last one is filled up
        batch = theirs[number]
        np.testing.assert_array_equal(mine[number]["positions"][:, :-1], batch.pop("positions")[:, :-1])
        for name, array in batch.items():
            np.testing.assert_array_equal(mine[number][name], array, name)
    labels = np.concatenate([batch["labels"][:, 1:].ravel() for batch in mine])
    np.testing.assert_array_equal(labels[labels != -100], text.tokens[text.tokens != manifest.bos_id])


def test_joined_documents_are_one_text():
    text = Text("", np.array([1, 5, 6, 2, 1, 7, 2], np.int32), 3, bos_id=1, eos_id=2)
    (batch,) = text_batches(text, 4, 8, "joined")
    np.testing.assert_array_equal(batch["labels"][:, 1:], [[5, 6, 2, 1], [7, 2, -100, -100]])
    np.testing.assert_array_equal(batch["positions"][:, :-1], [[0, 1, 2, 3], [0, 1, -1, -1]])
    assert np.all(batch["segment_ids"] == 1)


# ---------------------------------------------------------------- evaluate


def by_hand(params, config, tokens, seq_len, bos_id):
    """Sum and number of -log p of all tokens but BOS: each row's documents alone, from the logits of `forward`."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, seq_len):
        row = tokens[start : start + seq_len + 1]
        padded = np.pad(row, (0, seq_len + 1 - len(row)), constant_values=bos_id)
        segments = np.cumsum(padded == bos_id)
        logits = forward_jit(params, config, jnp.asarray(padded[None]), segment_ids_BT=jnp.asarray(segments[None]))
        logp = log_softmax(logits[0])[: len(row) - 1]
        for t, label in enumerate(row[1:]):
            if label != bos_id:
                total, count = total - logp[t, label], count + 1
    return total, count


forward_jit = jax.jit(partial(forward, no_grad_passes=32), static_argnums=1)


def test_the_report_equals_a_computation_by_hand(trained, tmp_path, capsys):
    run_folder = trained / "run"
    evaluate(str(run_folder), ["max_tokens=150", f"out={tmp_path / 'new' / 'report.json'}", "batch_size=3"])
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    params, run, tokenizer = load(run_folder)
    text = read_text(run, (), None, tokenizer)
    total, count = by_hand(params, run.model, text.tokens[:151], 32, tokenizer.bos_id)
    by_passes = {report["passes"]: report for report in written["reports"]}
    assert list(by_passes) == ["trained", "exact"]
    exact = by_passes["exact"]
    assert exact["tokens"] == by_passes["trained"]["tokens"] == count
    np.testing.assert_allclose(exact["nats"], total / count, rtol=1e-5)
    np.testing.assert_allclose(exact["perplexity"], math.exp(total / count), rtol=1e-4)
    size = len(tokenizer.decode(text.tokens[:151].tolist()).encode())
    assert abs(written["bytes"] - size) <= 3  # a document loses the space before its first word
    np.testing.assert_allclose(exact["bits_per_byte"], total / math.log(2) / written["bytes"], rtol=1e-5)
    assert by_passes["trained"]["max_passes"] == by_passes["trained"]["mean_passes"] == 4
    assert exact["residual"] <= 2e-6
    out = capsys.readouterr().out
    assert "trained (2 + 2)" in out
    assert "trained - exact: perplexity" in out
    assert f"{count:,} tokens predicted" in out
    assert max(map(len, out.splitlines()[1:5])) <= 80


def test_the_whole_split_and_its_bytes(trained):
    _, run, tokenizer = load(trained / "run")
    text = read_text(run, (), None, tokenizer)
    manifest = load_manifest(trained / "data")
    assert text.bytes == manifest.valid.bytes
    windows = read_text(run, (), 100, tokenizer)
    np.testing.assert_array_equal(windows.tokens, text.tokens[:101])


def test_given_files(trained, tmp_path, capsys):
    """Each is a document with BOS and EOS; bits per byte are over the bytes of the files."""
    (tmp_path / "a.txt").write_text("def first(x):\n    return x\n")
    (tmp_path / "b.txt").write_text("# größer\nimport os\n")
    (tmp_path / "c.txt").write_text("  \n")
    out = tmp_path / "report.json"
    evaluate(str(trained / "run"), [f"files={tmp_path}/*.txt", "passes=0", f"out={out}"])
    written = json.loads(out.read_text())
    assert written["bytes"] == sum(len((tmp_path / name).read_bytes()) for name in ("a.txt", "b.txt"))
    params, run, tokenizer = load(trained / "run")
    lists = [[tokenizer.bos_id, *tokenizer.encode((tmp_path / name).read_text()), tokenizer.eos_id]
             for name in ("a.txt", "b.txt")]  # fmt: skip
    tokens = np.concatenate(lists)
    total, count = by_hand(params, run.model, tokens, 32, tokenizer.bos_id)
    (report,) = written["reports"]
    assert report["tokens"] == count == len(tokens) - 2
    np.testing.assert_allclose(report["nats"], total / count, rtol=1e-5)
    np.testing.assert_allclose(report["bits_per_byte"], total / math.log(2) / written["bytes"], rtol=1e-5)
    assert "2 documents of" in capsys.readouterr().out


def test_a_standard_map_needs_no_passes():
    config, params = make("standard")
    text = Text("", np.array([1, 5, 6, 2, 1, 7, 2], np.int32), 3, bos_id=1, eos_id=2)
    (report,) = measure(params, config, text, ["exact"], 4, 8)
    assert (report.tokens, report.max_passes, report.residual) == (5, 1, 0.0)
    lists = [[1, 5, 6, 2], [1, 7, 2]]
    right = [log_probabilities(token_by_token(params, config, tokens), tokens).sum() for tokens in lists]
    np.testing.assert_allclose(report.nats, -sum(right) / 5, rtol=1e-5)
    np.testing.assert_allclose(report.bits_per_byte, report.nats * 5 / math.log(2) / 3, rtol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["passes=exakt"], "did you mean 'exact'"),
        (["passes=-1"], "no tolerance"),
        (["passes=true"], "override 'passes=true': passes"),
        (["passes=[]"], r"override 'passes=\[\]': passes"),
        (["pases=exact"], "did you mean 'passes'"),
        (["batch_size=0"], "batch_size"),
        (["files=nowhere/*.txt"], "matches no file"),
        (["files=EMPTY"], "no text but white space"),
        (["out=EMPTY/report.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(trained, tmp_path, overrides, message):
    (tmp_path / "empty.txt").write_text(" \n")
    overrides = [override.replace("EMPTY", str(tmp_path / "empty.txt")) for override in overrides]
    with pytest.raises(UserError, match=message):
        evaluate(str(trained / "run"), overrides)


def test_missing_data_and_tokenizer(trained, tmp_path):
    _, run, tokenizer = load(trained / "run")
    moved = run.model_copy(update={"data": run.data.model_copy(update={"folder": str(tmp_path / "moved")})})
    with pytest.raises(UserError, match="which is not there now; run this where it is, or give text as files="):
        read_text(moved, (), None, tokenizer)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="no tokenizer"):
        read_text(run, (SourceConfig(path=f"{tmp_path}/a.txt"),), None, None)


def test_data_prepared_otherwise_are_refused(trained):
    _, run, tokenizer = load(trained / "run")
    other = run.model_copy(update={"data": run.data.model_copy(update={"validation_fraction": 0.3})})
    with pytest.raises(UserError, match="validation_fraction"):
        read_text(other, (), None, tokenizer)


def test_a_loss_that_is_not_finite_is_refused():
    config, params = make("0_2_2_3")
    params["final_norm"][0] = np.nan
    text = Text("", np.array([1, 5, 6, 2], np.int32), 3, bos_id=1, eos_id=2)
    with pytest.raises(UserError, match="passes=exact: the loss is not finite"):
        measure(params, config, text, ["exact"], 4, 8)
