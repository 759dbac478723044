"""The tokenizer files of a Hugging Face folder, in and out, without torch or transformers."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv_jax.convert.sentencepiece_json import ALONE, convert, read_model
from lckv_jax.data.tokenizer import SentencePiece, Tokenizer, load_tokenizer, tokenizer_contents, tokenizer_files
from lckv_jax.data.tokenizer_json import TokenizerJson
from lckv_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_JSON, _MODEL, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")  # how such a file begins; Llama 3 calls it tokenizer.model too


# ---------------------------------------------------------------- out


def hub_tokenizer_files(folder: Path, *, context: int) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder, by name, for the tokenizer in `folder`; {} if it has none.

    `AutoTokenizer` of transformers 5 makes of them, with no other library installed, the ids that our `encode` gives,
    special tokens that stand in text being text; by default with BOS in front, as documents begin in training.
    folder: a run's or a prepared one. context: the tokens that the model reads, written as `model_max_length`.
    Raises UserError if the tokenizer is damaged, or if its ids are not those of the files on texts chosen to tell.
    """
    files = tokenizer_files(folder)
    if not files:
        return {}
    path, tokenizer = files[0], load_tokenizer(files[0])
    if path.suffix == ".model":
        content = path.read_bytes()
        model = read_model(content)
        for note in model.notes():
            print(f"note: {note}", file=sys.stderr)
        tree, texts, kept = convert(model), _telling(*model.groups()), {_MODEL: content}
    else:
        tree = json.loads(path.read_bytes()) if path.suffix == ".json" else _bytes_tree()
        texts, kept = _telling(), {}
    ends = _ends(tree, tokenizer)
    _begin_only(tree, ends[0], tokenizer.bos_id)
    _check(path, tokenizer, tree, ends, texts)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what transformers 4 and 5 both call it
        "bos_token": ends[0],
        "eos_token": ends[1],
        **_more_names(tree, files[1:], tokenizer.vocab_size),
        "padding_side": "left",  # generate() goes on from the last token of each row
        "model_max_length": context,
        "model_input_names": [
            "input_ids",
            "attention_mask",
        ],  # transformers 4 adds token_type_ids, which generate() refuses
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text is data: what reads like a special token is none
    }
    return {**kept, _JSON: _dump(tree), _CONFIG: _dump(config)}


def _dump(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=2) + "\n").encode()


def _bytes_tree() -> dict[str, Any]:
    """The bytes of UTF-8 as a byte-level BPE without merges, in which the id of a byte is its value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's letters for bytes: themselves where they can be seen, else those from U+0100 on in turn
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = [chr(byte if byte in seen else 256 + unseen.index(byte)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return json.loads(tokenizer.to_str())


def _ends(tree: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, str]:
    """What the tokens that begin and end a document are called."""
    vocab = tree["model"]["vocab"]
    names = {id: name for name, id in vocab.items()} if isinstance(vocab, dict) else [name for name, _ in vocab]
    added = {token["id"]: token["content"] for token in tree.get("added_tokens") or ()}
    begin, end = (added[id] if id in added else names[id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    return begin, end


def _begin_only(tree: dict[str, Any], name: str, id: int) -> None:
    """Changes `tree` so that it adds one BOS in front of a text and nothing else, and leaves nothing to chance."""
    begin, a, b = ({"SpecialToken": {"id": name, "type_id": 0}}, *({"Sequence": {"id": s, "type_id": 0}} for s in "AB"))
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, b],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }
    tree.update(truncation=None, padding=None)
    if "dropout" in tree["model"]:
        tree["model"]["dropout"] = None
    for token in tree.get("added_tokens") or ():
        if token.get("special"):  # tokenizers 0.23 decodes it as text where it is to be normalised
            token["normalized"] = False


def _unknown(tree: Mapping[str, Any]) -> str | None:
    if (id := tree["model"].get("unk_id")) is not None:
        return tree["model"]["vocab"][id][0]
    return tree["model"].get("unk_token")


def _more_names(tree: Mapping[str, Any], configs: Sequence[Path], vocab_size: int) -> dict[str, str]:
    """The unknown and padding tokens, where the files name them and the tokenizer has them."""
    named = {"unk_token": _unknown(tree)}
    for path in configs:
        pad = json.loads(path.read_bytes()).get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        id = _build(tree).token_to_id(pad) if isinstance(pad, str) else None
        if id is not None and id < vocab_size:
            named["pad_token"] = pad
        elif pad is not None:
            print(f"note: {path.name}: its pad_token {pad!r} is no token of the tokenizer; left out", file=sys.stderr)
    return {role: name for role, name in named.items() if name is not None}


# ---------------------------------------------------------------- the proof


_WRITTEN = """Hello world;  two  spaces ; ;   ;don't DON'T;trailing  ;0123456789 3.14 1,000;def f(x): return x  # ok
<s>;</s>;<unk>;<pad>;a </s>b<s> c;<s></s><s>;<s;</s;s>;<<s>>;<0x0A>;<0x0A><0x41>x;<0x;<;>;[BOS][EOS];<|endoftext|>
▁;▁▁a ▁b▁ ;café naïve;日本語のテキスト。;中文、测试;한국어;हिन्दी ٣ עברית العربية;😀;👩‍👩‍👧 🏳️‍🌈 👍🏽;https://x.org/?q=a%20b"""
_ESCAPED = (
    "\t\ttabs\t",
    "\n",
    "\r\n\r\nlines \n\n",
    "\n</s>\n",
    "\0",
    "a\0b",
    "\x01\x7f",
    "a\x01\x01b",
    "\u200b\u200d\u2060",
    "\u00a0no-break\u2003em\u3000wide",
    "\ufeffBOM",
    "e\u0301 n\u0303",
    "\u1112\u1161\u11ab",
    "\uff41\uff76\uff9e\ufb01\u00bd",
    "\ud7ff\ue000\ufffd\U0010ffff",
    "\ufff0\ufff0x\ufff0",
    "x" * 3000,
    "ab " * 999,
    " " * 999,
)
_RUNS = " \t\n▁a=-.0"


