"""A batch is a function of (seed, step); every token is predicted once an epoch; damaged bytes are found."""

import contextlib
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lckv_jax.config import DataConfig
from lckv_jax.data import shards
from lckv_jax.data.batches import IGNORE, Windows, batches, iterate, label_rows
from lckv_jax.data.prepare import Manifest, prepare
from lckv_jax.data.tokenizer import load_tokenizer
from lckv_jax.errors import UserError

T, B = 12, 4
BOS = 1


class Prepared(NamedTuple):
    folder: Path
    manifest: Manifest

    def tokens(self, split: str) -> list[int]:
        """All tokens of a split, from the files."""
        info = self.manifest.train if split == "train" else self.manifest.valid
        return [int(id) for shard in info.shards for id in np.fromfile(self.folder / shard.file, "<u2")]

    def rows(self, split: str) -> list[list[int]]:
        tokens = self.tokens(split)
        return [tokens[start : start + T + 1] for start in range(0, len(tokens) - T, T)]

    def batches(self, split="train", seed=0):
        return batches(self.folder, self.manifest, split, seq_len=T, batch_size=B, seed=seed)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Short documents over several shards whose ends cut rows."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 130)
    monkeypatch.setattr(shards, "SHARD_BLOCKS", 4)
    (tmp_path / "texts").mkdir()
    for number in range(60):
        rng = random.Random(number)
        words = rng.choices(["tora", "malim", "sengus", "krine", "vora"], k=rng.randint(1, 40))
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(words))
    data = DataConfig(sources=(f"{tmp_path}/texts/*.txt",), folder=str(tmp_path / "ready"), validation_fraction=0.1)
    manifest = prepare(data, 280, lambda line: None)
    assert len(manifest.train.shards) > 2
    return Prepared(Path(data.folder), manifest)


def oracle(row: list[int]) -> dict[str, list[int]]:
    """The fields of one row, token by token."""
    labels, segments, positions = [], [], []
    segment, position = 1, 0
    for column, token in enumerate(row):
        if token == BOS and column > 0:
            segment, position = segment + 1, 0
        labels.append(IGNORE if token == BOS else token)
        segments.append(segment)
        positions.append(position)
        position += 1
    return {"tokens": row, "labels": labels, "segment_ids": segments, "positions": positions}


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_windows_cut_the_joined_shards(prepared: Prepared) -> None:
    for split in ("train", "valid"):
        windows = Windows(prepared.folder, prepared.manifest, split, T)
        assert [windows[index].tolist() for index in range(len(windows))] == prepared.rows(split)
        with pytest.raises(IndexError):
            windows[len(windows)]


def test_fields_equal_a_token_by_token_oracle(prepared: Prepared) -> None:
    seen = 0
    for step in range(30):
        batch = prepared.batches()[step]
        assert set(batch) == {"tokens", "labels", "segment_ids", "positions"}
        assert {(array.shape, array.dtype.name) for array in batch.values()} == {((B, T + 1), "int32")}
        for number in range(B):
            row = {name: array[number].tolist() for name, array in batch.items()}
            assert row == oracle(row["tokens"])
            seen += max(row["segment_ids"]) > 1
    assert seen > 10


def test_labels_of_chosen_rows() -> None:
    rows = np.array([[1, 7, 8, 2, 1, 9], [7, 2, 1, 2, 1, 5]], np.int32)
    batch = label_rows(rows, bos_id=1, eos_id=2)
    assert batch["labels"].tolist() == [[-100, 7, 8, 2, -100, 9], [7, 2, -100, 2, -100, 5]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 3, 3]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 0, 1]]


def test_a_start_that_is_also_an_end_is_predicted() -> None:
    """With one token for both, nothing else would teach the model to end a text."""
    batch = label_rows(np.array([[1, 7, 8, 1, 9, 1]], np.int32), bos_id=1, eos_id=1)
    assert batch["labels"].tolist() == [[1, 7, 8, 1, 9, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3]]


def test_batch_depends_on_seed_and_step_alone(prepared: Prepared) -> None:
    steps = [0, 7, 500, 3, 123_456]
    first = [prepared.batches()[step] for step in steps]
    one = prepared.batches()
    assert all(equal(one[step], batch) for step, batch in reversed(list(zip(steps, first))))
    assert not any(equal(prepared.batches(seed=1)[step], batch) for step, batch in zip(steps, first))


@pytest.mark.parametrize("prefetch", [0, 5])
def test_iterating_from_a_step_gives_the_tail(prefetch: int, prepared: Prepared) -> None:
    dataset = prepared.batches()
    iterator = iterate(prepared.batches(), start_step=9, prefetch=prefetch)
    assert all(equal(next(iterator), dataset[step]) for step in range(9, 29))
    iterator.close()


