"""Rows of weighted sources come in their shares, and all hosts together see the batch that one host would see."""

import contextlib
import random
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data import shards
from lckv_jax.data.batches import IGNORE, Windows, batches, iterate, label_rows
from lckv_jax.data.manifest import Manifest
from lckv_jax.data.prepare import prepare
from lckv_jax.errors import UserError

T, B, VOCAB = 12, 4, 300
LETTERS = "abcd"
WEIGHTS = (0.1, 0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Four components; each is written in a letter of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    for letter in LETTERS:
        (folder / letter).mkdir()
        for number in range(12):
            rng = random.Random(f"{letter}{number}")
            text = "".join(rng.choices(f"{letter} ", k=rng.randint(5, 120)))
            (folder / letter / f"{letter}{number}.txt").write_text(f"{letter}{text}")
    sources = tuple(
        SourceConfig(path=f"{folder}/{letter}/*.txt", weight=weight) for letter, weight in zip(LETTERS, WEIGHTS)
    )
    data = DataConfig(sources=sources, folder=str(folder / "ready"), tokenizer="bytes", validation_fraction=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_BYTES", 130)
        patch.setattr(shards, "SHARD_BLOCKS", 4)
        manifest = prepare(data, VOCAB, lambda line: None)
    assert [component.tokens for component in manifest.components] != [manifest.components[0].tokens] * 4
    return folder / "ready", manifest


def rows_of(prepared: tuple[Path, Manifest], component: int) -> list[tuple[int, ...]]:
    windows = Windows(*prepared, "train", T, component)
    return [tuple(windows[index].tolist()) for index in range(len(windows))]


def drawn(prepared: tuple[Path, Manifest], weights, steps, seed: int = 0) -> list[tuple[int, ...]]:
    dataset = batches(*prepared, "train", seq_len=T, batch_size=B, seed=seed, weights=weights)
    return [tuple(row) for step in steps for row in dataset[step]["tokens"].tolist()]


def components_of(prepared: tuple[Path, Manifest], rows: list[tuple[int, ...]]) -> np.ndarray:
    """The component of each row, by its letter."""
    known = {row: number for number in range(4) for row in rows_of(prepared, number)}
    return np.array([known[row] for row in rows])


weights_of_four = st.lists(st.integers(1, 97), min_size=4, max_size=4).map(
    lambda parts: [p / sum(parts) for p in parts]
)


@settings(max_examples=6, deadline=None)
@given(weights=weights_of_four, start=st.integers(0, 10**12))
def test_shares_are_met_within_a_hundredth_anywhere(prepared, weights, start) -> None:
    sources = components_of(prepared, drawn(prepared, weights, range(start, start + 250)))
    shares = np.bincount(sources, minlength=4) / 1000
    assert np.abs(shares - weights).max() < 0.01


def test_each_component_has_its_own_epochs(prepared) -> None:
    rows = drawn(prepared, WEIGHTS, range(400))
    sources = components_of(prepared, rows)
    orders = []
    for number in range(4):
        own = rows_of(prepared, number)
        seen = [row for row, source in zip(rows, sources) if source == number]
        epochs = [seen[start : start + len(own)] for start in range(0, len(seen) - len(own) + 1, len(own))]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == sorted(own) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        orders.append([own.index(row) for row in epochs[0]])
    assert all(orders[0][:8] != order[:8] for order in orders[1:])
    assert drawn(prepared, WEIGHTS, range(20), seed=1) != rows[: 20 * B]


def test_other_weights_need_no_other_folder_but_components_do(prepared) -> None:
    folder, manifest = prepared
    alone = drawn(prepared, (None,) * 4, range(100))
    everything = Windows(folder, manifest, "train", T)
    assert sorted(alone[: len(everything)]) == sorted(tuple(everything[n].tolist()) for n in range(len(everything)))
    with pytest.raises(UserError, match="holds 4 components for 3 weights; prepare"):
        drawn(prepared, (0.2, 0.3, 0.5), range(1))


def test_a_component_shorter_than_a_row_is_named(prepared) -> None:
    folder, manifest = prepared
    smallest = min(range(4), key=lambda number: manifest.components[number].tokens)
    tokens = manifest.components[smallest].tokens
    with pytest.raises(UserError, match=rf"text of .*/{LETTERS[smallest]}/\*\.txt has {tokens} tokens.*; lower"):
        batches(folder, manifest, "train", seq_len=tokens, batch_size=B, seed=0, weights=WEIGHTS)


def test_one_component_keeps_its_order(prepared) -> None:
    """What checkpoints of earlier versions trained on next: grain's shuffle with this seed for seed 0."""
    windows = Windows(*prepared, "train", T)
    order = grain.MapDataset.range(len(windows)).shuffle(0x34069224)
    expected = [tuple(windows[order[n]].tolist()) for n in range(3 * B)]
    assert drawn(prepared, (), range(3)) == expected
    assert drawn(prepared, (None,) * 4, range(3)) == expected


@pytest.mark.parametrize("packing", ["masked", "joined"])
@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_processes_together_hold_the_batch(prepared, split, weights, packing) -> None:
    arguments = {"seq_len": T, "batch_size": B, "seed": 3, "packing": packing, "weights": weights}
    whole = batches(*prepared, split, **arguments)
    steps = range(len(whole)) if split == "valid" else [*range(0, 160, 5), 10**9]  # several epochs
    for rows in ([0, 1, 2, 3], [0, 1], [2], [1, 3], [3, 0]):
        part = batches(*prepared, split, **arguments, rows=rows)
        assert split == "train" or len(part) == len(whole)
        for step in steps:
            for name, array in whole[step].items():
                assert np.array_equal(part[step][name], array[rows])
    assert split == "train" or (whole[len(whole) - 1]["labels"][-1] == IGNORE).all()  # filled up


def test_processes_resume_at_a_step(prepared) -> None:
    arguments = {"seq_len": T, "batch_size": B, "seed": 3, "weights": WEIGHTS}
    whole = batches(*prepared, "train", **arguments)
    for rows in ([0, 1], [2, 3]):
        part = batches(*prepared, "train", **arguments, rows=rows)
        with contextlib.closing(iterate(part, start_step=77)) as iterator:
            for step in range(77, 97):
                assert np.array_equal(next(iterator)["tokens"], whole[step]["tokens"][rows])


def test_a_process_reads_no_rows_but_its_own(prepared) -> None:
    """Damage in a shard stops only the processes that need it."""
    folder, manifest = prepared
    read = []
    original = Windows.__getitem__
    whole = batches(folder, manifest, "train", seq_len=T, batch_size=B, seed=0)
    part = batches(folder, manifest, "train", seq_len=T, batch_size=B, seed=0, rows=[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "__getitem__", lambda self, index: read.append(index) or original(self, index))
        for step in range(20):
            part[step]
        mine = list(read)
        for step in range(20):
            whole[step]
    assert len(mine) == 20
    assert mine == read[20:][1::B]


def test_joined_rows_are_one_text() -> None:
    rows = np.array([[1, 7, 8, 2, 1, 9], [7, 2, 1, 2, 1, 5], [IGNORE] * 6], np.int32)
    batch = label_rows(rows, bos_id=1, eos_id=2, packing="joined")
    assert {(array.shape, array.dtype.name) for array in batch.values()} == {((3, 6), "int32")}
    assert batch["labels"].tolist() == rows.tolist()
    assert batch["tokens"].tolist() == [*rows[:2].tolist(), [0] * 6]
    assert batch["segment_ids"].tolist() == [[1] * 6] * 3
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