def _telling(*groups: Sequence[str]) -> list[str]:
    """Texts at which two implementations of one tokenizer could part: fixed ones, and mixtures of pieces of a group."""
    texts = ["", *re.split("[;\n]", _WRITTEN), *_ESCAPED]
    texts += [begin + run * count + end for run in _RUNS for count in range(1, 40) for begin, end in (("", ""), "xy")]
    odd = {0x344, *range(0xD800, 0xE000)}  # a mark that is two, never in canonical order; surrogates
    characters = [chr(code) for code in range(1, 0xFFFE) if code not in odd]
    texts += ["a".join(characters[start : start + 128]) for start in range(0, len(characters), 128)]
    chance = random.Random(0)
    for group in groups:
        mixed = ["".join(chance.choices(group, k=8)) for _ in range(2000) if group]
        texts += [text.replace("▁", " ") for text in (*group, *mixed)]
    return texts


def _check(path: Path, tokenizer: Tokenizer, tree: Mapping[str, Any], ends: Sequence[str], texts: list[str]) -> None:
    """Raises UserError if `tree`, read as transformers reads it, and `tokenizer` part at one of `texts`."""
    from tokenizers import AddedToken

    other = _build(tree)
    other.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ends])
    other.encode_special_tokens = True
    unknown = other.token_to_id(_unknown(tree) or "")
    rounds = path.suffix == ".model" and tree["model"]["type"] == "Unigram"
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    for text, expected, encoding in zip(texts, ids, other.encode_batch_fast(texts)):
        begin, *found = encoding.ids
        same = found == expected or (rounds and _scores_equal(tree["model"]["vocab"], found, expected))
        if same and unknown not in expected:  # which has no text
            same = other.decode(encoding.ids) == tokenizer.decode(expected)
        if not same or begin != tokenizer.bos_id:
            raise UserError(
                f"{path} and the {_JSON} made of it part at the text {text[:60]!r}, so that no file is written; {ALONE}"
            )


def _scores_equal(vocab: Sequence[tuple[str, float]], *paths: Sequence[int]) -> bool:
    """Whether unigram paths score the same to the rounding of sentencepiece, which adds float32."""
    one, other = (sum(vocab[id][1] for id in path) for path in paths)
    return abs(one - other) <= 2**-23 * abs(one) * len(paths[0])


def _build(tree: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(tree))


# ---------------------------------------------------------------- in


def import_tokenizer_files(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer of a Hugging Face folder as the files, by name, that a run's folder holds; {} if it has none.

    vocab_size: ids of the model. A tokenizer.model that sentencepiece reads goes before a tokenizer.json, unless that
    one says more: it has further tokens, for which the model has embeddings, or its tokenizer_config.json names other
    ends of a document. What `hub_tokenizer_files` made of a bytes tokenizer becomes one again. Raises UserError naming
    a file that is damaged.
    """
    model, other = Path(folder) / _MODEL, Path(folder) / _JSON
    has_model, has_other = (os.path.lexists(path) for path in (model, other))  # a link to nowhere is damage
    if has_model and not (has_other and _is_left_for(model, other, vocab_size)):
        load_tokenizer(model)
        return tokenizer_contents(model)
    if not has_other:
        return {}
    tokenizer = load_tokenizer(other)
    made = TokenizerJson(_dump(_bytes_tree()))
    return tokenizer_contents("bytes" if tokenizer.fingerprint == made.fingerprint else other)


def _is_left_for(model: Path, other: Path, vocab_size: int) -> bool:
    """Whether a whole tokenizer.model is none for us, or says less than the tokenizer.json beside it."""
    content = tokenizer_contents(model)[_MODEL]
    if _TIKTOKEN.match(content):
        return True
    try:
        less = SentencePiece(content)
    except ValueError as error:
        return "has no token" in str(error)  # for the ends of a document, which a tokenizer_config.json may name
    try:
        more = load_tokenizer(other)
    except UserError:
        return False
    other_ends = other.with_name(_CONFIG).exists() and (more.bos_id, more.eos_id) != (less.bos_id, less.eos_id)
    return more.vocab_size <= vocab_size and (more.vocab_size > less.vocab_size or other_ends)
