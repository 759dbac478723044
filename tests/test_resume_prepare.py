"""A preparation that is killed goes on, whenever it was killed, and leaves the same bytes as an undisturbed one."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data import prepare as prepare_module
from lckv_jax.data import shards, status_line
from lckv_jax.data.manifest import load_manifest, load_progress
from lckv_jax.data.prepare import prepare
from lckv_jax.data.tokenizer import train_sentencepiece
from lckv_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"{a}{b}" for a in ("to", "ma", "sen", "kri", "vo") for b in ("ra", "lim", "gus", "ne")]
VOCAB = 300


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard, several shards a split, many batches, each saved."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 256)
    monkeypatch.setattr(shards, "SHARD_BLOCKS", 3)
    monkeypatch.setattr(prepare_module, "_ENCODE_CHARS", 1200)
    monkeypatch.setattr(prepare_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is for power cuts, and takes milliseconds


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two weighted sources of fifteen small documents, a fifth held out."""
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for number in range(15):
            rng = random.Random(f"{source}{number}")
            text = "".join(rng.choice(WORDS) + rng.choice("  \n") for _ in range(rng.randint(1, 150)))
            (tmp_path / source / f"{source}{number}.txt").write_text(text)
    model = tmp_path / "given.model"
    model.write_bytes(train_sentencepiece(["".join(WORDS)] * 9, 290))
    sources = tuple(SourceConfig(path=f"{tmp_path}/{name}/*.txt", weight=0.5) for name in "ab")
    return DataConfig(
        sources=sources, folder=str(tmp_path / "ready"), validation_fraction=0.2, tokenizer=str(model), seq_len=16
    )


def quiet(line: str) -> None:
    pass


def at(data: DataConfig, folder: str) -> DataConfig:
    return data.model_copy(update={"folder": str(Path(data.folder).with_name(folder))})


def contents(data: DataConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(data.folder).iterdir()}


