"""A split of a prepared TensorFlow Datasets folder -> its texts, without TensorFlow: array_record only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lckv_jax.data.formats import first_line, text_of
from lckv_jax.errors import UserError

_PREPARE = "builder.download_and_prepare(file_format='array_record')"


class TfdsSplit(NamedTuple):
    """One split, checked: its examples are there, all of them, and `field` is a text feature.

    name: such as `wikipedia/20230601.en/1.0.0/train`, alike on every machine.
    """

    name: str
    folder: Path
    split: str
    field: str
    source: Any  # random access to the examples


def open_tfds(path: str, field: str) -> TfdsSplit:
    """The split that `tfds:FOLDER[:SPLIT]` names, `train` if it names none.

    Raises UserError if FOLDER is no prepared folder or of another file format, has no such split or feature, or if its
    files hold another number of examples than it says.
    """
    named = re.fullmatch(r"tfds:(.+?)(?::([\w-]+))?", path)
    if named is None:
        raise UserError(f"{path!r} names no folder; write tfds:FOLDER or tfds:FOLDER:SPLIT")
    folder, split = Path(named[1]).expanduser(), named[2] or "train"
    _check_folder(path, folder)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf, JSON, old versions: each has its own
        raise UserError(
            f"{folder}: dataset_info.json or features.json cannot be used ({first_line(error)}); prepare it again"
        ) from error
    info = builder.info
    if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        kind = info.file_format.value if info.file_format else "an unknown format"
        raise UserError(f"{folder} is prepared as {kind}, but array_record is needed; prepare it with {_PREPARE}")
    if split not in info.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(info.splits) or 'none'}")
    features = info.features
    if not isinstance(features, tfds.features.FeaturesDict) or field not in features:
        there = ", ".join(sorted(features)) if isinstance(features, tfds.features.FeaturesDict) else str(features)
        raise UserError(
            f"{folder} has no feature {field!r}; it has {there}: name the one with the text as the source's field"
        )
    _check_count(folder, info.splits[split])
    source = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]  (hidden by a decorator)
    return TfdsSplit(f"{info.full_name}/{split}", folder, split, field, source)


def read_tfds(opened: TfdsSplit) -> Iterator[tuple[int | None, str]]:
    """The texts of a split in the order of its files, numbered from 0. Raises UserError for damaged ones."""
    for number in range(len(opened.source)):
        where = f"{opened.folder}: example {number} of {opened.split}"
        try:
            example = opened.source[number]
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{where} is damaged: {first_line(error)}; prepare the folder again") from error
        yield number, text_of(example[opened.field], f"{where}: feature {opened.field!r}")


def _check_folder(path: str, folder: Path) -> None:
    if (folder / "dataset_info.json").is_file():
        return
    if not folder.is_dir():
        raise UserError(f"{path!r}: there is no folder {folder}; give the version's folder, such as NAME/1.0.0")
    inside = sorted(found.parent.relative_to(folder).as_posix() for found in folder.glob("**/dataset_info.json"))
    mend = f"did you mean {inside[-1]} in it?" if inside else f"make one with {_PREPARE}"
    raise UserError(f"{folder} is no prepared TensorFlow Datasets folder, it has no dataset_info.json; {mend}")


def _check_count(folder: Path, split: Any) -> None:
    """The data source goes by dataset_info.json alone, and reads a cut file as examples of nothing."""
    from array_record.python.array_record_module import ArrayRecordReader

    found = 0
    for path in split.filepaths:
        try:
            reader = ArrayRecordReader(str(path))
            found += reader.num_records()
            reader.close()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} is damaged or missing ({first_line(error)}); prepare {folder} again") from error
    if found != split.num_examples:
        raise UserError(
            f"{folder}: the files of {split.name} hold {found} examples, but dataset_info.json says "
            f"{split.num_examples}; prepare it again"
        )
