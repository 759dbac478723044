"""`AutoTokenizer` of an exported folder gives the run's ids, also where neither sentencepiece nor protobuf is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, needs_torch
from test_tokenizer_files import (
    LOOKALIKES,
    ODD,
    busy,
    gpt2,
    mixtures,
    put,
    quick_start,
    real_texts,
    source,
    trained,
)

from lckv_jax.convert.tokenizer_files import hub_tokenizer_files, import_tokenizer_files
from lckv_jax.data.tokenizer import find_tokenizer, tokenizer_contents

needs_torch()

# What a user's program does, on the files alone: from the folder, and from the folder that it saves itself.
PROGRAM = """
import json, sys
from pathlib import Path
sys.modules.update(sentencepiece=None, google=None)
from transformers import AutoTokenizer
folder = Path(sys.argv[1])
texts, answers = json.loads((folder / "texts.json").read_text()), {}
for case in sorted(path.parent for path in folder.glob("*/tokenizer.json")):
    tokenizer = AutoTokenizer.from_pretrained(case)
    tokenizer.save_pretrained(folder / "again" / case.name)
    for name, found in (("first", tokenizer), ("again", AutoTokenizer.from_pretrained(folder / "again" / case.name))):
        batch = found(texts)
        answers[f"{case.name} {name}"] = {
            "keys": sorted(batch),
            "ids": batch["input_ids"],
            "plain": found(texts, add_special_tokens=False)["input_ids"],
            "single": [found.encode(text) for text in texts[:20]],
            "texts": found.batch_decode(batch["input_ids"], skip_special_tokens=True),
            "ends": [found.bos_token_id, found.eos_token_id],
            "sizes": [len(found), found.model_max_length],
            "template": found.chat_template,
            "side": found.padding_side,
        }
(folder / "answers.json").write_text(json.dumps(answers))
"""
CASES = ["quick-start", "quick-start-llama", "llama2", "llama2-json", "unigram", "char", "gpt2", "busy", "bytes"]


DATA = Path(os.environ.get("LCKV_TEST_DATA", ROOT.parent / "shared" / "data"))
REAL = ("llama2", "llama2-json", "gpt2")


def contents(case: str, data: Path) -> dict[str, bytes]:
    llama2 = data / "tokenizers" / "llama2"
    return {
        "llama2": lambda: {"tokenizer.model": (llama2 / "tokenizer.model").read_bytes()},
        "llama2-json": lambda: {"tokenizer.json": (llama2 / "tokenizer.json").read_bytes()},
        "unigram": lambda: {"tokenizer.model": trained()},
        "char": lambda: {"tokenizer.model": trained(model_type="char")},
        "gpt2": lambda: gpt2(data),
        "busy": busy,
        "bytes": lambda: tokenizer_contents("bytes"),
    }.get(case, lambda: {"tokenizer.model": quick_start()})()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents where there are some, and texts at which two tokenizers could part; short ones first."""
    return [*LOOKALIKES, *ODD, *mixtures(180, seed=3), *(text[:800] for text in real_texts(DATA)), source()[0]]


@pytest.fixture(scope="module")
def answers(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all cases, run and exported, and what the program finds in each."""
    folder = tmp_path_factory.mktemp("auto")
    for case in CASES:
        if case in REAL and not (DATA / "tokenizers").is_dir():
            continue
        run = put(folder / "runs" / case, contents(case, DATA))
        exported = put(folder / case, hub_tokenizer_files(run, context=99))
        if case.startswith("quick-start"):  # the class that AutoTokenizer takes depends on the model
            kind = "llama" if case.endswith("llama") else "lckv"
            (exported / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 1000}))
    (folder / "texts.json").write_text(json.dumps(texts))
    environment = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "answers.json").read_text())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    if request.param in REAL and not (DATA / "tokenizers").is_dir():
        pytest.skip("real data absent: set LCKV_TEST_DATA to its folder")
    return request.param


@pytest.mark.parametrize("time", ["first", "again"])
def test_ids_are_those_of_the_run(case: str, time: str, answers: tuple[Path, dict[str, Any]], texts: list[str]) -> None:
    folder, found = answers[0], answers[1][f"{case} {time}"]
    tokenizer = find_tokenizer(folder / "runs" / case)
    assert tokenizer is not None
    assert len(texts) > 200
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert found["plain"] == expected
    assert found["ids"] == [[tokenizer.bos_id, *ids] for ids in expected]
    assert found["single"] == found["ids"][:20]
    assert found["ends"] == [tokenizer.bos_id, tokenizer.eos_id]
    assert found["sizes"] == [tokenizer.vocab_size, 99]
    assert found["keys"] == ["attention_mask", "input_ids"]
    assert found["template"] is None
    assert found["side"] == "left"


def test_texts_come_back(case: str, answers: tuple[Path, dict[str, Any]], texts: list[str]) -> None:
    folder, found = answers[0], answers[1][f"{case} first"]
    tokenizer = find_tokenizer(folder / "runs" / case)
    assert tokenizer is not None
    known = [i for i, ids in enumerate(found["plain"]) if 0 not in ids or case in ("gpt2", "busy", "bytes")]
    assert [found["texts"][i] for i in known] == [tokenizer.decode(found["plain"][i]) for i in known]
    if case in ("quick-start", "llama2", "llama2-json", "gpt2", "bytes"):  # nothing is normalised
        spaced = ("quick-start", "llama2", "llama2-json")
        assert found["texts"] == [text.replace("▁", " ") if case in spaced else text for text in texts]


def test_what_transformers_saves_is_imported_again(case: str, answers: tuple[Path, dict[str, Any]]) -> None:
    folder = answers[0]
    run, back = find_tokenizer(folder / "runs" / case), import_tokenizer_files(folder / "again" / case, 10**6)
    saved = find_tokenizer(put(folder / "back" / case, back))
    assert run is not None
    assert saved is not None
    assert (saved.bos_id, saved.eos_id, saved.vocab_size) == (run.bos_id, run.eos_id, run.vocab_size)
    assert [saved.encode(text) for text in ("a <s> b", source()[1])] == [
        run.encode(t) for t in ("a <s> b", source()[1])
    ]
    if case in ("gpt2", "busy", "bytes"):
        assert saved.fingerprint == run.fingerprint
