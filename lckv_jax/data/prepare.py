"""Text -> memory-mapped token shards and a manifest with the hashes of every block. Prepared once, then only read.

A preparation that is killed goes on where it last saved: progress.json says, after an fsync of the bytes that it
speaks of, how many documents are done and what each shard holds. The texts may have changed in between, so each
document is hashed into a chain: chain' = sha256(chain, lengths, name, text).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lckv_jax.config import DataConfig
from lckv_jax.data import shards
from lckv_jax.data.corpora import Document
from lckv_jax.data.manifest import (
    MANIFEST,
    PROGRESS,
    Manifest,
    Progress,
    Settings,
    WriterState,
    check_settings,
    load_manifest,
    load_progress,
    settings_of,
    write_durably,
)
from lckv_jax.data.shards import ShardWriter, files_of, find_damage, is_on_disk
from lckv_jax.data.status_line import StatusLine
from lckv_jax.data.texts import VALID, Stream, Text, count_texts, link, read_texts
from lckv_jax.data.tokenizer import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    tokenizer_contents,
    tokenizer_files,
    train_sentencepiece,
)
from lckv_jax.errors import UserError

_ENCODE_CHARS = 4 << 20  # text tokenised at once, on all cores
_SAVE_SECONDS = 5.0  # what a kill may cost

LOCK = "prepare.lock"
Report = Callable[[str], object]


def prepare(data: DataConfig, vocab_size: int, report: Report = print) -> Manifest:
    """Makes `data.folder` from `data.sources`: shards of both splits, the tokenizer and, last, manifest.json.

    Sources with weights are a component of the training split each, others one together. Validation is what is held
    out of each component, or all of `data.validation`. Each document is BOS, its tokens and, where it is another id,
    EOS. A folder prepared with the same settings is only read; the texts are not looked at again. A stopped
    preparation goes on; the same texts, settings and sentencepiece give the same bytes however often it was stopped.
    Memory is bounded by the largest document.

    vocab_size: the model's; a trained tokenizer has so many ids, a given one at most.
    report: gets one line a stage, and one every 10 seconds if there is no terminal.
    Raises UserError if the sources or the tokenizer cannot be used, the folder was made with other settings or cannot
    be written, or another process is at it.
    """
    folder = Path(data.folder).expanduser()
    if manifest := _ready(data, vocab_size, folder):
        return manifest
    if data.tokenizer != "train" and Path(data.tokenizer).expanduser().resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"data.tokenizer={data.tokenizer} lies in data.folder, where prepare writes and clears; move it elsewhere"
        )
    started = time.monotonic()
    _refuse_foreign(folder)
    with _alone(folder, report):
        if manifest := _ready(data, vocab_size, folder):  # another process has just finished
            return manifest
        progress = load_progress(folder)
        if progress:
            check_settings(progress, data, vocab_size)
        texts = count_texts(data, report)
        work = _resume(progress, texts, folder, report) if progress else None
        work = work or _begin(data, vocab_size, texts, folder, report)
        manifest = _tokenise(work, texts, folder, report)
    if manifest.valid.tokens <= data.batch_size * data.seq_len:
        report(
            f"the validation split is small: {manifest.valid.tokens:,} tokens, less than one batch; "
            "raise data.validation_fraction or give data.validation"
        )
    report(f"prepared {folder} in {time.monotonic() - started:.1f} s")
    return manifest


def load_prepared(data: DataConfig, vocab_size: int) -> Manifest:
    """The manifest of a folder that is prepared already, as `prepare` checks it; raises UserError if it is not."""
    folder = Path(data.folder).expanduser()
    if manifest := _ready(data, vocab_size, folder):
        return manifest
    raise UserError(
        f"{folder} is not there on {socket.gethostname()}; give data.folder on a file system that all processes share, "
        "or copy the prepared folder to each host"
    )


def verify(folder: str | Path, report: Report = print) -> Manifest:
    """Checks all bytes of a prepared folder: the size of each shard, the hash of each block, the tokenizer.

    Raises UserError that counts what is damaged and names the first of it.
    """
    folder = Path(folder).expanduser()
    manifest = load_manifest(folder)
    _check_tokenizer(manifest, folder)
    itemsize = np.dtype(manifest.dtype).itemsize
    files = manifest.train.shards + manifest.valid.shards
    damage: list[str] = []
    done, total = 0, sum(shard.tokens for shard in files) * itemsize
    with StatusLine(report) as line:
        for shard in files:
            damage += find_damage(folder, shard, itemsize, manifest.block_bytes)
            done += shard.tokens * itemsize
            line.update(
                partial("checked {:,.0f} of {:,.0f} MB, {} faults".format, done / 1e6, total / 1e6, len(damage))
            )
    if damage:
        more = f" (and {len(damage) - 3} more)" if len(damage) > 3 else ""
        raise UserError(
            f"{folder} is damaged: {', '.join(damage[:3])}{more}; copy it again, or delete it and prepare it again"
        )
    report(f"{folder}: {total / 1e6:,.1f} MB in {len(files)} shards are what was prepared")
    return manifest


def _ready(data: DataConfig, vocab_size: int, folder: Path) -> Manifest | None:
    """The manifest if the folder is prepared."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = load_manifest(folder)
    check_settings(manifest, data, vocab_size)
    _check_tokenizer(manifest, folder)
    with contextlib.suppress(OSError):  # there if the preparation was killed after its last write; it does no harm
        (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def _check_tokenizer(manifest: Manifest, folder: Path) -> None:
    tokenizer = find_tokenizer(folder)
    if tokenizer is None or tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{folder} holds no tokenizer.model, .json or .bytes that the tokens were made with; "
            "put that one back, or delete the folder to prepare it again"
        )


