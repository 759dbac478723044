"""tokenizer.json: text is data, whatever the model inside; ids equal those of the sentencepiece model it came from."""

import gzip
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lckv_jax.data.tokenizer import load_tokenizer
from lckv_jax.data.tokenizer_json import TokenizerJson
from lckv_jax.errors import UserError

TEXTS = [
    "some words and more words, some more",
    "a </s> in HTML, an <s> and <pad>",
    "emoji 👩‍👩‍👧, 日本語",
    "\n\t x",
] * 5
CHARACTERS = sorted({character for text in TEXTS for character in text})
LOOKALIKES = ["</s>", "<s>", "a </s>b<s> c", "<s></s><s>", "</s></s>", "<pad>", "<s", "<unk>", "\n</s>\n"]


def byte_level(*special: str) -> Tokenizer:
    """A BPE over bytes, as GPT-2's; `special` are added to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("<pad>", 0.0),
        ("▁", -5.0),
        *((c, -6.0) for c in CHARACTERS),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return tokenizer


def word_level() -> Tokenizer:
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        *sorted({word for text in TEXTS for word in text.split()} - {"</s>", "<s>", "<pad>"}),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return tokenizer


def known_pieces() -> Tokenizer:
    """BPE whose merges build `</s>`, and which takes pieces that it knows at once."""
    tree = json.loads(byte_level("<s>", "</s>", "<pad>").to_str())
    model, ids = tree["model"], {token["content"]: token["id"] for token in tree["added_tokens"]}
    model["vocab"] |= {"</": len(model["vocab"]), "s>": len(model["vocab"]) + 1}
    for token in tree["added_tokens"]:
        token["id"] = ids[token["content"]] + 2
        model["vocab"][token["content"]] = token["id"]
    model["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], ["<", "s>"], *model["merges"]]
    model["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(tree))


MODELS = {
    "byte-level": lambda: byte_level("<s>", "</s>", "<pad>"),
    "unigram": unigram,
    "word-level": word_level,
    "known pieces": known_pieces,
}


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest) -> Tokenizer:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def tokenizer(original: Tokenizer) -> TokenizerJson:
    return TokenizerJson(original.to_str().encode())


def test_special_tokens_in_text_stay_text(original: Tokenizer, tokenizer: TokenizerJson) -> None:
    special = {original.token_to_id(name) for name in ("<s>", "</s>", "<pad>")}
    assert special & set(original.encode(LOOKALIKES[2]).ids)  # which the file alone does not promise
    for text in LOOKALIKES + TEXTS:
        assert not special & set(tokenizer.encode(text)), text


def test_ids_of_other_text_are_those_of_the_file(original: Tokenizer, tokenizer: TokenizerJson) -> None:
    for text in (text for text in TEXTS if "<" not in text):
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert (tokenizer.bos_id, tokenizer.eos_id) == (original.token_to_id("<s>"), original.token_to_id("</s>"))
    assert tokenizer.vocab_size == original.get_vocab_size()


def test_batch_equals_one_by_one_and_pickles(tokenizer: TokenizerJson) -> None:
    texts = [*TEXTS, *LOOKALIKES, ""]
    batch = tokenizer.encode_batch(texts)
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts] == [*map(copy.encode, texts)]
    assert copy.fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="module")
def bytes_bpe() -> TokenizerJson:
    return TokenizerJson(byte_level("<|begin_of_text|>", "<|end_of_text|>").to_str().encode())


@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["<|end_of_text|>", "a<|begin_of_text|>", "\0<|end_of_text|>"])
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_round_trips(bytes_bpe: TokenizerJson, text: str) -> None:
    ids = bytes_bpe.encode(text)
    assert bytes_bpe.decode([bytes_bpe.bos_id, *ids, bytes_bpe.eos_id]) == text
    assert not {bytes_bpe.bos_id, bytes_bpe.eos_id} & set(ids)


def test_ids_that_it_does_not_have_are_no_text(bytes_bpe: TokenizerJson) -> None:
    with pytest.raises(IndexError, match=f"id {bytes_bpe.vocab_size} of"):
        bytes_bpe.decode(np.array([3, bytes_bpe.vocab_size]))


def test_the_last_way_to_a_begin_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"begin or end token in the document that begins 'a \\x00</s>'; remove NUL"):
        TokenizerJson(unigram().to_str().encode()).encode("a \0</s>")


def test_nothing_is_cut_padded_added_or_left_to_chance() -> None:
    original = byte_level("<s>", "</s>")
    plain = TokenizerJson(original.to_str().encode())
    original.enable_truncation(3)
    original.enable_padding(length=50)
    original.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, original.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    original.model.dropout = 0.9
    tokenizer = TokenizerJson(original.to_str().encode())
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [plain.encode(text) for text in TEXTS]


def test_begin_and_end_are_marked_though_the_file_does_not_say_that_they_are_special() -> None:
    original = byte_level()
    original.add_tokens(["<s>", "</s>"])
    tokenizer = TokenizerJson(original.to_str().encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<s></s>"))


@pytest.mark.parametrize(
    ("special", "config", "begin", "end"),
    [
        (["<s>", "</s>", "<|endoftext|>"], None, "<s>", "</s>"),
        (["<|begin_of_text|>", "<|end_of_text|>"], None, "<|begin_of_text|>", "<|end_of_text|>"),
        (["[BOS]", "[EOS]"], None, "[BOS]", "[EOS]"),
        (["<|endoftext|>"], None, "<|endoftext|>", "<|endoftext|>"),  # GPT-2
        (["<s>", "<e>"], {"bos_token": "<e>", "eos_token": "<e>"}, "<e>", "<e>"),
        (["<s>", "<e>"], {"bos_token": None, "eos_token": "<e>"}, "<e>", "<e>"),  # Qwen
        (["<a>", "<s>", "</s>"], {"bos_token": {"content": "<a>"}}, "<a>", "</s>"),
        (["<s>", "</s>"], {"model_max_length": 9}, "<s>", "</s>"),
    ],
)  # fmt: skip
def test_begin_and_end_are_found(special: list[str], config: dict | None, begin: str, end: str, tmp_path: Path) -> None:
    original = byte_level(*special)
    (tmp_path / "tokenizer.json").write_text(original.to_str())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for same in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert (same.bos_id, same.eos_id) == (original.token_to_id(begin), original.token_to_id(end))


def test_one_token_may_be_unknown_begin_and_end() -> None:
    original = byte_level("<|endoftext|>")
    tree = json.loads(original.to_str())
    tree["model"]["unk_token"] = "<|endoftext|>"
    tokenizer = TokenizerJson(json.dumps(tree).encode())
    assert tokenizer.decode(tokenizer.encode("x <|endoftext|>")) == "x <|endoftext|>"


def test_begin_and_end_are_no_text_though_they_are_to_be_normalised() -> None:
    tree = json.loads(byte_level("<s>", "</s>").to_str())
    tree["normalizer"] = {"type": "Prepend", "prepend": "_"}
    for token in tree["added_tokens"]:
        token["normalized"] = True
    tokenizer = TokenizerJson(json.dumps(tree).encode())
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "_a"


def test_fingerprint_is_of_what_decides_ids() -> None:
    tree = json.loads(byte_level("<s>", "</s>", "<|endoftext|>").to_str())
    normalized = [{**token, "normalized": True} for token in tree["added_tokens"]]

    def fingerprint(config: dict | None = None, **changes: object) -> str:
        content = json.dumps({**tree, **changes}, indent=1).encode()
        return TokenizerJson(content, json.dumps(config).encode() if config else None).fingerprint

    same = [
        fingerprint(),
        fingerprint(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
        fingerprint(decoder=None),
        fingerprint(added_tokens=normalized),
        fingerprint(model={**tree["model"], "dropout": 0.1}),
        fingerprint(model={**tree["model"], "vocab": dict(reversed(tree["model"]["vocab"].items()))}),
        fingerprint({"bos_token": "<s>", "eos_token": "</s>"}),
    ]
    other = [
        fingerprint(normalizer={"type": "Lowercase"}),
        fingerprint(pre_tokenizer=None),
        fingerprint(model={**tree["model"], "merges": tree["model"]["merges"][:-1]}),
        fingerprint(added_tokens=[{**token, "lstrip": True} for token in tree["added_tokens"]]),
        fingerprint({"eos_token": "<|endoftext|>"}),
    ]
    assert len(set(same)) == 1
    assert len({same[0], *other}) == 1 + len(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not a tokenizer\.json: Expecting value"),
        (b"{", r"is not a tokenizer\.json"),
        (b"[1]", r"is not a tokenizer\.json: it holds no JSON object"),
        (b'{"vocab": {"a": 0}}', r"is JSON, but no tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{}]}', r"is JSON, but no"),
        (b'{"model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1}, "merges": []}}', r"has no token for the end"),
        (b"half", "is JSON|is not a tokenizer"),
        (b"\xff\xfe", r"is not a tokenizer\.json"),
    ],
)  # fmt: skip
def test_unusable_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    whole = byte_level("<s>", "</s>").to_str().encode()
    path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(UserError, match=rf"some\.json ({message}).*; give a whole") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_an_id_given_twice_is_refused() -> None:
    tree = json.loads(byte_level("<s>", "</s>").to_str())
    tree["added_tokens"][1]["id"] += 5
    with pytest.raises(ValueError, match=r"gives '</s>' the id \d+, but"):
        TokenizerJson(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"has a tokenizer_config\.json that is none"),
        ('{"eos_token": "<e>"}', r"has no token '<e>', which its"),
        ('{"eos_token": ["a"]}', r"has no token \['a'\], which its"),
        ('{"eos_token": {"content": ["a"]}}', r"has no token \['a'\]"),
    ],
)
def test_unusable_settings_are_named(config: str, message: str, tmp_path: Path) -> None:
    byte_level("<s>", "</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=r"tokenizer\.json " + message):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_both_llama2_files_give_the_same_ids(test_data: Path) -> None:
    """Real documents, and texts at which the two implementations could part."""
    folder = test_data / "tokenizers" / "llama2"
    corpora = [test_data / name for name in ("c4_en/valid.jsonl.gz", "wiki_en/valid.jsonl.gz")]
    if not all(path.exists() for path in (folder, *corpora)):
        pytest.skip(f"no {folder} or corpora")
    lines = [line for path in corpora for line in gzip.decompress(path.read_bytes()).splitlines()]
    texts = [json.loads(line)["text"][:3000] for line in lines]
    assert len(texts) > 500
    texts += [*TEXTS, *LOOKALIKES, "", " ", "  two", "two  ", "a  b", "▁", "▁▁a ▁", "<0x0A>", "\r\n", "\0", "\ufeffBOM"]
    texts += [
        "e\u0301 é",
        "🏳️‍🌈",
        "\u200b",
        " \n",
        "\x07",
        "\U0010ffff",
        "٣ हिन्दी",
        "\uff41",
        "x" * 999,
        " " * 99,
        "\t" * 9,
    ]
    model, other = load_tokenizer(folder / "tokenizer.model"), load_tokenizer(folder / "tokenizer.json")
    assert (other.bos_id, other.eos_id, model.bos_id, model.eos_id) == (1, 2, 1, 2)
    assert (model.vocab_size, other.vocab_size) == (32000, 32003)  # three tokens more, which no text here has
    for text, ids, same in zip(texts, model.encode_batch(texts), other.encode_batch(texts), strict=True):
        assert ids.tolist() == same.tolist(), text
        assert model.decode(ids) == other.decode(ids)
        assert not {1, 2} & set(ids.tolist())


def test_gpt2_files_give_known_ids(test_data: Path) -> None:
    folder = test_data / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    original = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    original.add_special_tokens(["<|endoftext|>"])
    tokenizer = TokenizerJson(original.to_str().encode())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    text = "a<|endoftext|> b"
    assert 50256 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert re.fullmatch(r"[0-9a-f]{64}", tokenizer.fingerprint)
