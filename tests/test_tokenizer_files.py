"""The tokenizer files of a Hugging Face folder give the ids of the run's tokenizer, and come back as that tokenizer."""

import gzip
import io
import json
import random
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lckv_jax.convert import tokenizer_files as module
from lckv_jax.convert.sentencepiece_json import convert, read_model
from lckv_jax.convert.tokenizer_files import hub_tokenizer_files, import_tokenizer_files
from lckv_jax.data.tokenizer import SentencePiece, find_tokenizer, tokenizer_contents, train_sentencepiece
from lckv_jax.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LOOKALIKES = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "a<s>b</s>",
    "<s></s><unk>",
    "▁",
    "▁▁ ▁",
    "<s",
    "</",
    "[BOS]",
    "<pad>x",
    "\0",
]
ODD = [
    "",
    " ",
    "  two  spaces ",
    "\t\n\r\n x\n",
    " " * 99,
    "x" * 3000,
    "e\u0301\u0302 é",
    "👩‍👩‍👧🏳️‍🌈",
    "日本語 ｶﾞ",
    "\ufeffa",
    "1 23 4567",
]
ALPHABET = [
    *LOOKALIKES,
    *ODD[:5],
    *"abcxyz .-=09é😀日",
    "the",
    " the",
    "ing",
    "self.",
    "ﬁ",
    "Ⅳ",
    "\x01",
    "\ufff0",
    "<sep>",
    "aa",
    "ab",
]


def mixtures(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(ALPHABET, k=chance.randrange(12))) for _ in range(count)]


@cache
def source() -> tuple[str, ...]:
    """Python source, as in the quick start."""
    return tuple(path.read_text() for path in sorted(STDLIB.glob("[ab]*.py"))[:20])


@cache
def quick_start() -> bytes:
    return train_sentencepiece(source(), 1000)


@cache
def trained(**options: object) -> bytes:
    """A sentencepiece model with other settings than ours."""
    model = io.BytesIO()
    lines = [line for text in source()[:2] for line in text.split("\n")]
    size = 400 + 256 * bool(options.get("byte_fallback"))
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    sentencepiece.SentencePieceTrainer.train(
        **{"vocab_size": size, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **options},
        sentence_iterator=iter(lines),
        model_writer=model,
    )
    return model.getvalue()


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def exported(content: bytes, tmp_path: Path) -> Tokenizer:
    """The tokenizer.json made of a sentencepiece model."""
    files = hub_tokenizer_files(put(tmp_path, {"tokenizer.model": content}), context=64)
    assert files["tokenizer.model"] == content
    return as_text(Tokenizer.from_str(files["tokenizer.json"].decode()))


def as_text(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True  # what `split_special_tokens` of tokenizer_config.json sets
    return tokenizer


def check_same(content: bytes, tokenizer: Tokenizer, texts: list[str]) -> None:
    original = SentencePiece(content)
    unknown = tokenizer.token_to_id("<unk>")
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = original.encode(text)
        assert encoding.ids == [original.bos_id, *ids], text
        if unknown not in ids:
            assert tokenizer.decode(encoding.ids) == original.decode(ids)


# ---------------------------------------------------------------- sentencepiece


def test_quick_start_model(tmp_path: Path) -> None:
    tokenizer = exported(quick_start(), tmp_path)
    pieces = [piece.text.replace("▁", " ") for piece in read_model(quick_start()).pieces]
    chance = random.Random(1)
    made = ["".join(chance.choices(pieces, k=20)) for _ in range(500)]
    check_same(quick_start(), tokenizer, [*LOOKALIKES, *ODD, *pieces, *made, *mixtures(1000), *source()])
    for text in (text for text in [*ODD, *mixtures(200), *source()] if "▁" not in text):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return exported(quick_start(), tmp_path_factory.mktemp("quick"))


@given(st.lists(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ALPHABET)).map("".join))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_gives_the_same_ids(quick: Tokenizer, text: str) -> None:
    check_same(quick_start(), quick, [text])


def test_ordinary_text_needs_no_setting(tmp_path: Path) -> None:
    files = hub_tokenizer_files(put(tmp_path, {"tokenizer.model": quick_start()}), context=64)
    (tmp_path / "written.json").write_bytes(files["tokenizer.json"])
    check_same(quick_start(), Tokenizer.from_file(str(tmp_path / "written.json")), [ODD[2], *source()])


def real_texts(test_data: Path) -> list[str]:
    names = ("c4_en/valid.jsonl.gz", "wiki_en/valid.jsonl.gz", "tinystories/stories.jsonl.gz")
    corpora = [test_data / name for name in names if (test_data / name).exists()]
    lines = [line for path in corpora for line in gzip.decompress(path.read_bytes()).splitlines()[:80]]
    return [json.loads(line)["text"][:2000] for line in lines]


