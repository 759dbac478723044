"""Prepared shards -> batches: a batch is a function of (seed, step), so resuming needs nothing but the step."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lckv_jax.data.corpora import Split
from lckv_jax.data.manifest import Manifest
from lckv_jax.data.shards import block_hash
from lckv_jax.errors import UserError

if TYPE_CHECKING:
    import grain

IGNORE = -100  # a label that counts for nothing

Batch = dict[str, np.ndarray]
Packing = Literal["masked", "joined"]


class Windows:
    """The rows of one split, by index: row i is tokens i*T .. i*T+T of its shards laid end to end, int32 [T+1].

    component: its number, for the rows of that part of the training split alone.

    Neighbouring rows share one token, so that each token is predicted once. Files are mapped when first touched, in
    each process, and so is the hash of each block checked: UserError names the shard and the block.
    """

    def __init__(
        self, folder: str | Path, manifest: Manifest, split: Split, seq_len: int, component: int | None = None
    ) -> None:
        info = manifest.train if split == "train" else manifest.valid
        what = f"the {split} split"
        if component is not None:
            info = manifest.components[component]
            what = f"the training text of {manifest.sources[component].path}"
        self._folder, self._seq_len = Path(folder).expanduser(), seq_len
        self._dtype, self._block_bytes = np.dtype(manifest.dtype), manifest.block_bytes
        self._shards = info.shards
        self._ends = list(accumulate(shard.tokens for shard in info.shards))
        self._rows = max(0, (info.tokens - 1) // seq_len)
        self._maps: dict[int, np.ndarray] = {}
        self._checked: set[tuple[int, int]] = set()
        if not self._rows:
            mend = "lower data.seq_len or give more text" + ", or raise data.validation_fraction" * (split == "valid")
            raise UserError(
                f"{folder}: {what} has {info.tokens} tokens, but one row of data.seq_len={seq_len} "
                f"needs {seq_len + 1}; {mend}"
            )
        for number in range(len(self._shards)):
            self._open(number)  # a missing file is told now, not hours later

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        start, stop = index * self._seq_len, (index + 1) * self._seq_len + 1
        parts = []
        number = bisect_right(self._ends, start)
        while start < stop:
            offset = self._ends[number] - self._shards[number].tokens
            end = min(stop, self._ends[number])
            parts.append(self._read(number, start - offset, end - offset))
            start, number = end, number + 1
        return np.concatenate(parts).astype(np.int32)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}, "_checked": set()}

    def _read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of a shard, from checked blocks."""
        if number not in self._maps:
            self._maps[number] = self._open(number)
        size = self._dtype.itemsize
        for block in range(start * size // self._block_bytes, (stop * size - 1) // self._block_bytes + 1):
            if (number, block) not in self._checked:
                self._check(number, block)
                self._checked.add((number, block))
        return self._maps[number][start:stop]

    def _open(self, number: int) -> np.ndarray:
        shard = self._shards[number]
        path = self._folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; {self._mend}") from error
        expected = shard.tokens * self._dtype.itemsize
        if size != expected:
            raise UserError(f"{path} has {size} bytes, but its manifest says {expected}; {self._mend}")
        return np.memmap(path, self._dtype, "r")

    def _check(self, number: int, block: int) -> None:
        shard = self._shards[number]
        content = self._maps[number].view(np.uint8)[block * self._block_bytes :][: self._block_bytes]
        if block_hash(content.data) != shard.blocks[block]:
            raise UserError(
                f"{self._folder / shard.file}: block {block} (bytes from {block * self._block_bytes}) is not what was "
                f"prepared, its hash differs; {self._mend}"
            )

    @property
    def _mend(self) -> str:
        return f"delete {self._folder} and prepare it again"


def batches(
    folder: str | Path,
    manifest: Manifest,
    split: Split,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    packing: Packing = "masked",
    weights: Sequence[float | None] = (),
    rows: Sequence[int] | None = None,
) -> grain.MapDataset[Batch]:
    """The batches of one split; `[step]` is the batch of that step, from nothing but the arguments.

    A batch is {tokens, labels, segment_ids, positions}, int32 [B, T+1] each (see `label_rows`).
    train: endless; every epoch shows each row once, in an order of its own, and epochs follow without a gap, so that
    a batch may hold the end of one and the start of the next.
    weights: of `data.sources`; where there are several, rows are drawn in these shares from the components, evenly
    spread and each with its own epochs. Without weights the components are one text.
    valid: each row once, in a fixed order that ignores `seed` and `weights`; `len()` batches, the last one filled up
    with rows without labels, so that every batch has one shape.
    rows: only these of the B rows of each batch, in this order, are read and given; None = all.
    Raises UserError if a split or component is shorter than one row, the folder has no component for each weight, and
    on the first touch of damaged bytes.
    """
    import grain

    if split == "train":
        every = _endless_rows(folder, manifest, seq_len, seed, weights)
    else:
        windows = Windows(folder, manifest, split, seq_len)
        every = grain.MapDataset.source(windows)
        if missing := -len(windows) % batch_size:
            filler = [np.full(seq_len + 1, IGNORE, np.int32)] * missing
            every = grain.MapDataset.concatenate([every, grain.MapDataset.source(filler)])
    if rows is not None and len(rows) < batch_size:
        every = grain.MapDataset.source(_Picked(every, batch_size, rows))
        batch_size = len(rows)
    parts = every.batch(batch_size, drop_remainder=True)
    return parts.map(partial(label_rows, bos_id=manifest.bos_id, eos_id=manifest.eos_id, packing=packing))


class _Picked:
    """Of every `batch_size` elements of a data set those numbered `rows`, by index."""

    def __init__(self, dataset: Any, batch_size: int, rows: Sequence[int]) -> None:
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        batch, place = divmod(index, len(self._rows))
        return self._dataset[batch * self._batch_size + self._rows[place]]


def _endless_rows(
    folder: str | Path, manifest: Manifest, seq_len: int, seed: int, weights: Sequence[float | None]
) -> grain.MapDataset[np.ndarray]:
    import grain

    shares = [weight for weight in weights if weight is not None]
    if len(shares) <= 1:
        return (
            grain.MapDataset.source(Windows(folder, manifest, "train", seq_len)).shuffle(_shuffle_seed(seed)).repeat()
        )
    if len(shares) != len(manifest.components):
        raise UserError(
            f"{folder} holds {len(manifest.components)} components for {len(shares)} weights; "
            "prepare data.sources with their weights in another data.folder"
        )
    components = [
        grain.MapDataset.source(Windows(folder, manifest, "train", seq_len, number))
        .shuffle(_shuffle_seed(seed, number))
        .repeat()
        for number in range(len(shares))
    ]
    return grain.MapDataset.mix(components, shares)


def iterate(dataset: grain.MapDataset[Batch], start_step: int = 0, prefetch: int = 8) -> grain.DatasetIterator[Batch]:
    """The batches from `start_step` on, `prefetch` of them read ahead by a thread (0: none); `close()` ends it."""
    import grain

    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    iterator = iter(dataset.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def label_rows(tokens_BT: np.ndarray, bos_id: int, eos_id: int, packing: Packing = "masked") -> Batch:
    """A batch from int32 rows of packed documents, each of which begins with BOS.

    masked: labels are the tokens (the loss shifts them), -100 for the first token of a document, unless BOS is also
    EOS: then it is the end of the document before, which predicts it; segment_ids 1, 2, ... in each row; positions from
    0 in each document, and in the rest of one that the row's start cuts.
    joined: a row is one text, with a label for each token, segment 1, and positions from 0.
    A row of -100 becomes tokens 0 without labels.
    """
    filler_B1 = tokens_BT[:, :1] == IGNORE
    columns_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    if packing == "joined":
        labels_BT, segments_BT, positions_BT = tokens_BT, np.ones_like(tokens_BT), columns_BT.copy()
    else:
        first_BT = tokens_BT == bos_id
        labels_BT = tokens_BT if bos_id == eos_id else np.where(first_BT, np.int32(IGNORE), tokens_BT)
        segments_BT = np.cumsum(first_BT, axis=1, dtype=np.int32) + ~first_BT[:, :1]
        positions_BT = columns_BT - np.maximum.accumulate(columns_BT * first_BT, axis=1)
    return {
        "tokens": np.where(filler_B1, np.int32(0), tokens_BT),
        "labels": labels_BT,
        "segment_ids": segments_BT,
        "positions": positions_BT,
    }


def _shuffle_seed(seed: int, component: int = 0) -> int:
    """32 bits for grain, which shuffles epoch e with seed + e: seeds 0 and 1 as they are would share their orders."""
    text = f"{seed}/{component}" if component else str(seed)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
