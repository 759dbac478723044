"""The texts of a preparation: what each component and the validation split are read from, in which order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data.corpora import Corpus, Document, check_repeats, documents, scan, split_documents
from lckv_jax.data.manifest import has_weights
from lckv_jax.errors import UserError

VALID = -1  # the number of the validation split, the last; the components are 0, 1, ...
Stream = Iterator[tuple[int, Document]]  # documents, each with the number of the component or split that it goes to


class Text(NamedTuple):
    """What is read through in one go: the sources of a component, or of the validation split.

    corpus: None if all of it goes to one split. documents: how many its sources hold. blocks: see `Corpus`.
    """

    sources: tuple[SourceConfig, ...]
    corpus: Corpus | None
    documents: int
    blocks: int
    valid: bool = False


def count_texts(data: DataConfig, report: Callable[[str], object]) -> list[Text]:
    """Reads all texts once: what cannot be read is told now rather than hours later."""
    started = time.monotonic()
    check_repeats((*data.sources, *data.validation))
    groups = [(source,) for source in data.sources] if has_weights(data) else [data.sources]
    if data.validation:
        texts = [_count_whole(group, "data.sources") for group in groups]
        texts.append(_count_whole(data.validation, "data.validation")._replace(valid=True))
        held_out = f"validation from {_names(data.validation)}"
    else:
        corpora = [scan(group, data.validation_fraction) for group in groups]
        texts = [Text(group, corpus, corpus.documents, corpus.blocks) for group, corpus in zip(groups, corpora)]
        blocks = sum(corpus.blocks for corpus in corpora)
        held_out = "validation held out " + (f"from inside them ({blocks} blocks)" if blocks else "whole, by name")
        if skipped := sum(corpus.skipped for corpus in corpora):
            held_out += f", skipped {skipped} files that are not UTF-8"
    count = sum(text.documents for text in texts)
    report(f"read {_names(data.sources)}: {count} documents, {held_out} ({time.monotonic() - started:.1f} s)")
    return texts


def _count_whole(sources: tuple[SourceConfig, ...], field: str) -> Text:
    count = sum(1 for _ in documents(sources))
    if not count:
        raise UserError(f"{field}: empty corpus, no text but white space in {_names(sources)}; name texts")
    return Text(sources, None, count, 0)


def _names(sources: Iterable[SourceConfig]) -> str:
    return ", ".join(source.path for source in sources)


def read_texts(texts: list[Text]) -> Stream:
    """All documents in the order in which they are tokenised."""
    for number, text in enumerate(texts):
        if text.corpus is None:
            for document in documents(text.sources):
                yield VALID if text.valid else number, document
        else:
            for split, document in split_documents(text.corpus):
                yield VALID if split == "valid" else number, document


def link(chain: str, document: Document) -> tuple[str, int]:
    """The chain with one document more, and the document's bytes in UTF-8."""
    name, text = document.name.encode(), document.text.encode()
    head = b"%s %d %d " % (chain.encode(), len(name), len(text))
    digest = hashlib.sha256(head + name)
    digest.update(text)
    return digest.hexdigest(), len(text)
