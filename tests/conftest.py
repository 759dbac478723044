"""What several tests need: where the golden numbers and the real data are."""

import importlib.util
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import pytest
from stories260k import write_stories260k

ROOT = Path(__file__).resolve().parent.parent
jax.config.update("jax_numpy_rank_promotion", "raise")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background, as under nohup, may ignore it


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Tests that compile the same program again take it from here; nothing survives the session."""
    folder = tempfile.mkdtemp()
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_modules():
    """Compiled programs stay in memory as long as jax knows them: gigabytes by the end of a session."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden fixtures (see its README)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real text and weights that are not part of the project; skips where there is none."""
    folder = Path(os.environ.get("LCKV_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data absent: set LCKV_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def weights(test_data) -> Path:
    """The folder of stories260K (see the README of the real data)."""
    return test_data / "weights" / "stories260K"


@pytest.fixture(scope="session")
def reference(weights) -> dict:
    """What stories260K must give: text, losses."""
    return json.loads((weights / "reference.json").read_text())


@pytest.fixture(scope="session")
def stories_hub(weights, tmp_path_factory) -> Path:
    """stories260K as a Hugging Face folder."""
    return write_stories260k(weights, tmp_path_factory.mktemp("stories260K"))


def needs_torch() -> None:
    """Skips a module whose tests compare with PyTorch and transformers where they are absent.

    With LCKV_REQUIRE_TORCH=1 in the environment, as in .ci/run, they must be there.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            if os.environ.get("LCKV_REQUIRE_TORCH") == "1":
                pytest.fail(f"{name} is not installed, but LCKV_REQUIRE_TORCH=1", pytrace=False)
            pytest.skip(f"{name} absent: pip install -e '.[torch]'", allow_module_level=True)


def write_tiny_config(folder: Path) -> Path:
    """A YAML config that trains a tiny LCKV model on a few real text files in seconds, all inside `folder`."""
    text = Path(os.__file__).parent
    path = folder / "tiny.yaml"
    path.write_text(f"""
out: {folder / "run"}
model:
  vocab_size: 512
  hidden_size: 32
  intermediate_size: 48
  num_layers: 4
  num_heads: 4
  num_kv_heads: 2
  head_dim: 8
  sharing: "0_2_2_3"
  no_grad_passes: 2
  remat: false
data:
  sources: ["{text / "a[bs]*.py"}", "{text / "[bcd]*.py"}"]
  folder: {folder / "data"}
  validation_fraction: 0.2
  seq_len: 32
  batch_size: 4
optimizer: {{learning_rate: 1.0e-2, warmup_steps: 2}}
train: {{steps: 6, log_every: 2, eval_every: 3, eval_batches: 2, save_every: 2}}
""")
    return path


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    return write_tiny_config(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished tiny run: tiny.yaml, data/ and run/. Only to be read."""
    from lckv_jax.config import load_config
    from lckv_jax.train.loop import train

    folder = tmp_path_factory.mktemp("trained")
    train(load_config(write_tiny_config(folder)))
    return folder


@pytest.fixture
def finished_config(trained, tmp_path) -> Path:
    """The config of a finished tiny run, in a copy of its own."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "data", tmp_path / "data")
    return write_tiny_config(tmp_path)