def kill_at(number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """From now on the write number `number` to disk happens by half; the list that comes back collects all writes."""
    fsync, replace, write = os.fsync, os.replace, shards.ShardWriter._write
    done: list[str] = []

    def step(name: str) -> bool:
        done.append(name)
        return len(done) - 1 == number

    def half_write(self, content, durably=False):
        if step("write"):
            write(self, content[: len(content) // 2])
            raise Killed
        write(self, content, durably)

    def half_fsync(descriptor):
        if step("fsync"):
            raise Killed
        fsync(descriptor)

    def half_replace(source, target):
        if step("replace"):
            raise Killed
        replace(source, target)

    patch.setattr(shards.ShardWriter, "_write", half_write)
    patch.setattr(os, "fsync", half_fsync)
    patch.setattr(os, "replace", half_replace)
    return done


def prepare_until(number: int, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with monkeypatch.context() as patch:
        done = kill_at(number, patch)
        if number < 0:
            prepare(data, VOCAB, quiet)
        else:
            with pytest.raises(Killed):
                prepare(data, VOCAB, quiet)
    return done


def test_killed_at_any_write(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = len(prepare_until(-1, data, monkeypatch))
    expected = contents(data)
    assert writes > 100
    assert len(load_manifest(data.folder).components) == 2
    resumed = 0
    for number in range(0, writes, 3):
        killed = at(data, f"killed{number}")
        prepare_until(number, killed, monkeypatch)
        with pytest.raises(UserError, match=r"holds (no prepared data|a preparation that was stopped)"):
            load_manifest(killed.folder)
        lines: list[str] = []
        prepare(killed, VOCAB, lines.append)
        assert contents(killed) == expected, number
        assert not any("starting over" in line for line in lines)
        resumed += any(line.startswith("resuming after") for line in lines)
    assert resumed > writes / 3 * 0.8


def test_killed_again_and_again(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt gets a few writes further than it needs to go on at all."""
    for kills in range(60):  # noqa: B007
        with monkeypatch.context() as patch:
            kill_at(30, patch)
            try:
                prepare(data, VOCAB, quiet)
                break
            except Killed:
                continue
    else:
        pytest.fail("it gets nowhere")
    assert kills > 5
    clean = at(data, "clean")
    prepare(clean, VOCAB, quiet)
    assert contents(data) == contents(clean)


def test_a_real_kill(data: DataConfig) -> None:
    code = f"""
import sys, time
from lckv_jax.config import DataConfig
from lckv_jax.data import prepare, shards, tokenizer
shards.BLOCK_BYTES, shards.SHARD_BLOCKS, prepare._ENCODE_CHARS, prepare._SAVE_SECONDS = 256, 3, 1200, 0
encode_batch = tokenizer.SentencePiece.encode_batch
tokenizer.SentencePiece.encode_batch = lambda self, texts: [time.sleep(0.1), encode_batch(self, texts)][1]
prepare.prepare(DataConfig.model_validate_json(sys.argv[1]), {VOCAB})
"""
    child = subprocess.Popen([sys.executable, "-c", code, data.model_dump_json()], cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (progress := load_progress(data.folder)) or progress.documents < 8:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is preparing"):
        prepare(data, VOCAB, quiet)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    lines: list[str] = []
    prepare(data, VOCAB, lines.append)
    assert any(line.startswith("resuming after") for line in lines)
    clean = at(data, "clean")
    prepare(clean, VOCAB, quiet)
    assert contents(data) == contents(clean)


@pytest.fixture
def stopped(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Half done."""
    prepare_until(70, data, monkeypatch)
    progress = load_progress(data.folder)
    assert progress is not None and 5 < progress.documents < 25
    return data


@pytest.mark.parametrize(
    ("change", "vocab_size", "message"),
    [
        ({}, 301, r"model\.vocab_size=300, but the config says 301"),
        ({"validation_fraction": 0.3}, VOCAB, r"data\.validation_fraction=0\.2, but the config says 0\.3"),
        ({"tokenizer": "train"}, VOCAB, r'data\.tokenizer=".*given\.model", but the config says "train"'),
    ],
)
def test_other_settings_are_refused(change: dict, vocab_size: int, message: str, stopped: DataConfig) -> None:
    before = contents(stopped)
    with pytest.raises(UserError, match="a preparation that was stopped, with " + message + "; choose another"):
        prepare(stopped.model_copy(update=change), vocab_size, quiet)
    assert contents(stopped) == before


def without_weights(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"sources": tuple(SourceConfig(path=source.path) for source in data.sources)})


def test_lost_weights_are_refused_until_it_is_done(stopped: DataConfig) -> None:
    with pytest.raises(UserError, match="with weights, but the config gives none; give them back until it is done"):
        prepare(without_weights(stopped), VOCAB, quiet)
    manifest = prepare(stopped, VOCAB, quiet)
    assert prepare(without_weights(stopped), VOCAB, quiet) == manifest


def shard_being_written(data: DataConfig) -> tuple[Path, int]:
    """A file that is saved beyond its last full block, and where that block ends."""
    progress = load_progress(data.folder)
    assert progress is not None
    states = {"train-0": progress.components[0], "train-1": progress.components[1], "valid": progress.valid}
    name, state = next((name, state) for name, state in states.items() if state.rest[0] > 2)
    return Path(data.folder) / f"{name}-{len(state.shards):05d}.bin", len(state.blocks) * 256


def test_bytes_that_were_never_saved_are_cut_off(stopped: DataConfig) -> None:
    """As after a power cut that kept the length of a file and not its bytes."""
    shard, _ = shard_being_written(stopped)
    with shard.open("ab") as file:
        file.write(b"?" * 2000)
    shard.with_name("train-0-00077.bin").write_bytes(b"of a longer corpus")
    lines: list[str] = []
    prepare(stopped, VOCAB, lines.append)
    assert any(line.startswith("resuming after") for line in lines)
    clean = at(stopped, "clean")
    prepare(clean, VOCAB, quiet)
    assert contents(stopped) == contents(clean)


@pytest.mark.parametrize("change", ["done", "later", "more", "shard", "shorter"])
def test_what_changed_in_between_starts_over(change: str, stopped: DataConfig, tmp_path: Path) -> None:
    """A text that is done, the number of texts, bytes that are saved; a later text is simply read as it is."""
    first, last = (Path(source.path).parent / name for source, name in zip(stopped.sources, ("a0.txt", "b9.txt")))
    if change in ("done", "later"):
        path = first if change == "done" else last
        path.write_text(path.read_text() + "!")
    elif change == "more":
        last.with_name("c.txt").write_text("tora")
    else:
        shard, start = shard_being_written(stopped)
        content = shard.read_bytes()
        shard.write_bytes(content[:start] + (b"xy" + content[start + 2 :] if change == "shard" else b""))
    lines: list[str] = []
    prepare(stopped, VOCAB, lines.append)
    assert any("starting over" in line for line in lines) == (change != "later")
    clean = at(stopped, "clean")
    prepare(clean, VOCAB, quiet)
    assert contents(stopped) == contents(clean)


def test_full_disk_keeps_what_is_done(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = shards.ShardWriter._write, 40

    def full(self, content, durably=False):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, content, durably)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_write", full)
        with pytest.raises(UserError, match=r"ready cannot be written: No space left .*the same command goes on"):
            prepare(data, VOCAB, quiet)
    lines: list[str] = []
    prepare(data, VOCAB, lines.append)
    assert any(line.startswith("resuming after") for line in lines)
    clean = at(data, "clean")
    prepare(clean, VOCAB, quiet)
    assert contents(data) == contents(clean)


def test_progress_is_told(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_line, "EVERY_SECONDS", 0.0)
    lines: list[str] = []
    manifest = prepare(data, VOCAB, lines.append)
    told = [line for line in lines if line.endswith("% done")]
    assert len(told) > 5
    total = manifest.train.tokens + manifest.valid.tokens
    assert told[-1].startswith(f"tokenised 30 documents, {total:,} tokens, 0 MB, ")
    assert told[-1].endswith("tokens/s, 100% done")


def test_progress_is_live_on_a_terminal(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    lines: list[str] = []
    prepare(data, VOCAB, lines.append)
    assert "tokenised 30 documents" in capsys.readouterr().out
    assert not any("% done" in line for line in lines)