def test_epochs_hold_every_row_once_in_orders_of_their_own(prepared: Prepared) -> None:
    rows = prepared.rows("train")
    steps = -(-5 * len(rows) // B)
    dataset = prepared.batches()
    assert len(dataset) > 1e12
    drawn = [tuple(row) for step in range(steps) for row in dataset[step]["tokens"].tolist()]
    epochs = [drawn[epoch * len(rows) : (epoch + 1) * len(rows)] for epoch in range(5)]
    other = prepared.batches(seed=1)
    epochs.append([tuple(row) for step in range(steps) for row in other[step]["tokens"].tolist()][: len(rows)])
    assert all(sorted(epoch) == sorted(map(tuple, rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # seed 1 does not begin with seed 0's second epoch either


def test_validation_scores_each_token_once_in_a_fixed_order(prepared: Prepared) -> None:
    rows = prepared.rows("valid")
    assert len(rows) % B, "choose texts that leave a part of a batch"
    dataset = prepared.batches("valid")
    assert len(dataset) == -(-len(rows) // B)
    got = [dataset[step] for step in range(len(dataset))]
    assert all(equal(*pair) for pair in zip(got, iterate(prepared.batches("valid", seed=5)), strict=True))
    labels = np.concatenate([batch["labels"] for batch in got])[:, 1:].flatten()
    expected = prepared.tokens("valid")[1 : len(rows) * T + 1]
    assert labels[labels != IGNORE].tolist() == [token for token in expected if token != BOS]
    assert np.concatenate([batch["tokens"] for batch in got])[: len(rows)].tolist() == rows
    assert {batch["tokens"].shape for batch in got} == {(B, T + 1)}


def test_rows_decode_to_the_text(prepared: Prepared) -> None:
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.model")
    tokens = prepared.tokens("train")
    first = tokens[1 : tokens.index(2)]
    assert tokenizer.decode(first) == (prepared.folder.parent / "texts" / "0.txt").read_text()


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("byte", "block"), [(0, 0), (129, 0), (130, 1), (519, 3)])
def test_flipped_bit_names_shard_and_block(byte: int, block: int, prepared: Prepared) -> None:
    flip(prepared.folder / "train-0-00001.bin", byte)
    windows = Windows(prepared.folder, prepared.manifest, "train", T)
    message = rf"train-0-00001\.bin: block {block} .*delete .*ready and prepare it again"
    touched = 0
    for index in range(len(windows)):
        first, last = (2 * bound - 520 for bound in (index * T, index * T + T + 1))  # bytes within the second shard
        if first < block * 130 + 130 and last > block * 130:
            touched += 1
            with pytest.raises(UserError, match=message):
                windows[index]
        else:
            windows[index]
    assert touched


@pytest.mark.parametrize("prefetch", [0, 3])
def test_damage_reaches_the_reader_of_batches(prefetch: int, prepared: Prepared) -> None:
    for shard in prepared.manifest.train.shards:
        flip(prepared.folder / shard.file, 3)
    with (
        contextlib.closing(iterate(prepared.batches(), 0, prefetch)) as iterator,
        pytest.raises(UserError, match=r"train-0-0000\d\.bin: block 0 "),
    ):
        for _ in range(40):
            next(iterator)


def test_each_process_checks_for_itself(prepared: Prepared) -> None:
    windows = Windows(prepared.folder, prepared.manifest, "train", T)
    row = windows[0]
    assert np.array_equal(pickle.loads(pickle.dumps(windows))[0], row)
    assert len(pickle.dumps(windows)) < 10_000
    flip(prepared.folder / "train-0-00000.bin", 0)
    with pytest.raises(UserError, match="block 0 "):
        pickle.loads(pickle.dumps(windows))[0]


def test_shard_of_another_size_is_named(prepared: Prepared) -> None:
    path = prepared.folder / "train-0-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-0-00000\.bin has 518 bytes, but its manifest says 520; delete"):
        Windows(prepared.folder, prepared.manifest, "train", T)
    path.unlink()
    with pytest.raises(UserError, match=r"train-0-00000\.bin cannot be read: No such file"):
        Windows(prepared.folder, prepared.manifest, "train", T)


def test_too_short_split_gives_the_numbers(prepared: Prepared) -> None:
    tokens = prepared.manifest.valid.tokens
    message = rf"valid split has {tokens} tokens, but one row of data\.seq_len={tokens} needs {tokens + 1}; .*fraction"
    with pytest.raises(UserError, match=message):
        batches(prepared.folder, prepared.manifest, "valid", seq_len=tokens, batch_size=1, seed=0)
    assert len(batches(prepared.folder, prepared.manifest, "valid", seq_len=tokens - 1, batch_size=1, seed=0)) == 1


def test_importing_the_data_room_needs_no_data_library() -> None:
    code = (
        "import sys, lckv_jax.data.batches, lckv_jax.data.prepare, lckv_jax.data.tokenizer\n"
        "assert not {'grain', 'sentencepiece', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)
