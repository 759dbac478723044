"""What a prepared folder holds and what it was made from; how far an unfinished preparation is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.errors import UserError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One file of little-endian token ids; blocks: hex blake2b-128 of each `block_bytes` bytes of it."""

    file: str
    tokens: int
    blocks: tuple[str, ...]


class SplitInfo(_Frozen):
    """One split or one component of it. tokens: with BOS and EOS; bytes: of the text in UTF-8 (for bits per byte)."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


class WriterState(_Frozen):
    """A split or component that is being written: what is on disk for good.

    blocks: hashes of the full blocks of the shard being written. rest: length in bytes and hash of what follows them.
    """

    documents: int = 0
    bytes: int = 0
    shards: tuple[Shard, ...] = ()
    blocks: tuple[str, ...] = ()
    rest: tuple[int, str] = (0, "")


class Settings(_Frozen):
    """What prepared tokens depend on beside the texts. Weights are not among them: they only choose rows."""

    version: Literal[2] = 2
    sources: tuple[SourceConfig, ...]
    validation: tuple[SourceConfig, ...]
    tokenizer: str
    vocab_size: int
    validation_fraction: float | None

    @field_serializer("sources", "validation")
    def _without_weights(self, sources: tuple[SourceConfig, ...]) -> list[dict[str, Any]]:
        return [source.model_dump(exclude={"weight"}) for source in sources]


class Progress(Settings):
    """An unfinished preparation. Texts: documents and blocks that were counted in each text before tokenising.

    chain: the hash chain of the documents that are done (see `lckv_jax.data.prepare`).
    """

    texts: tuple[tuple[int, int], ...]
    tokenizer_fingerprint: str
    documents: int
    chain: str
    components: tuple[WriterState, ...]
    valid: WriterState


class Manifest(Settings):
    """What a prepared folder holds, and the settings that it was made from.

    components: the training tokens, one of all sources together, or one a source where the sources have weights.
    """

    corpus_fingerprint: str
    tokenizer_fingerprint: str
    bos_id: int
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    block_bytes: int
    components: tuple[SplitInfo, ...]
    valid: SplitInfo

    @property
    def train(self) -> SplitInfo:
        """All components, one after the other."""
        return SplitInfo(
            documents=sum(component.documents for component in self.components),
            tokens=sum(component.tokens for component in self.components),
            bytes=sum(component.bytes for component in self.components),
            shards=tuple(shard for component in self.components for shard in component.shards),
        )

    @property
    def hash(self) -> str:
        """Hex sha256 of everything here, so of every token: a checkpoint records it, resuming compares it."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError if there is none, or it is not one."""
    manifest = _load(Manifest, folder, MANIFEST)
    if manifest is not None:
        return manifest
    if (Path(folder).expanduser() / PROGRESS).exists():
        raise UserError(
            f"{folder} holds a preparation that was stopped; run `python -m lckv_jax prepare CONFIG.yaml` to finish it"
        )
    raise UserError(
        f"{folder} holds no prepared data; run `python -m lckv_jax prepare CONFIG.yaml`, or mend data.folder"
    )


def load_progress(folder: str | Path) -> Progress | None:
    """How far the preparation of `folder` is; None if it has not begun. Raises UserError if that cannot be read."""
    return _load(Progress, folder, PROGRESS)


def settings_of(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """The fields of `Settings` for a config."""
    return {
        "sources": _unweighted(data.sources),
        "validation": _unweighted(data.validation),
        "tokenizer": data.tokenizer,
        "vocab_size": vocab_size,
        "validation_fraction": None if data.validation else data.validation_fraction,
    }


def has_weights(data: DataConfig) -> bool:
    """Whether each source must be a component of its own."""
    return len(data.sources) > 1 and data.sources[0].weight is not None


def check_settings(made: Manifest | Progress, data: DataConfig, vocab_size: int) -> None:
    """Raises UserError if the folder was made with other settings than these.

    Other weights are no other settings; but without any when it was made, the sources lie mixed in one component.
    """
    begun = "was prepared" if isinstance(made, Manifest) else "holds a preparation that was stopped,"
    mend = "choose another data.folder, or delete this one to prepare it again"
    for name, asked in settings_of(data, vocab_size).items():
        was = getattr(made, name)
        if was != asked:
            field = "model.vocab_size" if name == "vocab_size" else f"data.{name}"
            raise UserError(
                f"{data.folder} {begun} with {field}={_plain(was)}, but the config says {_plain(asked)}; {mend}"
            )
    if has_weights(data) and len(made.components) == 1:
        raise UserError(
            f"{data.folder} {begun} for data.sources without weights, which lie in it as one, "
            f"but the config gives weights; {mend}"
        )
    if isinstance(made, Progress) and not has_weights(data) and len(made.components) > 1:
        raise UserError(
            f"{data.folder} {begun} for data.sources with weights, but the config gives none; "
            "give them back until it is done, or choose another data.folder"
        )


def write_durably(path: Path, content: bytes) -> None:
    """All of `content` or nothing, also after a power cut. Raises OSError."""
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


_Made = TypeVar("_Made", Manifest, Progress)


def _load(kind: type[_Made], folder: str | Path, name: str) -> _Made | None:
    path = Path(folder).expanduser() / name
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend it, or choose another data.folder") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its JSON"
        raise UserError(
            f"{path} is damaged or of another version ({where}: {problem['msg']}); delete {folder} and prepare it again"
        ) from error


def _unweighted(sources: Sequence[SourceConfig]) -> tuple[SourceConfig, ...]:
    return tuple(source.model_copy(update={"weight": None}) for source in sources)


def _plain(value: Any) -> str:
    """As in a config: a source with the usual field is its path alone."""
    usual = SourceConfig.model_fields["field"].default
    if isinstance(value, tuple):
        value = [
            source.path if source.field == usual else {"path": source.path, "field": source.field} for source in value
        ]
    return json.dumps(value)
