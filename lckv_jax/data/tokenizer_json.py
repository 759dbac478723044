"""A Hugging Face tokenizer.json as a Tokenizer, through the `tokenizers` library; no transformers, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lckv_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# How the tokens that begin and end a document are called where nothing says so; the first that there is.
_BEGIN = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|bos|>", "<|startoftext|>")
_END = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<|endoftext|>")
_HIDDEN = "\0"  # before the name of a special token, so that text does not match it
_DECIDES_IDS = ("model", "normalizer", "pre_tokenizer", "added_tokens")


class TokenizerJson:
    """The content of a tokenizer.json as a Tokenizer.

    Text is data: what reads like a special token (`</s>`) is tokenised as any other text. Nothing is cut, padded, or
    added, and BPE dropout is off, whatever the file says.
    content: the file's bytes. config: those of the tokenizer_config.json beside it, which may name `bos_token` and
    `eos_token`; where it does not, they are found by their usual names. One token may be both, as GPT-2's
    `<|endoftext|>`. Raises ValueError if there is no such tokenizer, or none that ends a document.
    """

    def __init__(self, content: bytes, config: bytes | None = None) -> None:
        self._content, self._config = content, config
        tree = _read(content, "is not a tokenizer.json")
        _build(tree)  # tells what is wrong in it, before it is looked into
        settings = {} if config is None else _read(config, "has a tokenizer_config.json that is none")
        ids = _ids(tree)
        names = _find_ends(ids, {token["content"] for token in tree.get("added_tokens") or ()}, settings)
        self.bos_id, self.eos_id = (ids[name] for name in names)
        decisive = _without_idle_flags({key: tree.get(key) for key in _DECIDES_IDS})
        canonical = json.dumps([decisive, self.bos_id, self.eos_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        _hide(tree, names)
        self._tokenizer = _build(tree)
        self._tokenizer.encode_special_tokens = True
        for name, id in zip(names, (self.bos_id, self.eos_id)):
            if self._tokenizer.token_to_id(_HIDDEN + name) != id:
                raise ValueError(f"gives {name!r} the id {id}, but another token has it")
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizerJson, (self._content, self._config)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As promised by Tokenizer; UserError for a text of which the model makes BOS or EOS all the same."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(encoding.ids, np.int32) for encoding in encoded]
        for text, ids in zip(texts, batch):
            if np.isin(ids, (self.bos_id, self.eos_id)).any():
                raise UserError(
                    f"the tokenizer finds its begin or end token in the document that begins {text[:40]!r}; remove NUL "
                    "characters from that, or choose another data.tokenizer"
                )
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(id) for id in ids]
        if outside := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise IndexError(f"id {outside[0]} of {self.vocab_size}")
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _read(content: bytes, problem: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{problem}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{problem}: it holds no JSON object")
    return tree


def _build(tree: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"is JSON, but no tokenizer ({error})") from error


def _ids(tree: dict[str, Any]) -> dict[str, int]:
    """Token -> id, of the model and of the tokens added to it."""
    vocab = tree["model"].get("vocab", {})
    ids = vocab if isinstance(vocab, dict) else {entry[0]: id for id, entry in enumerate(vocab)}
    return {**ids, **{token["content"]: token["id"] for token in tree.get("added_tokens") or ()}}


def _find_ends(ids: dict[str, int], added: set[str], config: dict[str, Any]) -> tuple[str, str]:
    """The names of the tokens that begin and end a document: as the config says, else usual ones among those added."""
    named = {}
    for role, usual in (("bos_token", _BEGIN), ("eos_token", _END)):
        name = config.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and (not isinstance(name, str) or name not in ids):
            raise ValueError(f"has no token {name!r}, which its tokenizer_config.json gives as {role}")
        named[role] = next((known for known in usual if known in added), None) if name is None else name
    if named["eos_token"] is None:
        raise ValueError("has no token for the end (eos) of a document, which separates packed documents")
    # A config that names an end alone, as Qwen's, means that nothing else begins a document.
    begins = config.get("bos_token") is not None or config.get("eos_token") is None
    return (begins and named["bos_token"]) or named["eos_token"], named["eos_token"]


def _without_idle_flags(decisive: dict[str, Any]) -> dict[str, Any]:
    """The same without what decides no id: dropout, and whether special tokens are looked for in normalised text."""
    added, model = decisive["added_tokens"], dict(decisive["model"])
    if added:
        added = [token | ({"normalized": False} if token.get("special") else {}) for token in added]
    if "dropout" in model:
        model["dropout"] = None
    return {**decisive, "model": model, "added_tokens": added}


def _hide(tree: dict[str, Any], ends: tuple[str, str]) -> None:
    """Changes `tree` so that no text yields a special token.

    `encode_special_tokens` alone does not do it: it keeps the library from looking for them before the model runs, but
    Unigram, WordLevel and BPE with `ignore_merges` know them as pieces. So they get names that text does not have.
    """
    model, added = tree["model"], tree.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")} - {model.get("unk_token")} | set(ends)
    if model.get("unk_token") in special:
        model["unk_token"] = _HIDDEN + model["unk_token"]
    for token in added:
        if token["content"] in special:
            # normalized: tokenizers 0.23 decodes such a token as its normalised name, and takes that for text
            token.update(content=_HIDDEN + token["content"], special=True, normalized=False)
    vocab = model.get("vocab", {})
    if isinstance(vocab, dict):
        model["vocab"] = {_HIDDEN * (piece in special) + piece: id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[_HIDDEN * (piece in special) + piece, score] for piece, score in vocab]
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if special.isdisjoint([*pair, "".join(pair)])]
    tree.update(truncation=None, padding=None, post_processor=None)
    if "dropout" in model:
        model["dropout"] = None