@contextlib.contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it however the process ends."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing {folder}; wait until it is done") from error
        except OSError as error:  # some network file systems have no locks
            report(f"{folder}: cannot be locked ({error.strerror}); see to it that no second process prepares it")
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; mend it, or choose another data.folder; "
            "what is done stays, and the same command goes on from there"
        ) from error


# ---------------------------------------------------------------- stages


class _Work(NamedTuple):
    """What is left to tokenise, and with what."""

    tokenizer: Tokenizer
    progress: Progress
    stream: Stream


def _states(progress: Progress) -> list[tuple[str, WriterState]]:
    """The writers: name of the shards, and what is on disk."""
    return [
        *((f"train-{number}", state) for number, state in enumerate(progress.components)),
        ("valid", progress.valid),
    ]


def _dtype(vocab_size: int) -> Literal["<u2", "<u4"]:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _resume(progress: Progress, texts: list[Text], folder: Path, report: Report) -> _Work | None:
    """What a stopped preparation left to do; None, and a line why, if it cannot go on."""
    tokenizer, stream = find_tokenizer(folder), read_texts(texts)
    change = _find_change(progress, texts, tokenizer, stream, folder)
    if tokenizer is None or change:
        report(f"{folder} holds a preparation that was stopped, but {change} since: starting over")
        return None
    kept = {path.name for path in tokenizer_files(folder)}
    for name, state in _states(progress):
        kept |= files_of(folder, name, state)
    with _writing(folder):
        _remove_leftovers(folder, kept)
    report(f"resuming after {progress.documents:,} documents")
    return _Work(tokenizer, progress, stream)


def _find_change(
    progress: Progress, texts: list[Text], tokenizer: Tokenizer | None, stream: Stream, folder: Path
) -> str | None:
    """What is not as `progress` knows it, None if nothing is: then the stream has passed what is done."""
    if tokenizer is None or tokenizer.fingerprint != progress.tokenizer_fingerprint:
        return "its tokenizer was changed"
    dtype = _dtype(progress.vocab_size)
    if not all(is_on_disk(folder, name, dtype, state) for name, state in _states(progress)):
        return "its shards were changed"
    chain = ""
    if progress.texts == tuple((text.documents, text.blocks) for text in texts):
        for _, document in itertools.islice(stream, progress.documents):
            chain, _ = link(chain, document)
        if chain == progress.chain:
            return None
    return "the texts have changed"


def _begin(data: DataConfig, vocab_size: int, texts: list[Text], folder: Path, report: Report) -> _Work:
    """Everything is left to do; nothing of an earlier preparation stays but the tokenizer, which is overwritten."""
    with _writing(folder):
        (folder / PROGRESS).unlink(missing_ok=True)
        _remove_leftovers(folder, set())
    tokenizer = _place_tokenizer(data, vocab_size, texts, folder, report)
    progress = Progress(
        **settings_of(data, vocab_size),
        texts=tuple((text.documents, text.blocks) for text in texts),
        tokenizer_fingerprint=tokenizer.fingerprint,
        documents=0,
        chain="",
        components=(WriterState(),) * sum(not text.valid for text in texts),
        valid=WriterState(),
    )
    _save(progress, folder)
    return _Work(tokenizer, progress, read_texts(texts))


def _remove_leftovers(folder: Path, kept: set[str]) -> None:
    for path in _written(folder):
        if path.name not in kept:
            path.unlink()


