"""Text -> memory-mapped token shards and a manifest with the hashes of every block. Prepared once, then only read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lckv_jax.config import DataConfig
from lckv_jax.data.corpora import Corpus, Document, Split, scan, split_documents
from lckv_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_contents, train_sentencepiece
from lckv_jax.errors import UserError

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20  # what one hash covers
SHARD_BLOCKS = 256  # blocks of a shard
_ENCODE_CHARS = 4 << 20  # text tokenised at once, on all cores


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One file of little-endian token ids; blocks: hex blake2b-128 of each `block_bytes` bytes of it."""

    file: str
    tokens: int
    blocks: tuple[str, ...]


class SplitInfo(_Frozen):
    """One split. tokens: with BOS and EOS; bytes: of the text in UTF-8 (for bits per byte)."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


class Manifest(_Frozen):
    """What a prepared folder holds, and the settings that it was made from."""

    version: Literal[1] = 1
    sources: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    validation_fraction: float
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    bos_id: int
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    block_bytes: int
    train: SplitInfo
    valid: SplitInfo

    @property
    def hash(self) -> str:
        """Hex sha256 of everything here, so of every token: a checkpoint records it, resuming compares it."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError if there is none, or it is not one."""
    path = Path(folder).expanduser() / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no prepared data; run `python -m lckv_jax prepare CONFIG.yaml`, or mend data.folder"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend it, or choose another data.folder") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its JSON"
        raise UserError(
            f"{path} is damaged or of another version ({where}: {problem['msg']}); delete {folder} and prepare it again"
        ) from error


