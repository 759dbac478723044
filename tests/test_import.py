"""`import`: a Hugging Face folder becomes a run folder that every command opens, whole or not at all."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_hub import SMALL, assert_same_tensors, small_tensors, write_folder, write_sharded

from lckv_jax import checkpoint
from lckv_jax.__main__ import main
from lckv_jax.config import load_config
from lckv_jax.convert import import_hub as import_module
from lckv_jax.convert.hub import load_hub, to_hub
from lckv_jax.convert.import_hub import import_hub
from lckv_jax.convert.reshare import reshare
from lckv_jax.data.tokenizer import train_sentencepiece
from lckv_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PLAIN = SMALL | {"model_type": "llama", "vocab_size": 400, "max_position_embeddings": 64}
PLAIN.pop("layer_types")


def plain_tensors(dtype=np.float32, **changes):
    return small_tensors(PLAIN | {"layer_types": "0_1_2"} | changes, dtype)


@pytest.fixture(scope="session")
def tokenizer_model():
    return train_sentencepiece([Path(subprocess.__file__).read_text(encoding="utf-8")], 360)


@pytest.fixture
def folder(tmp_path, tokenizer_model):
    """A llama folder of 3 layers and 400 embeddings with a tokenizer of 360 ids."""
    folder = write_folder(tmp_path / "hf", PLAIN, plain_tensors())
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    return folder


def run(capsys, *arguments):
    code = main(["import", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def refuses(capsys, message, *arguments):
    """One sentence, exit code 2, and nothing that was not there before."""
    out = Path(arguments[1])
    before = sorted(out.parent.rglob("*"))
    code, _, error = run(capsys, *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error, error
    assert sorted(out.parent.rglob("*")) == before
    return error


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_parameters_come_back_bit_for_bit(tmp_path, dtype, sharded):
    tensors = plain_tensors(dtype)
    (write_sharded if sharded else write_folder)(tmp_path / "hf", PLAIN, tensors)
    import_hub(str(tmp_path / "hf"), str(tmp_path / "a" / "out"))
    shutil.move(tmp_path / "a" / "out", tmp_path / "elsewhere")  # no path in it matters
    for given in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "checkpoints" / "0"):
        params, config, tokenizer = checkpoint.load(given)
        assert_same_tensors(to_hub(params, config.model), tensors)
        assert config.model == load_hub(tmp_path / "hf")[1] and tokenizer is None
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["checkpoints", "config.json"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == []


@pytest.mark.parametrize("case", ["p03_lckv_w2", "p08_yoco_window", "p10_pizza_bottom_tied"])
def test_official_checkpoints(golden, tmp_path, case):
    import_hub(str(golden / case), str(tmp_path / "out"))
    params, config, _ = checkpoint.load(tmp_path / "out")
    assert_same_tensors(to_hub(params, config.model), load_file(golden / case / "model.safetensors"))
    assert config.model == load_hub(golden / case)[1]


def test_float64_is_told_where_it_cannot_be_kept(tmp_path, capsys):
    write_folder(tmp_path / "hf", PLAIN, plain_tensors(np.float64))
    code, told, _ = run(capsys, tmp_path / "hf", tmp_path / "out")
    assert code == 0 and "wk: float64 in the files, written as float32" in told
    params = checkpoint.load(tmp_path / "out")[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_import_with_another_map(folder, tmp_path, capsys):
    code, told, _ = run(capsys, folder, tmp_path / "out", "--sharing", "0_0_2s", "--how", "own", "--num-kv-heads", "1")
    assert code == 0
    assert "map 0_1_2 -> 0_0_2s, K/V projections copied, dropped from layer 1, 2 K/V heads averaged to 1" in told
    got, config, _ = checkpoint.load(tmp_path / "out")
    want, model = reshare(*load_hub(folder), "0_0_2s", "own", 1)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert config.model == model


def test_what_is_read_dropped_and_written_is_told_and_how_to_go_on(tmp_path, tokenizer_model, capsys):
    config = SMALL | {"vocab_size": 400}
    surplus = {"model.layers.1.self_attn.k_proj.weight": np.ones((16, 6), np.float32)}
    folder = write_folder(tmp_path / "hf", config, small_tensors(config) | surplus)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    code, told, _ = run(capsys, folder, tmp_path / "out", "--sharing", "2_2_2")
    out = tmp_path / "out"
    assert code == 0
    assert told.splitlines() == [
        "the tokenizer has 360 ids, the model 400: the others are never used",
        "left out model.layers.1.self_attn.k_proj.weight: the map 0_2_2 has no K/V projections in layer 1",
        f"read {folder}: map 0_2_2, 6,756 parameters in float32",
        "map 0_2_2 -> 2_2_2, K/V projections averaged over the layers that read them",
        f"wrote {out}: map 2_2_2, 6,564 parameters in float32, read back and compared",
        f'measure it: python -m lckv_jax evaluate {out} "files=[texts/*.txt]"',
        f"go on training: python -m lckv_jax train {out}/config.json out=runs/new data.folder=data/new "
        '"data.sources=[texts/*.txt]" train.steps=1000',
    ]


def test_windows_of_the_official_flash_scripts(tmp_path, capsys):
    config = SMALL | {"layer_types": "0s_2_2", "sliding_window": 5}
    write_folder(tmp_path / "hf", config, small_tensors(config))
    for answer, window in (("yes", 5), ("no", 6)):
        assert run(capsys, tmp_path / "hf", tmp_path / answer, "--window-includes-self", answer)[0] == 0
        assert checkpoint.load(tmp_path / answer)[1].model.window == window
    write_folder(tmp_path / "hf", SMALL, small_tensors(SMALL))
    out = tmp_path / "out"
    refuses(capsys, "no layer of its map 0_2_2 has a sliding window", tmp_path / "hf", out, "--window-includes-self=no")


def test_official_settings_are_kept(tmp_path):
    config = SMALL | {"force_nodiag": True, "forward_passes": 3, "backward_passes": 4}
    import_hub(str(write_folder(tmp_path / "hf", config, small_tensors(config))), str(tmp_path / "out"))
    model = checkpoint.load(tmp_path / "out")[1].model
    assert (model.strict_everywhere, model.no_grad_passes, model.grad_passes, model.norm_eps) == (True, 3, 4, 1e-6)


def test_evaluate_and_training_go_on_from_it(folder, tmp_path, monkeypatch, capsys):
    """The two commands that it prints, run."""
    monkeypatch.chdir(tmp_path)
    assert main(["import", "hf", "models/the small"]) == 0
    commands = [line.split("lckv_jax ")[1] for line in capsys.readouterr().out.splitlines() if "-m lckv_jax" in line]
    (tmp_path / "texts").mkdir()
    for number, name in enumerate(("README.md", "CONTRIBUTING.md", "docs/training.md")):
        shutil.copy(ROOT / name, tmp_path / "texts" / f"{number}.txt")
    evaluate, train = map(shlex.split, commands)
    assert main([*evaluate, "max_tokens=500"]) == 0
    short = ["train.steps=2", "optimizer.warmup_steps=1", "train.eval_batches=1", "data.validation_fraction=0.4"]
    short += ["data.batch_size=2", "model.remat=false", "model.sharing=0_2_2"]
    assert main([*train, *short]) == 0
    told = capsys.readouterr().out
    assert "starting from models/the small (step 0): map 0_1_2 -> 0_2_2, K/V projections averaged" in told
    assert "models/the small has no" not in told
    assert (tmp_path / "data" / "new" / "manifest.json").exists()
    assert len([record for record in read_metrics(Path("runs/new/metrics.jsonl")) if "loss" in record]) == 2
    assert main(["train", "models/the small/config.json", *short]) == 2
    assert (
        "models/the small holds an imported model, not a run to go on with; choose another" in capsys.readouterr().err
    )


def test_without_a_tokenizer_none_is_trained_in_its_place(folder, tmp_path, capsys):
    (folder / "tokenizer.model").unlink()
    code, told, _ = run(capsys, folder, tmp_path / "out")
    assert code == 0 and "python -m lckv_jax" not in told
    assert "has no tokenizer, so that no text can be evaluated or trained on: save it beside the weights, " in told
    assert f"tokenizer.save_pretrained('{folder}'), and import again" in told
    config = load_config(tmp_path / "out" / "config.json", [f"out={tmp_path / 'new'}"])
    assert config.data.tokenizer == f"{tmp_path}/out/tokenizer.model"
    assert main(["train", str(tmp_path / "out" / "config.json"), f"out={tmp_path / 'new'}"]) == 2
    assert "tokenizer.model cannot be read" in capsys.readouterr().err


def test_proposed_rows_are_at_most_4096(tmp_path):
    for context, seq_len in ((64, 64), (131072, 4096), (None, 2048)):
        config = {**PLAIN, "max_position_embeddings": context}
        import_hub(str(write_folder(tmp_path / "hf", config, plain_tensors())), str(tmp_path / str(context)))
        assert checkpoint.load(tmp_path / str(context))[1].data.seq_len == seq_len


# ---------------------------------------------------------------- refusals


def test_folders_that_cannot_be_imported(folder, tmp_path, capsys):
    out, path = tmp_path / "out", folder / "model.safetensors"
    refuses(capsys, "there is no such file", tmp_path / "nowhere", out)
    refuses(capsys, "vocab_size 359", _with_config(folder, vocab_size=359), out)
    refuses(capsys, "model_type is 'mistral'", _with_config(folder, model_type="mistral"), out)
    refuses(capsys, "has shape", _with_config(folder, hidden_size=8), out)
    refuses(capsys, "lacks model.layers.3", _with_config(folder, num_hidden_layers=4), out)
    _with_config(folder)
    refuses(capsys, "the map has 2 entries", folder, out, "--sharing", "0_0")
    refuses(capsys, "2 K/V heads cannot be merged to 4", folder, out, "--num-kv-heads", "4")
    refuses(capsys, "invalid choice: 'median'", folder, out, "--how", "median")
    refuses(capsys, "bucket", folder, "gs://bucket/out")
    tensors = plain_tensors()
    tensors["model.norm.weight"][0] = np.nan
    refuses(capsys, "model.norm.weight holds NaN", write_folder(folder, PLAIN, tensors), out)
    surplus = plain_tensors() | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    refuses(capsys, "holds model.layers.0.self_attn.q_norm.weight", write_folder(folder, PLAIN, surplus), out)
    path.write_bytes(path.read_bytes()[:-1])
    refuses(capsys, "cut short or damaged", folder, out)
    path.unlink()
    names = write_sharded(folder, PLAIN, plain_tensors())
    next(folder.glob("model-00002*")).unlink()
    refuses(capsys, "this shard is missing", folder, out)
    write_sharded(folder, PLAIN, plain_tensors())
    ghost = {"weight_map": names | {"ghost": "model-00001-of-00003.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(ghost))
    refuses(capsys, "lacks ghost", folder, out)


def _with_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(PLAIN | changes))
    return folder


def test_what_is_no_folder_of_a_model(folder, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    refuses(capsys, "README.md is a file; give the folder of a downloaded model", ROOT / "README.md", out)
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    for run_folder in (trained / "run", tmp_path / "bare"):
        refuses(capsys, f"{run_folder} is a run already; give it to init_from, evaluate or export", run_folder, out)
    refuses(capsys, "OUT is empty; write the name of a folder", folder, "")
    refuses(capsys, "FOLDER is empty", "", out)
    refuses(capsys, "OUT ~nosuchuser/x: there is no such user", folder, "~nosuchuser/x")
    refuses(capsys, "is too long for the name of a file", folder, "x" * 300)
    refuses(capsys, "FOLDER ~nosuchuser/x: there is no such user", "~nosuchuser/x", out)
    refuses(capsys, r"OUT 'a\x00b' holds a NUL character", folder, "a\0b")
    refuses(capsys, r"FOLDER 'a\x00b' holds a NUL character", "a\0b", out)


def test_space_is_checked_before_anything_is_written(folder, tmp_path, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=2**20 + 20_000)  # 6,900 parameters of 4 bytes do not fit; of 2 they would
    monkeypatch.setattr("lckv_jax.convert.new_folder.shutil.disk_usage", lambda path: usage)
    refuses(capsys, "has only 1.07 MB free", folder, tmp_path / "out")
    write_folder(folder, PLAIN, plain_tensors(ml_dtypes.bfloat16))
    assert run(capsys, folder, tmp_path / "out")[0] == 0


def test_an_imported_model_has_no_text_of_its_own(folder, tmp_path, capsys):
    assert run(capsys, folder, tmp_path / "out")[0] == 0
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is an imported model, which has no text of its own; give some as files=texts/*.txt" in error


def test_a_damaged_tokenizer_is_named_where_it_lies(folder, tmp_path, capsys):
    (folder / "tokenizer.model").write_bytes(b"garbage")
    error = refuses(
        capsys, f"tokenizer {folder}/tokenizer.model is not a sentencepiece model", folder, tmp_path / "out"
    )
    assert "partial" not in error


def test_existing_folders_are_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    refuses(capsys, "is not empty", folder, out)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    assert run(capsys, folder, out)[0] == 0  # an empty folder is as good as none
    refuses(capsys, "is not empty", folder, out)
    (tmp_path / "file").touch()
    refuses(capsys, "is a file", folder, tmp_path / "file")


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
        refuses(capsys, "No space left on device", folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        refuses(capsys, "nothing was left there", folder, tmp_path / "out")


def test_leaves_that_differ_when_read_back_are_no_import(folder, tmp_path, monkeypatch, capsys):
    save = checkpoint.save

    def damaging(manager, *arguments, **settings):
        save(manager, *arguments, **settings)
        checkpoint.finish_saving(manager)
        files = [path for path in Path(manager.directory).rglob("*") if path.is_file() and "params" in path.parts]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 16
        largest.write_bytes(content)

    monkeypatch.setattr(import_module.checkpoint, "save", damaging)
    code, _, error = run(capsys, folder, tmp_path / "out")
    assert code == 2 and "usable" in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A model of 40 MB, so that saving it takes a while."""
    config = SMALL | {"vocab_size": 500_000, "hidden_size": 20}
    return write_folder(tmp_path_factory.mktemp("large") / "hf", config, small_tensors(config))


SAVING = """
import sys
from lckv_jax import checkpoint
from lckv_jax.__main__ import main
save = checkpoint.save
def told(*arguments, **settings):
    print("saving", flush=True)
    save(*arguments, **settings)
checkpoint.save = told
sys.exit(main(["import", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_import_leaves_nothing_under_its_name(large_folder, tmp_path, sent, code, wait):
    arguments = [sys.executable, "-c", SAVING, str(large_folder), str(tmp_path / "out")]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != "saving\n":
        assert process.poll() is None
    (partial,) = tmp_path.glob("out.partial-*")
    time.sleep(wait)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([partial.name] if sent == signal.SIGKILL else []), error
    assert error.count("\n") == (sent != signal.SIGKILL), error  # one sentence


def test_what_a_killed_import_left_is_removed(folder, tmp_path):
    (tmp_path / "out.partial-0123abcd" / "checkpoints").mkdir(parents=True)
    import_hub(str(folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
