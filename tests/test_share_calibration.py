"""Sentences to calibrate on, and what is left to measure on: no token serves both."""

import numpy as np
import pytest

from lckv_jax.errors import UserError
from lckv_jax.evaluate.rows import Text
from lckv_jax.share.calibration import cut_sentences, without

BOS, EOS = 0, 1


def text(*documents):
    """Documents of the given tokens, none of which is BOS or EOS."""
    parts = [np.array([BOS, *document, EOS], np.int32) for document in documents]
    return Text("three books", np.concatenate(parts), 99, BOS, EOS)


def numbered(*lengths):
    """Documents whose tokens are all different."""
    ends = np.cumsum(lengths)
    return text(*(range(2 + end - length, 2 + end) for length, end in zip(lengths, ends)))


def plain(tokens):
    return [token for token in tokens.tolist() if token not in (BOS, EOS)]


def test_sentences_are_the_beginnings_of_documents():
    rows, rest = cut_sentences(numbered(20, 20, 20, 20), 2, 9)
    assert [row.tolist() for row in rows] == [[BOS, *range(2, 10)], [BOS, *range(22, 30)]]
    assert plain(rest.tokens) == [*range(42, 82), *range(10, 22), *range(30, 42)]  # whole documents first
    assert (rest.tokens == BOS).sum() == 4 and rest.bytes is None and rest.what == "three books after the calibration"


def test_few_documents_give_more_than_their_beginnings():
    rows, rest = cut_sentences(numbered(40, 12), 4, 9)
    assert [plain(row) for row in rows] == [[*range(2, 10)], [*range(42, 50)], [*range(10, 18)], [*range(18, 26)]]
    assert plain(rest.tokens) == [*range(26, 42), *range(50, 54)]


def test_a_document_that_comes_twice_does_not_serve_twice():
    rows, rest = cut_sentences(text(range(2, 22), range(22, 42), range(2, 22), range(50, 70)), 2, 9)
    assert [row[1] for row in rows] == [2, 22]
    assert plain(rest.tokens) == [*range(50, 70), *range(10, 22), *range(30, 42)]


@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_lost_or_serves_twice(seed):
    rng = np.random.default_rng(seed)
    whole = numbered(*rng.integers(1, 60, 12))
    rows, rest = cut_sentences(whole, int(rng.integers(1, 8)), int(rng.integers(8, 24)))
    assert sorted(plain(rest.tokens) + [token for row in rows for token in plain(row)]) == sorted(plain(whole.tokens))
    assert all(row[0] == BOS and len(row) >= 8 and (row[1:] != BOS).all() for row in rows)


def test_too_little_text_is_counted():
    with pytest.raises(UserError) as caught:
        cut_sentences(numbered(20, 5, 3), 9, 16)
    assert str(caught.value) == (
        "share: the calibration text is too short: three books has 34 tokens in 3 documents, which make 1 "
        "sentences, but 9 of 16 tokens (135 in all) are needed; give more with --data, or take fewer: sentences=1"
    )


def test_other_text_gives_up_the_documents_of_the_calibration():
    calibration = numbered(20, 20, 20)
    rows, _ = cut_sentences(calibration, 2, 9)
    other = text(range(100, 130), range(22, 60), range(23, 60), range(2, 9))
    kept = without(other, rows)
    assert plain(kept.tokens) == [*range(100, 130), *range(23, 60), *range(2, 9)]
    assert without(text(range(100, 130)), rows).bytes == 99  # nothing to leave out