def test_llama2_model(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "tokenizers" / "llama2"
    texts = real_texts(test_data)
    if not folder.exists() or len(texts) < 100:
        pytest.skip(f"no {folder} or corpora")
    content = (folder / "tokenizer.model").read_bytes()
    tokenizer = exported(content, tmp_path)
    check_same(content, tokenizer, [*texts, *LOOKALIKES, *ODD, *mixtures(500), *source()])
    known = as_text(Tokenizer.from_file(str(folder / "tokenizer.json")))  # made by others
    same = [encoding.ids for encoding in known.encode_batch(texts)]
    assert same == [encoding.ids for encoding in tokenizer.encode_batch(texts)]


BYTES = {"byte_fallback": True}
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OPTIONS = {
    "defaults": {},  # nmt_nfkc, one space for many, none at the ends
    "plain": PLAIN,
    "nmt_nfkc, all spaces": {"remove_extra_whitespaces": False},
    "identity, few spaces": {"normalization_rule_name": "identity"},
    "nfkc, all spaces": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "folded case": {"normalization_rule_name": "nmt_nfkc_cf", **BYTES},
    "no prefix": {**PLAIN, "add_dummy_prefix": False},
    "pieces with spaces": {**PLAIN, **BYTES, "split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "control symbols": {**PLAIN, "control_symbols": ("<pad>", "a<")},
    "symbols": {**PLAIN, "user_defined_symbols": ("<sep>", "ab")},
    "symbols, no prefix": {**PLAIN, **BYTES, "user_defined_symbols": ("<sep>", "aa"), "add_dummy_prefix": False},
}


@pytest.mark.parametrize(
    ("algorithm", "name"), [*(("bpe", name) for name in OPTIONS), ("char", "defaults"), ("char", "symbols")]
)
def test_models_trained_elsewhere(algorithm: str, name: str, tmp_path: Path) -> None:
    content = trained(model_type=algorithm, **OPTIONS[name])
    check_same(content, exported(content, tmp_path), [*LOOKALIKES, *ODD, *mixtures(800), *source()[1:4]])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("nmt_nfkc, all spaces", "no prefix")])