def prepare(data: DataConfig, vocab_size: int, report: Callable[[str], object] = print) -> Manifest:
    """Makes `data.folder` from `data.sources`: shards of both splits, the tokenizer and, last, manifest.json.

    Each document is BOS, its tokens and, where it is another id, EOS. A folder prepared with the same settings is only
    read; the texts are not looked at again. What a killed preparation left is overwritten. The same texts, settings
    and sentencepiece give the same bytes. Memory is bounded by the largest document.

    vocab_size: the model's; a trained tokenizer has so many ids, a given one at most.
    report: gets one line a stage.
    Raises UserError if the sources or the tokenizer cannot be used, or the folder was made with other settings.
    """
    folder = Path(data.folder).expanduser()
    if (folder / MANIFEST).exists():
        manifest = load_manifest(folder)
        _check_settings(manifest, data, vocab_size)
        _check_tokenizer(manifest, folder)
        return manifest
    started = time.monotonic()
    corpus = scan(data.sources, data.validation_fraction)
    report(_describe(corpus) + f" ({time.monotonic() - started:.1f} s)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _remove_leftovers(folder)
            tokenizer = _place_tokenizer(data, vocab_size, corpus, folder, report)
            manifest = _write_shards(data, vocab_size, corpus, tokenizer, folder, report)
            _write_durably(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; mend it, or choose another data.folder"
        ) from error
    report(f"prepared {folder} in {time.monotonic() - started:.1f} s")
    return manifest


def _check_settings(manifest: Manifest, data: DataConfig, vocab_size: int) -> None:
    wanted = {
        "data.sources": (manifest.sources, tuple(source.path for source in data.sources)),
        "data.tokenizer": (manifest.tokenizer, data.tokenizer),
        "model.vocab_size": (manifest.vocab_size, vocab_size),
        "data.validation_fraction": (manifest.validation_fraction, data.validation_fraction),
    }
    for field, (made, asked) in wanted.items():
        if made != asked:
            raise UserError(
                f"{data.folder} was prepared with {field}={_plain(made)}, but the config says {_plain(asked)}; "
                "choose another data.folder, or delete this one to prepare it again"
            )


def _check_tokenizer(manifest: Manifest, folder: Path) -> None:
    tokenizer = find_tokenizer(folder)
    if tokenizer is None or tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{folder} does not hold the tokenizer that the tokens were made with; "
            "put that one back, or delete the folder to prepare it again"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it however the process ends."""
    with (folder / "prepare.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {folder}; wait until it is done") from error
        yield


def _plain(value: object) -> str:
    return json.dumps(value)


def _describe(corpus: Corpus) -> str:
    how = f"from inside them ({corpus.blocks} blocks)" if corpus.blocks else "whole, by name"
    skipped = f", skipped {corpus.skipped} files that are not UTF-8" if corpus.skipped else ""
    names = ", ".join(source.path for source in corpus.sources)
    return f"read {names}: {corpus.documents} documents, validation held out {how}{skipped}"


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if re.fullmatch(r"(train|valid)-\d{5}\.bin|tokenizer(\.\w+|_config\.json)|.*\.partial", path.name):
            path.unlink()


def _place_tokenizer(
    data: DataConfig, vocab_size: int, corpus: Corpus, folder: Path, report: Callable[[str], object]
) -> Tokenizer:
    """The tokenizer, trained on the training split or copied, as it lies in `folder`."""
    started = time.monotonic()
    if data.tokenizer == "train":
        texts = (document.text for split, document in split_documents(corpus) if split == "train")
        contents, verb = {"tokenizer.model": train_sentencepiece(texts, vocab_size)}, "trained"
    else:
        load_tokenizer(data.tokenizer)  # names the file if it is not one
        contents, verb = tokenizer_contents(data.tokenizer), "copied"
    for name, content in contents.items():
        _write_durably(folder / name, content)
    tokenizer = load_tokenizer(folder / next(iter(contents)))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    report(f"{verb} a tokenizer of {tokenizer.vocab_size} ids ({time.monotonic() - started:.1f} s)")
    return tokenizer


def _write_shards(
    data: DataConfig,
    vocab_size: int,
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    report: Callable[[str], object],
) -> Manifest:
    started = time.monotonic()
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    writers: dict[Split, _SplitWriter] = {
        "train": _SplitWriter(folder, "train", dtype),
        "valid": _SplitWriter(folder, "valid", dtype),
    }
    corpus_hash = hashlib.sha256()
    ends = [tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else []
    for batch in _batched(split_documents(corpus)):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), ids in zip(batch, encoded, strict=True):
            name, text = document.name.encode(), document.text.encode()
            corpus_hash.update(len(name).to_bytes(8, "little") + name + len(text).to_bytes(8, "little") + text)
            writers[split].add(np.concatenate(([tokenizer.bos_id], ids, ends)), len(text))
    infos = {split: writer.close() for split, writer in writers.items()}
    counts = "; ".join(f"{split} {info.documents} documents, {info.tokens} tokens" for split, info in infos.items())
    report(f"tokenised {counts} ({time.monotonic() - started:.1f} s)")
    return Manifest(
        sources=tuple(source.path for source in data.sources),
        tokenizer=data.tokenizer,
        vocab_size=vocab_size,
        validation_fraction=data.validation_fraction,
        corpus_fingerprint=corpus_hash.hexdigest(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=dtype,
        block_bytes=BLOCK_BYTES,
        train=infos["train"],
        valid=infos["valid"],
    )


def _batched(documents: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to SPLIT-00000.bin, SPLIT-00001.bin, ..., and hashes each block that is full."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        self._folder, self._split, self._dtype = folder, split, np.dtype(dtype)
        self._documents = self._text_bytes = 0
        self._buffer = bytearray()
        self._blocks: list[str] = []  # of the shard being written
        self._shards: list[Shard] = []

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self._documents += 1
        self._text_bytes += text_bytes
        self._buffer += tokens.astype(self._dtype).tobytes()
        while len(self._buffer) >= BLOCK_BYTES:
            self._write_block(self._buffer[:BLOCK_BYTES])
            del self._buffer[:BLOCK_BYTES]

    def close(self) -> SplitInfo:
        if self._buffer:
            self._write_block(self._buffer)
        if self._blocks:
            self._finish_shard()
        tokens = sum(shard.tokens for shard in self._shards)
        return SplitInfo(documents=self._documents, tokens=tokens, bytes=self._text_bytes, shards=tuple(self._shards))

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self._shards):05d}.bin"

    def _write_block(self, block: bytearray) -> None:
        with self._path.open("ab") as file:
            file.write(block)
        self._blocks.append(hashlib.blake2b(block, digest_size=16).hexdigest())
        if len(self._blocks) == SHARD_BLOCKS:
            self._finish_shard()

    def _finish_shard(self) -> None:
        path = self._path
        with path.open("ab") as file:
            os.fsync(file.fileno())
        tokens = path.stat().st_size // self._dtype.itemsize
        self._shards.append(Shard(file=path.name, tokens=tokens, blocks=tuple(self._blocks)))
        self._blocks = []


def _write_durably(path: Path, content: bytes) -> None:
    """All of `content` or nothing, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