def _written(folder: Path) -> list[Path]:
    """The files that prepare writes."""
    tokenizer = r"tokenizer\.(model|json|bytes)|tokenizer_config\.json"
    ours = rf"(train(-\d+)?|valid)-\d{{5}}\.bin|{tokenizer}|({tokenizer}|manifest\.json|progress\.json)\.partial"
    return [path for path in folder.iterdir() if re.fullmatch(ours, path.name)]


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError if files that prepare would overwrite lie in a folder that it has never worked in."""
    known = any((folder / name).exists() for name in (LOCK, PROGRESS))
    if folder.is_dir() and not known and (found := _written(folder)):
        names = ", ".join(sorted(path.name for path in found)[:3])
        raise UserError(f"{folder} holds files that prepare did not make ({names}); choose an empty data.folder")


def _place_tokenizer(data: DataConfig, vocab_size: int, texts: list[Text], folder: Path, report: Report) -> Tokenizer:
    """The tokenizer, trained on the training split or copied, as it lies in `folder`."""
    started = time.monotonic()
    if data.tokenizer == "train":
        training = (document.text for writer, document in read_texts(texts) if writer != VALID)
        contents, verb = {"tokenizer.model": train_sentencepiece(training, vocab_size)}, "trained"
    else:
        contents, verb = tokenizer_contents(data.tokenizer), "copied"
    with _writing(folder):
        for name, content in contents.items():
            write_durably(folder / name, content)
    tokenizer = load_tokenizer(folder / next(iter(contents)))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    report(f"{verb} a tokenizer of {tokenizer.vocab_size} ids ({time.monotonic() - started:.1f} s)")
    return tokenizer


def _tokenise(work: _Work, texts: list[Text], folder: Path, report: Report) -> Manifest:
    """Shards of all that is left, saved every few seconds, and the manifest."""
    started = time.monotonic()
    tokenizer, progress = work.tokenizer, work.progress
    dtype = _dtype(progress.vocab_size)
    with _writing(folder):
        writers = [ShardWriter(folder, name, dtype, state) for name, state in _states(progress)]
    documents, chain = progress.documents, progress.chain
    begun, saved_at = sum(writer.tokens for writer in writers), started
    with StatusLine(report) as line:
        for batch in _batched(work.stream):
            encoded = tokenizer.encode_batch([document.text for _, document in batch])
            chain = _add(batch, encoded, chain, tokenizer, writers, folder)
            documents += len(batch)
            if time.monotonic() - saved_at >= _SAVE_SECONDS:
                with _writing(folder):
                    *components, valid = (writer.save() for writer in writers)
                    change = {"documents": documents, "chain": chain, "components": (*components,), "valid": valid}
                    progress = progress.model_copy(update=change)
                    _save(progress, folder)
                saved_at = time.monotonic()
            line.update(partial(_tell, documents, writers, begun, started, texts))
    with _writing(folder):
        manifest = _finish(progress, writers, tokenizer, chain)
        write_durably(folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
        (folder / PROGRESS).unlink(missing_ok=True)
    counts = "; ".join(
        f"{split} {info.documents} documents, {info.tokens} tokens"
        for split, info in (("train", manifest.train), ("valid", manifest.valid))
    )
    report(f"tokenised {counts} ({time.monotonic() - started:.1f} s)")
    return manifest


def _finish(progress: Progress, writers: list[ShardWriter], tokenizer: Tokenizer, chain: str) -> Manifest:
    *components, valid = (writer.close() for writer in writers)
    return Manifest(
        **{name: getattr(progress, name) for name in Settings.model_fields},
        corpus_fingerprint=chain,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        dtype=_dtype(progress.vocab_size),
        block_bytes=shards.BLOCK_BYTES,
        components=tuple(components),
        valid=valid,
    )


def _add(
    batch: list[tuple[int, Document]],
    encoded: list[np.ndarray],
    chain: str,
    tokenizer: Tokenizer,
    writers: list[ShardWriter],
    folder: Path,
) -> str:
    """Gives each document to its writer; returns the chain."""
    first = np.array([tokenizer.bos_id], np.int32)
    last = np.array([tokenizer.eos_id] * (tokenizer.eos_id != tokenizer.bos_id), np.int32)
    for number, group in itertools.groupby(zip(batch, encoded, strict=True), key=lambda pair: pair[0][0]):
        pieces, size = [], 0
        for (_, document), ids in group:
            chain, length = link(chain, document)
            pieces += [first, ids, last]
            size += length
        with _writing(folder):
            writers[number].add(np.concatenate(pieces), len(pieces) // 3, size)
    return chain


def _batched(stream: Stream) -> Iterator[list[tuple[int, Document]]]:
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[1].text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tell(documents: int, writers: list[ShardWriter], begun: int, started: float, texts: list[Text]) -> str:
    tokens = sum(writer.tokens for writer in writers)
    size = sum(writer.text_bytes for writer in writers) / 1e6
    speed = (tokens - begun) / max(time.monotonic() - started, 1e-9)
    line = f"tokenised {documents:,} documents, {tokens:,} tokens, {size:,.0f} MB, {speed:,.0f} tokens/s"
    if any(text.blocks for text in texts):  # their documents are parts of documents: how many is not known
        return line
    return f"{line}, {documents / sum(text.documents for text in texts):.0%} done"


def _save(progress: Progress, folder: Path) -> None:
    write_durably(folder / PROGRESS, progress.model_dump_json().encode())
