"""The command line: every mistake is one sentence and exit code 2, and nothing is lost."""

import sys
import types
from unittest.mock import Mock

import pytest

from lckv_jax.__main__ import main
from lckv_jax.errors import Stopped, UserError


def run(capsys, *arguments):
    """Exit code and the error line of a command."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def refuses(capsys, *arguments):
    code, error = run(capsys, *arguments)
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_sise=4", ["model.hidden_sise", "did you mean 'hidden_size'"]),
        ("modle.hidden_size=4", ["modle", "did you mean 'model'"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("model.sharing=[0, 1, 2]", ["model.sharing", "3 entries", "4 layers", "layer 3 has no entry"]),
        ("model.sharing=0_1_2_4", ["layer 3 reads layer 4", "0 to 3"]),
        ("model.sharing=lkcv", ["did you mean"]),
        ("model.num_heads=3", ["num_heads=3", "num_kv_heads=2"]),
        ("data.sources=[no/such/*.txt]", ["no/such/*.txt"]),
        ("data.tokenizer=none.model", ["none.model"]),
        ("mesh.data=3", ["data=3", "1 device", "mesh.data=1"]),
        ("optimizer.warmup_steps=6", ["warmup_steps=6", "train.steps=6"]),
        ("out=gs://bucket/run", ["gs://bucket/run", "bucket"]),
        ("seed=4294967296", ["seed", "4294967296"]),
        ("model.sharing=true", ["model.sharing"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_a_wrong_setting_is_one_sentence(tiny_config, tmp_path, capsys, override, words):
    error = refuses(capsys, "train", tiny_config, override)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unquoted_map_in_the_file(tiny_config, capsys):
    tiny_config.write_text(tiny_config.read_text().replace('"0_2_2_3"', "0_2_2_3"))
    error = refuses(capsys, "describe", tiny_config)
    assert "model.sharing" in error and "quote it" in error


def test_a_missing_or_broken_config(tmp_path, capsys):
    assert "none.yaml" in refuses(capsys, "train", tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "mapping" in refuses(capsys, "train", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "not valid YAML" in refuses(capsys, "train", tmp_path / "broken.yaml")


def test_a_text_that_cannot_be_used(tiny_config, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in refuses(capsys, "prepare", tiny_config, f"data.sources=[{tmp_path}/empty.txt]")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    error = refuses(capsys, "prepare", tiny_config, f"data.sources=[{tmp_path}/latin.txt]")
    assert "latin.txt" in error and "UTF-8" in error
    (tmp_path / "folder.txt").mkdir()
    assert "folder.txt" in refuses(capsys, "prepare", tiny_config, f"data.sources=[{tmp_path}/folder.txt]")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_corpus_shorter_than_a_row(tiny_config, tmp_path, capsys):
    error = refuses(capsys, "train", tiny_config, "data.seq_len=10000000")
    assert "10000000" in error.replace(",", "")
    assert not (tmp_path / "run").exists()


def test_data_made_with_other_settings(tiny_config, tmp_path, capsys):
    assert main(["prepare", str(tiny_config)]) == 0
    before = (tmp_path / "data" / "manifest.json").read_bytes()
    capsys.readouterr()
    error = refuses(capsys, "train", tiny_config, "data.validation_fraction=0.3")
    assert "data.validation_fraction=0.2" in error and "0.3" in error
    error = refuses(capsys, "train", tiny_config, "model.vocab_size=600")
    assert "model.vocab_size=512" in error and "600" in error
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before


def test_a_changed_shard_stops_the_run(tiny_config, tmp_path, capsys):
    assert main(["prepare", str(tiny_config)]) == 0
    shard = next((tmp_path / "data").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    error = refuses(capsys, "train", tiny_config)
    assert shard.name in error and "block" in error


def test_a_changed_tokenizer_stops_the_run(tiny_config, tmp_path, capsys):
    assert main(["prepare", str(tiny_config)]) == 0
    capsys.readouterr()
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"garbage")
    assert "tokenizer.model" in refuses(capsys, "train", tiny_config)
    (tmp_path / "data" / "tokenizer.model").unlink()
    assert "tokenizer.model" in refuses(capsys, "train", tiny_config)


def test_a_tokenizer_larger_than_the_vocabulary(tiny_config, tmp_path, capsys):
    assert main(["prepare", str(tiny_config)]) == 0
    capsys.readouterr()
    model = tmp_path / "data" / "tokenizer.model"
    overrides = [f"data.tokenizer={model}", "model.vocab_size=400", f"data.folder={tmp_path / 'other'}"]
    error = refuses(capsys, "train", tiny_config, *overrides)
    assert "512" in error and "400" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["xyz"], ["'xyz'", "(commands: train, prepare, describe"]),
        (
            ["train"],
            ["train: ", "required: CONFIG", "write python -m lckv_jax train [--coordinator", "CONFIG [a.b=c ...]"],
        ),
        (["evaluate"], ["required: CHECKPOINT"]),
        (["describe", "x.yaml", "--polt"], ["describe: ", "--polt", "[--plot [FILE]]"]),
        (["train", "x.yaml", "--verify"], ["train: ", "--verify"]),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys, arguments, words):
    error = refuses(capsys, *arguments)
    assert all(word in error for word in words), error


def test_help_lists_every_command(capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert main(arguments) == code
        printed = capsys.readouterr().out
        assert all(f"  {command}  " in printed for command in ("train", "prepare", "describe", "evaluate"))
    with pytest.raises(SystemExit) as stop:
        main(["describe", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("CONFIG", "a.b=c", "--compile", "--plot [FILE]"))


def test_flags_and_overrides_in_any_order(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["describe", str(tiny_config), "model.sharing=cla", "--plot", "a.svg", "data.seq_len=48"]) == 0
    printed = capsys.readouterr().out
    assert "sharing 0_0_2_2\n" in printed and "at sequence length 48 " in printed
    assert main(["describe", "--plot=b.png", str(tiny_config)]) == 0
    assert main(["describe", str(tiny_config), "--plot"]) == 0
    assert {path.name for path in tmp_path.glob("*.*g")} == {"a.svg", "b.png", "tiny-map.png"}
    assert "--plot train.steps=9" in refuses(capsys, "describe", tiny_config, "--plot", "train.steps=9")


def test_how_a_command_ends_is_the_exit_code(tiny_config, capsys, monkeypatch):
    for exception, code in ((KeyboardInterrupt, 130), (Stopped("saved"), 42), (UserError("mend it"), 2)):
        monkeypatch.setattr("lckv_jax.train.loop.train", Mock(side_effect=exception))
        assert main(["train", str(tiny_config)]) == code
        told = capsys.readouterr().err
        assert any(word in told for word in ("the same command goes on", "saved", "error: mend it"))


def test_evaluate_and_verify_are_handed_on(tiny_config, tmp_path, capsys, monkeypatch):
    module, called = types.ModuleType("lckv_jax.evaluate.perplexity"), []
    module.evaluate = lambda *arguments: called.append(arguments)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["evaluate", "runs/x", "batch_size=4"]) == 0
    monkeypatch.setattr("lckv_jax.data.prepare.verify", lambda *arguments: called.append(arguments), raising=False)
    assert main(["prepare", str(tiny_config), "--verify"]) == 0
    assert called == [("runs/x", ["batch_size=4"]), (str(tmp_path / "data"), print)]
    assert not (tmp_path / "data").exists()
