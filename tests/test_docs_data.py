"""docs/data.md, as written: its commands and its YAML run, on small texts where it says PATH/TO."""

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from tfds_folder import write_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lckv_jax.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
WORDS = [f"{a}{b}" for a in ("to", "ma", "sen", "kri", "vo") for b in ("ra", "lim", "gus", "ne")]
SMALL = "model.vocab_size=300"


def text(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with everything that the page names."""
    working = tmp_path_factory.mktemp("page")
    (working / "configs").symlink_to(ROOT / "configs")
    place = working / "PATH" / "TO"
    for name in ("books/old", "web", "posts"):
        (place / name).mkdir(parents=True)
    for number in range(200):
        (place / "books" / "old" / f"{number}.txt").write_text(text(number))
    lines = "".join(json.dumps({"text": text(number)}) + "\n" for number in range(200, 400))
    (place / "web" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(
        pyarrow.table({"body": [text(number) for number in range(400, 600)]}), place / "posts" / "a.parquet"
    )
    alphabet = {character: id for id, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(place / "tokenizer.json"))
    write_folder(place, {"train": [text(number) for number in range(600, 800)]})
    return working


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[5].partition("=")[2])
def test_command_runs(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert command[:3] == ["python", "-m", "lckv_jax"]
    assert main([*command[3:], SMALL]) == 0
    assert re.search(r"[\d,]{4,} training and [\d,]{3,} validation tokens", capsys.readouterr().out)
    kept = {path.name for path in Path(command[5].partition("=")[2]).glob("tokenizer*")}
    given = [word.partition("=")[2] for word in command if word.startswith("data.tokenizer=")]
    assert kept == {{"bytes": "tokenizer.bytes", "PATH/TO/tokenizer.json": "tokenizer.json"}[given[0]]
                    if given else "tokenizer.model"}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: re.findall(r"folder: (\S+)", settings)[0])
def test_settings_prepare(
    settings: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    config["data"] = yaml.safe_load(settings)["data"]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["prepare", "own.yaml", SMALL]) == 0
    assert "validation tokens" in capsys.readouterr().out
    assert (folder / config["data"]["folder"] / "manifest.json").exists()


def test_the_page_is_about_all_of_it() -> None:
    assert len(COMMANDS) >= 5
    assert len(SETTINGS) >= 3
