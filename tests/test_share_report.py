"""What `share` tells: the record, its tables and pictures, and the rows of a sweep."""

import json

import numpy as np
import pytest

from lckv_jax.errors import UserError
from lckv_jax.share import report
from lckv_jax.share.kvsharer import Result, Trial
from lckv_jax.share.plots import draw_distances, draw_sweep
from lckv_jax.share.sweep import curves, table
from lckv_jax.sharing import KVSharing

TRIALS = (Trial(2, 1, 1, 3.0, 0.4, False), Trial(2, 0, 0, 2.0, 0.9, True), Trial(1, 0, 0, 1.0, 0.8, True))
DISTANCES = np.array([[np.nan] * 3, [1.0, np.nan, np.nan], [2.0, 3.0, np.nan]])
RESULT = Result(KVSharing.parse("0_0_0", 3), TRIALS[1:], TRIALS, DISTANCES, 3)


def row(order, seed, shared, perplexity):
    return {"order": order, "seed": seed, "shared": shared, "perplexity": perplexity}


ROWS = [
    row("dissimilar", None, 0, 4.0), row("dissimilar", None, 1, 5.0),
    row("random", 0, 0, 4.0), row("random", 0, 1, 6.0), row("random", 1, 0, 4.0), row("random", 1, 1, 8.0),
]  # fmt: skip


def test_the_record_of_a_search_is_json(tmp_path):
    class Config:
        sharing = KVSharing.parse("standard", 3)

    record = report.search_record(RESULT, Config)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["asked"], record["found"], record["rejected"]) == (3, 2, 1)
    assert record["map_before"] == "0_1_2" and record["map"] == "0_0_0"
    assert record["distances"] == [[None] * 3, [1.0, None, None], [2.0, 3.0, None]]
    assert record["trials"][1] == {
        "hi": 2, "lo": 0, "source": 0, "distance": 2.0, "cosine": 0.9, "accepted": True,
    }  # fmt: skip


def test_fewer_than_asked_are_told():
    line = report.found_line(RESULT, 0.5)
    assert line == (
        "2 of 3 layers gave up their K,V; 1 of 3 candidates were rejected (cosine at most 0.5); no candidate is left, "
        "what passed is kept"
    )
    assert "no candidate is left" not in report.found_line(RESULT._replace(asked=2), 0.5)


def test_a_trial_tells_what_is_read_instead_of_what_was_ranked():
    assert "layer 4 reads 1 (for 3)" in report.trial_line(Trial(4, 3, 1, 0.5, 0.9, True))
    assert report.trial_line(TRIALS[0]).endswith("cosine 0.4000: rejected")


@pytest.mark.parametrize(
    ("recovered", "of_control", "told"),
    [
        (0.5, "none", "100 steps bring back 50% of what sharing lost."),
        (
            -0.04,
            "none",
            "100 steps bring nothing back: the loss rises by another 4% of what sharing lost; try more steps, "
            "or a lower heal_learning_rate.",
        ),
        (None, "none", "Sharing lost nothing on this text."),
        (2.97, 0.91, "They close 91% of the distance to the unshared model after as many steps of its own."),
        (
            0.5,
            None,
            "The unshared model ends no better than the shared one began, after as many steps of its own.",
        ),
    ],
)
def test_healing_is_told(recovered, of_control, told):
    heal = {"steps": 100, "recovered": recovered, "nats": {"before sharing": 1.0, "healed": 1.1}}
    control = {} if of_control == "none" else {"recovered_of_control": of_control}
    lines = list(report.heal_table({"heal": heal | control}))
    assert "| healed | 1.1000 | 3.004 |" in lines and lines[-1] == told


def test_a_sweep_as_table_and_curves():
    assert curves(ROWS) == {
        "dissimilar": [[(0, 4.0), (1, 5.0)]],
        "random": [[(0, 4.0), (1, 6.0)], [(0, 4.0), (1, 8.0)]],
    }
    assert list(table(ROWS)) == [
        "| shared layers | dissimilar | random |",
        "| --- | --- | --- |",
        "| 0 | 4.000 | 4.000 |",
        "| 1 | 5.000 | 7.000 (6.000 to 8.000) |",
    ]
    assert list(table(ROWS[:3]))[-1] == "| 1 | 5.000 | none left |"  # a search may keep fewer pairs than another


def test_pictures(tmp_path):
    draw_distances(RESULT, "token_l2", tmp_path / "distances.png")
    draw_sweep(curves(ROWS), "model: 3 layers", tmp_path / "sweep.png")
    for name in ("distances.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        draw_sweep(curves(ROWS), "model", tmp_path / "nowhere" / "sweep.png")


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "nowhere", "report", {}, "")
