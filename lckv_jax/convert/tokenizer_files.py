"""The tokenizer files of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path


def import_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a Hugging Face folder as the files of a run folder, by name; {} if it has none."""
    model = folder / "tokenizer.model"
    names = ["tokenizer.model"] if model.is_file() else ["tokenizer.json", "tokenizer_config.json"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return found if names[0] in found else {}
