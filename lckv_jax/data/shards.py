"""Token shards: written so that a kill costs little and changes nothing, and checked against their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from lckv_jax.data.manifest import Shard, SplitInfo, WriterState

BLOCK_BYTES = 1 << 18  # what one hash covers, and the first reading of any row in it therefore reads
SHARD_BLOCKS = 1024  # blocks of a shard


def block_hash(content: bytes | bytearray | memoryview) -> str:
    """Hex blake2b-128."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ShardWriter:
    """Appends tokens to NAME-00000.bin, NAME-00001.bin, ..., and hashes each block that is full.

    Goes on from `state`, a `save` of the same name and folder, once `is_on_disk` has said yes: what the file holds
    beyond it is cut off. Bytes on disk depend on the tokens alone, not on where they were saved. Raises OSError.
    """

    def __init__(self, folder: Path, name: str, dtype: str, state: WriterState) -> None:
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._documents, self._text_bytes = state.documents, state.bytes
        self._shards, self._blocks = list(state.shards), list(state.blocks)  # the blocks of the shard being written
        self._rest = bytearray()  # of the block being filled
        if state.blocks or state.rest[0]:
            path = _path(folder, name, state)
            os.truncate(path, _length(state))
            self._rest += _read_rest(path, state)

    @property
    def documents(self) -> int:
        return self._documents

    @property
    def tokens(self) -> int:
        blocks = len(self._blocks) * BLOCK_BYTES + len(self._rest)
        return sum(shard.tokens for shard in self._shards) + blocks // self._dtype.itemsize

    @property
    def text_bytes(self) -> int:
        return self._text_bytes

    def add(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        """Appends the tokens of some documents."""
        self._documents += documents
        self._text_bytes += text_bytes
        self._rest += tokens.astype(self._dtype).tobytes()
        while len(self._rest) >= BLOCK_BYTES:
            self._write(self._rest[:BLOCK_BYTES])
            self._blocks.append(block_hash(self._rest[:BLOCK_BYTES]))
            del self._rest[:BLOCK_BYTES]
            if len(self._blocks) == SHARD_BLOCKS:
                self._finish_shard()

    def save(self) -> WriterState:
        """Everything is on disk, also after a power cut."""
        if self._blocks or self._rest:
            self._write(self._rest, durably=True)
        return WriterState(
            documents=self._documents,
            bytes=self._text_bytes,
            shards=tuple(self._shards),
            blocks=tuple(self._blocks),
            rest=(len(self._rest), block_hash(self._rest)),
        )

    def close(self) -> SplitInfo:
        """Finishes the last shard."""
        if self._rest:
            self._write(self._rest)
            self._blocks.append(block_hash(self._rest))
            self._rest = bytearray()
        if self._blocks:
            self._finish_shard()
        return SplitInfo(documents=self._documents, tokens=self.tokens, bytes=self._text_bytes, shards=(*self._shards,))

    def _finish_shard(self) -> None:
        self._write(b"", durably=True)
        length = self._path.stat().st_size
        shard = Shard(file=self._path.name, tokens=length // self._dtype.itemsize, blocks=tuple(self._blocks))
        self._shards.append(shard)
        self._blocks = []

    def _write(self, content: bytes | bytearray, durably: bool = False) -> None:
        """Behind the full blocks; over what `save` put there, the beginning of the same bytes."""
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.seek(len(self._blocks) * BLOCK_BYTES)
            file.write(content)
            file.flush()
            if durably:
                os.fsync(file.fileno())

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._name}-{len(self._shards):05d}.bin"


def is_on_disk(folder: Path, name: str, dtype: str, state: WriterState) -> bool:
    """Whether the files still hold what `save` said: sizes and the block being filled; full blocks have their hash."""
    try:
        for shard in state.shards:
            if (folder / shard.file).stat().st_size != shard.tokens * np.dtype(dtype).itemsize:
                return False
        if not state.blocks and not state.rest[0]:
            return True
        path = _path(folder, name, state)
        return path.stat().st_size >= _length(state) and block_hash(_read_rest(path, state)) == state.rest[1]
    except FileNotFoundError:
        return False


def files_of(folder: Path, name: str, state: WriterState) -> set[str]:
    """The names of the files that hold `state`."""
    last = {_path(folder, name, state).name} if state.blocks or state.rest[0] else set()
    return {shard.file for shard in state.shards} | last


def find_damage(folder: Path, shard: Shard, itemsize: int, block_bytes: int) -> list[str]:
    """What is wrong with a shard, one phrase a missing file, a wrong size or a block whose hash differs."""
    path = folder / shard.file
    expected = shard.tokens * itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            return [f"{shard.file} has {size} bytes instead of {expected}"]
        with path.open("rb") as file:
            return [
                f"{shard.file} block {number} (bytes from {number * block_bytes}) has another hash"
                for number, known in enumerate(shard.blocks)
                if block_hash(file.read(block_bytes)) != known
            ]
    except OSError as error:
        return [f"{shard.file} cannot be read ({error.strerror})"]


def _path(folder: Path, name: str, state: WriterState) -> Path:
    return folder / f"{name}-{len(state.shards):05d}.bin"


def _length(state: WriterState) -> int:
    return len(state.blocks) * BLOCK_BYTES + state.rest[0]


def _read_rest(path: Path, state: WriterState) -> bytes:
    with path.open("rb") as file:
        file.seek(len(state.blocks) * BLOCK_BYTES)
        return file.read(state.rest[0])
