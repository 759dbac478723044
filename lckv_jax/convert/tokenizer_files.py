"""The tokenizer of a run as the files of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lckv_jax.data.tokenizer import tokenizer_files


def hub_tokenizer_files(folder: Path, *, context: int) -> dict[str, bytes]:
    """The files by name; none if the run has no tokenizer."""
    return {path.name: path.read_bytes() for path in tokenizer_files(folder)}
