"""The rooms of the house: imports point down only, files stay small, and the core needs no data library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = [  # lowest first; a name stands for the modules under it; those of one line do not know each other
    ["errors"],
    ["families"],
    ["sharing"],
    ["config_text", "model_config"],
    ["config"],
    ["model.axes"],
    ["model.kernels"],
    ["model.attention"],
    ["model.layers"],
    ["model.refine"],
    ["model.transformer"],
    ["model.loss"],
    ["parallel"],
    ["data"],
    ["checksums", "fingerprint", "orbax_barrier", "orbax_noise", "retention"],
    ["step_folder"],
    ["checkpoint"],
    ["convert"],
    ["decode"],
    ["evaluate.rows", "evaluate.progress", "evaluate.statistics"],
    ["evaluate.decode_path", "evaluate.continuations", "evaluate.finished"],
    ["evaluate.cache_quality", "evaluate.windows"],
    ["evaluate.position_plot"],
    ["evaluate.perplexity"],
    ["train"],
    ["memory", "map_plot"],
    ["compiled"],
    ["evaluate.harness"],
    ["evaluate.task_files"],
    ["evaluate.tasks"],
    ["evaluate.suite_config"],
    ["evaluate.suite_entries"],
    ["evaluate.suite_report"],
    ["evaluate.suite"],
    ["describe", "share", "study"],
    ["__main__"],
]
EMPTY = ("model", "evaluate")  # packages whose modules are in different lines: nothing may be in their __init__.py
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = {
    ".".join(path.relative_to(ROOT / "lckv_jax").with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted((ROOT / "lckv_jax").rglob("*.py"))
}  # module name without lckv_jax -> file; "" is lckv_jax itself


def imports(tree, module, is_package):
    """The modules of ours that a module imports anywhere in it, except for type checking; without "lckv_jax."."""
    package = ["lckv_jax", *filter(None, module.split("."))]
    package = package if is_package else package[:-1]
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("lckv_jax.") in FILES} or {base}
    return {name.removeprefix("lckv_jax").removeprefix(".") for name in found if name.split(".")[0] == "lckv_jax"}


def room(module):
    """The room of a module; None if no line of ORDER has it."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RANK), None)


def wrong(module, imported):
    """Why a module must not import another one of ours; None if it may."""
    if module == "":
        return None if imported in ("config", "sharing") else "lckv_jax/__init__.py imports config and sharing only"
    if imported == "":
        return "import what is meant, not all of lckv_jax"
    here, there = room(module), room(imported)
    if here is None or there is None:
        return "one of them has no place in ORDER: give it one, here and in the design"
    if here == there or RANK[there] < RANK[here]:
        return None
    return "imports point down only"


def faults(module, source, is_package=False):
    found = imports(ast.parse(source), module, is_package)
    return {other: why for other in sorted(found) if (why := wrong(module, other))}


@pytest.mark.parametrize("module", [name for name in FILES if name not in EMPTY], ids=lambda name: name or "lckv_jax")
def test_imports_point_down(module):
    assert module == "" or room(module), f"{module} has no place in ORDER"
    assert faults(module, FILES[module].read_text(), FILES[module].name == "__init__.py") == {}


@pytest.mark.parametrize("module", [name for name in EMPTY if name in FILES])
def test_packages_of_several_lines_are_empty(module):
    assert ast.parse(FILES[module].read_text()).body == []


def test_model_imports_nothing_else_of_ours():
    for module in FILES:
        if module.startswith("model."):
            rooms = {name.split(".")[0] for name in imports(ast.parse(FILES[module].read_text()), module, False)}
            assert rooms <= {"config", "model_config", "sharing", "errors", "model"}, module


def test_decode_never_imports_train():
    for module in FILES:
        if module.split(".")[0] == "decode":
            assert not any(
                name.split(".")[0] == "train" for name in imports(ast.parse(FILES[module].read_text()), module, False)
            )


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("model.attention", "from lckv_jax.model.layers import layer", ["model.layers"]),
        ("model.attention", "from .layers import layer", ["model.layers"]),
        ("model.attention", "from lckv_jax.model import axes, layers", ["model.layers"]),
        ("model.attention", "from . import axes, layers", ["model.layers"]),
        ("sharing", "def f():\n    import lckv_jax.config as c", ["config"]),
        ("decode.cache", "if x:\n    from lckv_jax.train.loop import train", ["train.loop"]),
        ("train.step", "from lckv_jax.describe import describe", ["describe"]),
        ("share.kvsharer", "from lckv_jax.study import plots", ["study"]),
        ("config", "from lckv_jax import KVSharing", [""]),
        ("config", "import lckv_jax.unheard_of", ["unheard_of"]),
        ("", "from lckv_jax.model.loss import loss", ["model.loss"]),
        ("data.batches", "from ..train import step", ["train.step"]),
    ],
)
def test_wrong_imports_are_seen(module, source, wrong):
    assert list(faults(module, source)) == wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sharing", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lckv_jax.config import RunConfig"),
        ("model.loss", "from lckv_jax.model.attention import wider\nimport jax"),
        ("checkpoint", "def load():\n    from lckv_jax.data.tokenizer import load_tokenizer"),
        ("data.prepare", "from lckv_jax.data.corpora import scan"),
    ],
)
def test_right_imports_are_let_through(module, source):
    assert faults(module, source) == {}


def test_no_module_is_called_utils():
    names = {part for module in FILES for part in module.split(".")}
    assert not names & {"util", "utils", "common", "helper", "helpers", "misc"}


def test_files_are_small():
    long = {module: n for module, path in FILES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


BLOCKED = ["grain", "tensorflow_datasets", "tensorflow", "sentencepiece"]


def test_model_and_decode_need_no_data_library():
    modules = [f"lckv_jax.{name}" for name in FILES if name.split(".")[0] in ("model", "decode")]
    assert {"lckv_jax.model.loss", "lckv_jax.model.transformer"} <= set(modules)
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); import lckv_jax, {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
