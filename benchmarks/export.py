"""How long `export` takes and how much memory: a random model of real size, in processes of their own.

    python -m benchmarks.export [CONFIG] [--params bfloat16] [--rounds 5] [--folder FOLDER] [a.b=c ...] [-- FLAG ...]

CONFIG is a YAML file (default: configs/tinyllama-1b.yaml). Its parameters, random in bfloat16 or as `--params` says,
are saved as a checkpoint; `python -m lckv_jax export` then runs on it, with the FLAGs after `--`, such as
`--dtype bfloat16`. Seconds and peak memory are those of the whole process, imports included; the peak is told over the
bytes of the parameters in the checkpoint. It includes the interpreter with its libraries, about 0.27 GB, so that small
models exceed the bound. After the last round the folder is loaded and compared with the parameters.
Needs free space of twice the parameters in FOLDER. Exit code 1 if the peak is 1.3 x the parameters or more.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CONFIGS = Path(__file__).parents[1] / "configs"
LIMIT = 1.3  # peak memory over the bytes of the parameters


def random_leaf(path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Normal numbers that depend on the path only."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    leaf = np.empty(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    flat = leaf.reshape(-1)
    for start in range(0, flat.size, 2**22):
        part = flat[start : start + 2**22]
        part[...] = rng.standard_normal(part.size, np.float32)
    return leaf


def leaf_shapes(config_path: str, overrides: list[str]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The configuration of a run and the shapes of its parameters by path."""
    from lckv_jax.config import load_config
    from lckv_jax.convert.hub import hub_leaves

    config = load_config(config_path, overrides)
    return config, {leaf.path: leaf.full_shape for leaf in hub_leaves(config.model)}


def make_checkpoint(folder: Path, config_path: str, overrides: list[str], dtype: str) -> None:
    import jax.numpy as jnp
    from flax import traverse_util

    from lckv_jax.checkpoint import open_checkpoints, save

    config, shapes = leaf_shapes(config_path, overrides)
    leaves = {path: jnp.asarray(random_leaf(path, shape, dtype)) for path, shape in shapes.items()}
    state = {"params": traverse_util.unflatten_dict(leaves, sep="."), "step": jnp.int32(1)}
    with open_checkpoints(folder / "run" / "checkpoints", keep=1) as manager:
        save(manager, state, config)


def compare(folder: Path, config_path: str, overrides: list[str], dtype: str) -> None:
    """Raises AssertionError unless the exported folder holds what was saved, in its own dtype."""
    from lckv_jax.convert.hub import load_hub
    from lckv_jax.fingerprint import leaves_by_path

    _, shapes = leaf_shapes(config_path, overrides)
    flat = leaves_by_path(load_hub(folder / "out")[0])
    assert flat.keys() == shapes.keys()
    for path in sorted(shapes):
        leaf = flat.pop(path)
        assert np.array_equal(leaf, random_leaf(path, shapes[path], dtype).astype(leaf.dtype)), path


def apart(function: Any, *arguments: Any) -> None:
    """Runs in a process of its own: a child's peak would begin with what this process holds."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")


def run_export(folder: Path, flags: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of one export."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "lckv_jax", "export", str(folder / "run"), str(folder / "out"), *flags]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit("the export failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(CONFIGS / "tinyllama-1b.yaml"))
    parser.add_argument("--params", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write, for the speed of that disk; emptied afterwards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    words = sys.argv[1:]
    words, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_intermixed_args(words)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        apart(make_checkpoint, folder, options.config, options.overrides, options.params)
        _, shapes = leaf_shapes(options.config, options.overrides)
        size = sum(int(np.prod(shape)) for shape in shapes.values()) * (2 if options.params == "bfloat16" else 4)
        rounds = [run_export(folder, flags) for _ in range(options.rounds)]
        written = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
        apart(compare, folder, options.config, options.overrides, options.params)
    seconds = statistics.median(seconds for seconds, _ in rounds)
    peak = max(peak for _, peak in rounds)
    print(
        f"{options.config}: parameters {size / 1e9:.3f} GB in {options.params}, {written / 1e9:.3f} GB written, equal"
    )
    print(f"rounds {', '.join(f'{seconds:.1f} s' for seconds, _ in rounds)}")
    print(
        f"median {seconds:.1f} s, {written / 1e6 / seconds:,.0f} MB/s; peak {peak / 1e9:.2f} GB = {peak / size:.3f} x"
    )
    return int(peak >= LIMIT * size)


if __name__ == "__main__":
    sys.exit(main())