def test_unigram_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal ids, but for two cuts of a text that score the same: sentencepiece decides by how float32 rounds."""
    content = trained(model_type="unigram", **OPTIONS[name])
    original, tokenizer = SentencePiece(content), exported(content, tmp_path)
    assert "note: tokenizer.model: its tokenizer.json may cut a long text otherwise" in capsys.readouterr().err
    score = [score for _, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    texts = [*LOOKALIKES, *ODD, *mixtures(800), *(line for text in source()[1:3] for line in text.split("\n"))]
    ties = 0
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        begin, *found = encoding.ids
        expected = original.encode(text)
        if found != expected:
            ties += 1
            assert abs(sum(score[id] for id in found) - sum(score[id] for id in expected)) < 1e-3, text
        assert begin == original.bos_id
    assert ties <= 0.02 * len(texts)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_few_characters_and_many_runs(algorithm: str, tmp_path: Path) -> None:
    """Names of which all characters are unknown are the unknown token; merges of runs go from left to right."""
    chance, content = random.Random(0), io.BytesIO()
    words = [chance.choice(["aab" * chance.randrange(1, 4), "a" * chance.randrange(1, 9), "ba"]) for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        **{**PLAIN, "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "model_type": algorithm},
        sentence_iterator=(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)),
        model_writer=content,
    )
    strange = ["<<s>s>", "<</s>/s>a<s>", "<unk><s>", "<s>a</s>b<unk>", "<", "a<<s>>b"]
    runs = [begin + "a" * count + end for count in range(40) for begin in ("", "b", " ") for end in ("", "b", " b")]
    check_same(
        content.getvalue(), exported(content.getvalue(), tmp_path), [*strange, *(runs if algorithm == "bpe" else [])]
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"treat_whitespace_as_suffix": True, "model_type": "bpe"}, "treat_whitespace_as_suffix"),
        ({"model_type": "word"}, "model_type=word"),
    ],
)
def test_an_option_without_counterpart_is_named(options: dict, word: str, tmp_path: Path) -> None:
    folder = put(tmp_path, {"tokenizer.model": trained(**options)})
    with pytest.raises(UserError, match=rf"cannot say what the tokenizer\.model does with {word}; to export"):
        hub_tokenizer_files(folder, context=64)


def test_own_normalisation_rules_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("61 62\t63\n")  # ab becomes c
    content = trained(model_type="bpe", normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    with pytest.raises(UserError, match=r"cannot say .* normalization_rule_name=user_defined;"):
        hub_tokenizer_files(put(tmp_path, {"tokenizer.model": content}), context=64)


def test_a_name_that_pieces_cover_is_refused(tmp_path: Path) -> None:
    content = trained(model_type="unigram", **PLAIN, control_symbols=("ab",), user_defined_symbols=("ab<",))
    with pytest.raises(UserError, match=r"cannot keep text that reads 'ab' from becoming the token"):
        hub_tokenizer_files(put(tmp_path, {"tokenizer.model": content}), context=64)


@pytest.mark.parametrize("part", ["merges", "normalizer", "decoder", "id"])
def test_nothing_is_written_where_ids_differ(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: object) -> dict:
        tree = convert(model)
        if part == "merges":
            tree["model"]["merges"][5], tree["model"]["merges"][80] = tree["model"]["merges"][80], ["e", "r"]
        elif part == "normalizer":
            tree["normalizer"]["normalizers"].pop(0)
        elif part == "decoder":
            tree["decoder"]["decoders"].pop()
        else:
            vocab = tree["model"]["vocab"]
            vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
        return tree

    monkeypatch.setattr(module, "convert", wrong)
    with pytest.raises(UserError, match=r"tokenizer\.model and the tokenizer\.json made of it part at the text"):
        hub_tokenizer_files(put(tmp_path, {"tokenizer.model": quick_start()}), context=64)


# ---------------------------------------------------------------- tokenizer.json and bytes


def byte_level(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(source()[:4], trainer)
    tokenizer.add_special_tokens([*special])
    return tokenizer


def busy() -> dict[str, bytes]:
    """A tokenizer.json that would cut, pad, add an end and drop merges, with settings of another class beside it."""
    tokenizer = byte_level("<s>", "</s>", "<pad>")
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tree = json.loads(tokenizer.to_str())
    tree["model"]["dropout"] = 0.5
    for token in tree["added_tokens"]:
        token["normalized"] = True
    tree["normalizer"] = {"type": "Prepend", "prepend": "_"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_eos_token": True,
        "chat_template": "{{ messages }}",
        "model_max_length": 7,
    }
    return {"tokenizer.json": json.dumps(tree).encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def gpt2(test_data: Path) -> dict[str, bytes]:
    folder = test_data / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return {"tokenizer.json": tokenizer.to_str().encode()}


@pytest.fixture(scope="module", params=["quick start", "unigram", "busy", "gpt2", "bytes"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's tokenizer in `run` and the files made of it in `hub`."""
    contents = {
        "quick start": lambda: {"tokenizer.model": quick_start()},
        "unigram": lambda: {"tokenizer.model": trained()},
        "busy": busy,
        "gpt2": lambda: gpt2(request.getfixturevalue("test_data")),
        "bytes": lambda: tokenizer_contents("bytes"),
    }[request.param]()
    folder = tmp_path_factory.mktemp("kind")
    put(folder / "hub", hub_tokenizer_files(put(folder / "run", contents), context=64))
    return folder


def test_every_kind_gives_its_ids(kind: Path) -> None:
    original = find_tokenizer(kind / "run")
    assert original is not None
    tokenizer = as_text(Tokenizer.from_file(str(kind / "hub" / "tokenizer.json")))
    texts = [*LOOKALIKES, "<|endoftext|>", *ODD, *mixtures(500), *source()[:3]]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert encoding.ids == [original.bos_id, *original.encode(text)], text
        if 0 not in encoding.ids or original.eos_id > 2:  # sentencepiece writes the unknown token as a sign
            assert tokenizer.decode(encoding.ids) == original.decode(encoding.ids)
    assert tokenizer.encode("a", "b").ids == [original.bos_id, *original.encode("a"), *original.encode("b")]


def test_ids_of_bytes_are_their_values(tmp_path: Path) -> None:
    files = hub_tokenizer_files(put(tmp_path, tokenizer_contents("bytes")), context=64)
    tokenizer = as_text(Tokenizer.from_str(files["tokenizer.json"].decode()))
    text = "".join(map(chr, range(1, 3000))) + "😀</s>"
    assert tokenizer.encode(text).ids == [256, *text.encode()]
    assert tokenizer.decode([256, *text.encode(), 257]) == text
    assert [tokenizer.decode([id]) for id in range(128)] == [chr(id) for id in range(128)]


def test_settings_say_how_text_is_read(tmp_path: Path) -> None:
    files = hub_tokenizer_files(put(tmp_path, busy()), context=64)
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


@pytest.mark.parametrize("pad", ["[PAD]", ["<pad>"], 7, {"content": 3}, {"content": None}, None, {}])
def test_a_pad_token_that_is_none_is_left_out(pad: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = busy()
    contents["tokenizer_config.json"] = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}).encode()
    files = hub_tokenizer_files(put(tmp_path, contents), context=64)
    assert "pad_token" not in json.loads(files["tokenizer_config.json"])
    told = "note: tokenizer_config.json: its pad_token"
    assert (told in capsys.readouterr().err) == (pad not in (None, {}, {"content": None}))


