"""docs/training.md: the reference is the config's own descriptions, every command runs, every preset is named."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_hub import SMALL as SMALL_LLAMA
from test_hub import small_tensors, write_folder

from lckv_jax.__main__ import main
from lckv_jax.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands(page):
    """The commands on a page, each as the words after `lckv_jax`."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[line.index("lckv_jax") + 1 :] for line in lines]


START = re.search(r"^## Start from a finished model\n(.*?)^## ", PAGE, re.M | re.S)[1]
COMMANDS = commands(PAGE.replace(START, ""))
SMALL = ["model.vocab_size=512", "model.hidden_size=32", "data.seq_len=32", "data.batch_size=2", "train.steps=2",
         "optimizer.warmup_steps=1", "train.eval_batches=1", "mesh.fsdp=1", "model.num_layers=4",
         "model.sharing=lckv"]  # fmt: skip
SPEC = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


def test_every_field_has_a_description():
    bare = [
        f"{path}{name}"
        for path, model in reference.sections(RunConfig, "")
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert bare == []
    assert all(model.__doc__ for _, model in reference.sections(RunConfig, ""))


def test_the_reference_is_up_to_date():
    assert reference.page_with_reference(PAGE) == PAGE, "run: python -m docs.reference"


def test_every_key_has_a_row():
    keys = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.M)
    assert len(keys) == len(set(keys))
    known = {path for path, _ in reference.sections(RunConfig, "")}
    leaves = {
        f"{path}{name}"
        for path, model in reference.sections(RunConfig, "")
        for name in model.model_fields
        if f"{path}{name}." not in known or path
    }
    repeated = {key for key in leaves if key.startswith("data.validation.")}  # the same mapping as data.sources
    assert leaves - repeated == set(keys)


def test_rows_tell_values_and_defaults():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE, re.M))
    assert rows["train.steps"].startswith("integer, > 0 | required | ")
    assert rows["optimizer.clip_norm"].startswith("number or null, > 0.0 | `1.0` | ")
    assert rows["model.start"].startswith("`zero`, `input` | `zero` | ")
    assert rows["model.tie_embeddings"].startswith("true, false | `false` | ")
    assert rows["train.no_grad_passes_schedule"].startswith("list of [integer >= 0, integer > 0] | `[]` | ")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_runs(command, tmp_path, monkeypatch, capsys, request):
    action, subject, *rest = command
    if action == "evaluate":
        subject = str(request.getfixturevalue("trained") / "run")
    else:
        assert (ROOT / subject).is_file()
        (tmp_path / "1.txt").write_text(PAGE * 3, encoding="utf-8")
        (tmp_path / "2.txt").write_text(PAGE[::2] * 3, encoding="utf-8")
        rest += [*SMALL, f"data.sources=[{tmp_path}/*.txt]", "data.validation_fraction=0.5"]
        rest += [f"out={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}"]
        subject = str(ROOT / subject)
    monkeypatch.chdir(tmp_path)
    if "--verify" in rest:
        assert main([action, subject, *(word for word in rest if word != "--verify")]) == 0
    if "--plot" in rest:  # its optional FILE would be the first override of this test
        rest = [word for word in rest if word != "--plot"] + ["--plot"]
    assert main([action, subject, *rest]) == 0
    assert capsys.readouterr().out
    assert ("--plot" in rest) == (tmp_path / "lckv-50m-map.png").exists()


def test_starting_from_a_finished_model(tmp_path, monkeypatch, capsys):
    """The commands of that section, one after the other, each on what those before it made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate((START, START[::2])):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    small = [
        *SMALL,
        "model.intermediate_size=32",
        "model.remat=none",
        "data.sources=[texts/*.txt]",
        "data.validation_fraction=0.5",
    ]
    assert main(["train", str(ROOT / "configs/quickstart.yaml"), *small]) == 0
    llama = SMALL_LLAMA | {
        "model_type": "llama",
        "vocab_size": 512,
        "num_hidden_layers": 4,
        "max_position_embeddings": 64,
    }
    tensors = small_tensors(llama | {"layer_types": "0_1_2_3"})
    del llama["layer_types"]
    (tmp_path / "downloads").mkdir()
    write_folder(tmp_path / "downloads" / "llama", llama, tensors)
    shutil.copy("runs/quickstart/tokenizer.model", "downloads/llama")
    for action, subject, *rest in commands(START):
        if action == "train":
            sizes = [word for word in small if not word.startswith("model.")] if "models/" in subject else small
            subject = str(ROOT / subject) if subject.startswith("configs/") else subject
            rest = [*sizes, *rest]
        if action == "evaluate":
            rest.append("max_tokens=500")
        assert main([action, subject, *rest]) == 0
    told = capsys.readouterr().out
    assert told.count("starting from") == 3 and told.count("read back and compared") == 2


def test_the_commands_are_those_promised():
    promised = commands(PAGE)
    assert {command[0] for command in promised} == {"describe", "prepare", "train", "evaluate", "import"}
    flags = {word for command in promised for word in command if word.startswith("--")}
    assert flags == {"--verify", "--compile", "--plot", "--sharing"}


def test_every_preset_and_only_presets_are_named():
    named = set(re.findall(r"`(configs/[\w.-]+)`", PAGE))
    assert named == {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}


def test_pictures_exist():
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / name).read_bytes()
