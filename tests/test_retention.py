"""Which checkpoints stay."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv_jax.retention import Retention, steps_kept

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "keep", "keep_best", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}, 1, 1, {4, 2}),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}, 2, 2, {4, 3, 2}),  # a step may be both
        ({1: 3.0, 2: NAN, 3: 0.5, 4: -INF, 5: INF}, 1, 2, {5, 3, 1}),  # what is not finite is never best
        ({1: NAN, 2: None, 3: None}, 1, 1, {3}),
        ({1: 2.0, 2: 2.0, 3: 2.0, 4: 9.0}, 1, 1, {4, 3}),  # of equals the newer
        ({1: 2.0, 2: 3.0}, 1, 0, {2}),
        ({}, 2, 1, set()),
    ],
)
def test_the_newest_and_the_best(losses, keep, keep_best, kept):
    assert steps_kept(losses, keep, keep_best) == kept


@given(
    st.lists(st.none() | st.floats(), max_size=12),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_deleting_step_by_step_keeps_what_one_look_at_all_would_keep(losses, keep, keep_best):
    """So what stays does not depend on how often, or by how many processes in turn, the run was saved."""
    held = {}
    for step, loss in enumerate(losses):
        held[step] = loss
        held = {kept: held[kept] for kept in steps_kept(held, keep, keep_best)}
    assert set(held) == steps_kept(dict(enumerate(losses)), keep, keep_best)


def test_the_policy_knows_losses_from_disk_and_from_saves():
    steps = [SimpleNamespace(step=1, metrics=None), SimpleNamespace(step=2, metrics=None)]
    steps += [SimpleNamespace(step=step, metrics={"valid_loss": loss}) for step, loss in ((3, 0.5), (4, None))]
    assert Retention(1, 1, {1: 0.1, 2: 0.2}).should_preserve(steps, context=None) == [True, False, False, True]
    assert Retention(1, 1, {2: 0.9}).should_preserve(steps, context=None) == [False, False, True, True]