def test_a_run_without_tokenizer_has_no_files(tmp_path: Path) -> None:
    assert hub_tokenizer_files(tmp_path, context=64) == {}


def test_a_tokenizer_json_that_makes_its_special_tokens_of_text_is_refused(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((chr(code), -6.0) for code in range(32, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder = put(tmp_path, {"tokenizer.json": tokenizer.to_str().encode()})
    with pytest.raises(UserError, match=r"tokenizer\.json made of it part at the text '<s>', so that no file"):
        hub_tokenizer_files(folder, context=64)


# ---------------------------------------------------------------- in


def test_a_tokenizer_comes_back_as_it_was(kind: Path, tmp_path: Path) -> None:
    back = put(tmp_path, import_tokenizer_files(kind / "hub", 10**6))
    original, same = find_tokenizer(kind / "run"), find_tokenizer(back)
    assert original is not None
    assert same is not None
    assert type(same) is type(original)
    assert same.fingerprint == original.fingerprint
    assert (same.bos_id, same.eos_id, same.vocab_size) == (original.bos_id, original.eos_id, original.vocab_size)
    assert same.encode("a <s> b") == original.encode("a <s> b")


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    put(tmp_path, {"config.json": b"{}", "tokenizer_config.json": b"{}"})
    assert import_tokenizer_files(tmp_path, 1000) == {}


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    files = hub_tokenizer_files(put(tmp_path / "run", {"tokenizer.model": quick_start()}), context=64)
    if name == "tokenizer.json":
        del files["tokenizer.model"]
    files[name] = files[name][: len(files[name]) // 2]
    with pytest.raises(UserError, match=rf"{name} is (not a|JSON)"):
        import_tokenizer_files(put(tmp_path / "hub", files), 1000)


@pytest.mark.parametrize(
    "model", [b"IQ== 0\nIg== 1\n", trained(model_type="bpe", bos_id=-1)], ids=["tiktoken", "no bos"]
)
def test_a_model_that_is_not_for_us_leaves_the_word_to_tokenizer_json(model: bytes, tmp_path: Path) -> None:
    hub = put(tmp_path, {**busy(), "tokenizer.model": model})
    assert import_tokenizer_files(hub, 1000) == busy()
    (hub / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model (is not|has no token)"):
        import_tokenizer_files(hub, 1000)


def with_tokens(tree: dict, *names: str) -> bytes:
    """A tokenizer.json with further tokens added."""
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([*names])
    return tokenizer.to_str().encode()


def test_a_tokenizer_json_that_says_more_goes_before_a_model(tmp_path: Path) -> None:
    files = hub_tokenizer_files(put(tmp_path / "run", {"tokenizer.model": quick_start()}), context=64)
    size = SentencePiece(quick_start()).vocab_size
    assert list(import_tokenizer_files(put(tmp_path / "same", files), size + 9)) == ["tokenizer.model"]
    more = files | {"tokenizer.json": with_tokens(json.loads(files["tokenizer.json"]), "<|im_end|>")}
    kept = import_tokenizer_files(put(tmp_path / "more", more), size + 1)
    assert kept == {name: more[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    assert list(import_tokenizer_files(tmp_path / "more", size)) == ["tokenizer.model"]  # no embedding for it
    ends = files | {"tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "<unk>"}'}
    back = put(tmp_path / "back", import_tokenizer_files(put(tmp_path / "ends", ends), size))
    assert find_tokenizer(back).eos_id == 0
    del ends["tokenizer_config.json"]
    assert list(import_tokenizer_files(put(tmp_path / "unnamed", ends), size)) == ["tokenizer.model"]


def test_llama2_with_an_added_token(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "tokenizers" / "llama2"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < 32000]
    files = {"tokenizer.model": (folder / "tokenizer.model").read_bytes()}
    plain = put(tmp_path / "plain", files | {"tokenizer.json": json.dumps(tree).encode()})
    assert import_tokenizer_files(plain, 32000) == import_tokenizer_files(plain, 32064) == files
    added = put(tmp_path / "added", files | {"tokenizer.json": with_tokens(tree, "<|im_start|>")})
    assert import_tokenizer_files(added, 32000) == files
    assert list(import_tokenizer_files(added, 32064)) == ["tokenizer.json"]


def test_a_tokenizer_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path, busy())
    (folder / "tokenizer.model").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read: No such file"):
        import_tokenizer_files(folder, 1000)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.model is a folder"):
        import_tokenizer_files(folder, 1000)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").rmdir()
    (folder / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read: No such file"):
        import_tokenizer_files(folder, 1000)
