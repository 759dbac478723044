"""One bench cell measured with Hugging Face transformers: LlamaForCausalLM of the same sizes, with random weights.

    python -m lckv_jax.decode.peers CELL.json RESULT.json

`transformers dynamic` is the default there: DynamicCache, nothing compiled. `transformers static` is what its
`cache_implementation="static"` does: StaticCache, and a decode step compiled with the settings of its `generate`; the
prompt is not compiled there either. Both are driven by a loop that is leaner than `generate`: argmax on the device, no
stopping criteria and no logits processors. Only this process knows torch, which is imported where it is used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from lckv_jax.config import build_config
from lckv_jax.convert.hub_config import hub_config, natural_format
from lckv_jax.errors import UserError
from lckv_jax.model_config import Frozen, ModelConfig, NonNegative, Positive

if TYPE_CHECKING:
    import torch
    from transformers import Cache, LlamaForCausalLM

_WARM_UPS = 2
_COMPILED_STEPS = 3  # compiles, records a CUDA graph, and replays it
_COPY_BYTES, _COPIES, _COPY_REPEATS = 2**28, 8, 5
RESULTS = (
    "prefill_ms", "passes_used", "residual", "decode_step_ms", "decode_tokens_per_s", "tokens_per_s", "compile_s",
    "peak_bytes", "peak_bytes_kind", "cache_bytes_held", "cache_bytes_read_per_step", "weight_bytes_read_per_step",
    "copy_bandwidth", "share_of_roofline",
)  # fmt: skip


class PeerCell(Frozen):
    """What is measured."""

    name: str = Field(description="of the model, in the result")
    model: ModelConfig = Field(description="sizes; its map is standard")
    decoder: Literal["transformers dynamic", "transformers static"] = Field(description="which cache of theirs")
    cache: Literal["full"] = Field(default="full", description="what the cache keeps")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(description="of weights, cache and matrix products")
    prompt: Positive = Field(description="tokens of each prompt")
    new: int = Field(ge=2, description="tokens that each row gets: the first by the prompt, the others by steps")
    batch: Positive = Field(description="rows")
    repeats: int = Field(default=5, ge=5, description="timed runs")
    memory_cap_bytes: Positive | None = Field(default=None, description="of the GPU; null = all of it")
    seed: NonNegative = Field(default=0, description="of weights and prompts")


class Times(NamedTuple):
    """Seconds of the prompt with its first token, and of the steps after it."""

    prefill: float
    decode: float


def read_cell(path: Path) -> PeerCell:
    """The cell in a JSON file; raises UserError, also where transformers' Llama is no peer of the model."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a cell: {error}") from error
    cell = build_config(PeerCell, tree, str(path))
    if natural_format(cell.model) != "llama":
        raise UserError(
            f"{path}: {cell.decoder} knows no map but the standard one, and model.sharing is {cell.model.sharing}; "
            "measure it with the decoder lckv_jax"
        )
    return cell


def measure(cell: PeerCell) -> dict[str, Any]:
    """The result of one cell: identity, facts, numbers, or `error` in one sentence where the numbers are null.

    Errors are those that belong to the cell: memory that does not suffice, and a program that cannot be compiled.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads())
    _cap_memory(cell, device)
    result = _facts(cell, device) | dict.fromkeys(RESULTS)
    try:
        return result | _numbers(cell, device) | {"error": None}
    except RuntimeError as error:  # what torch raises for both
        if (sentence := _sentence(error, device)) is None:
            raise
        return result | {"error": sentence}


def threads() -> int:
    """The cores that this process may use. XLA starts as many threads on the CPU; torch's own default is fewer where
    cores run two threads each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(cell: PeerCell, device: torch.device | str) -> LlamaForCausalLM:
    """The model of the cell with random weights, made on the device in the cell's dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    length = cell.prompt + cell.new
    keys = hub_config(
        cell.model, format="llama", max_position_embeddings=length, dtype=cell.dtype, bos_id=None, eos_id=None
    )
    torch.manual_seed(cell.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, cell.dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig.from_dict(keys)).eval()
    finally:
        torch.set_default_dtype(before)


def generate(
    model: LlamaForCausalLM, step: Callable[..., Any], prompt_BT: torch.Tensor, new: int, cache: Cache
) -> tuple[torch.Tensor, Times]:
    """Exactly `new` greedy tokens [B, new] for each row, and the seconds they took.

    step: computes one token: the model itself, or the model compiled. cache: empty at first, full afterwards.
    """
    import torch

    with torch.no_grad():
        started = _now(prompt_BT.device)
        tokens = [_argmax(model(prompt_BT, past_key_values=cache, use_cache=True, logits_to_keep=1))]
        first = _now(prompt_BT.device)
        for _ in range(new - 1):
            tokens.append(_argmax(step(tokens[-1], past_key_values=cache, use_cache=True)))
        return torch.cat(tokens, dim=1), Times(first - started, _now(prompt_BT.device) - first)


def _argmax(output: Any) -> torch.Tensor:
    """The next token of each row [B, 1]."""
    return output.logits[:, -1:].argmax(-1)


def _now(device: torch.device) -> float:
    """The time at which the device has done everything asked of it so far."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _cap_memory(cell: PeerCell, device: torch.device) -> None:
    import torch

    if cell.memory_cap_bytes is None:
        return
    if device.type != "cuda":
        raise UserError("memory_cap_bytes caps the memory of a GPU, and torch sees none; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cell.memory_cap_bytes / total))


def _numbers(cell: PeerCell, device: torch.device) -> dict[str, Any]:
    """What is measured: all of RESULTS."""
    import torch
    from transformers import DynamicCache, StaticCache

    bandwidth = copy_bandwidth(device)
    model = build(cell, device)
    prompt_BT = torch.randint(cell.model.vocab_size, (cell.batch, cell.prompt), device=device)
    step, compile_s, cache = model, 0.0, None
    if cell.decoder == "transformers static":
        cache = StaticCache(config=model.config, max_cache_len=cell.prompt + cell.new)
        step = model.get_compiled_call(None)
        compile_s = generate(model, step, prompt_BT, min(cell.new, 1 + _COMPILED_STEPS), cache)[1].decode
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(_WARM_UPS + cell.repeats):
        if cell.decoder == "transformers static":
            cache.reset()
        else:
            cache = None  # the last one goes before the next one comes
            cache = DynamicCache(config=model.config)
        times.append(generate(model, step, prompt_BT, cell.new, cache)[1])
    cuda = device.type == "cuda"
    memory = {
        "compile_s": compile_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_bytes_kind": "allocator" if cuda else None,
        "cache_bytes_held": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    }
    return memory | _speed(cell, times[_WARM_UPS:], weight_bytes(model), bandwidth)


def _speed(cell: PeerCell, times: list[Times], weights: int, bandwidth: float) -> dict[str, Any]:
    """Rates of the timed runs. Of the cache each step must read the tokens so far and write one, in all layers."""
    steps = [run.decode / (cell.new - 1) for run in times]
    step = statistics.median(steps)
    written = cell.batch * cache_bytes_per_token(cell)
    read = written * (cell.prompt + cell.new / 2)  # the tokens of step i are prompt + i, i = 1 .. new - 1
    return {
        "prefill_ms": _spread([run.prefill for run in times]),
        "decode_step_ms": _spread(steps),
        "decode_tokens_per_s": cell.batch / step,
        "tokens_per_s": cell.batch * cell.new / statistics.median(run.prefill + run.decode for run in times),
        "cache_bytes_read_per_step": read,
        "weight_bytes_read_per_step": weights,
        "copy_bandwidth": bandwidth,
        "share_of_roofline": (weights + read + written) / step / bandwidth,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {name: 1e3 * f(seconds) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def cache_bytes_per_token(cell: PeerCell) -> int:
    """Bytes of the keys and values of one token in all layers."""
    import torch

    itemsize = getattr(torch, cell.dtype).itemsize
    return cell.model.sharing.cache_bytes_per_token(cell.model.num_kv_heads, cell.model.head_dim, itemsize)


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads a row for each token, unless
    the head is the embedding."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if model.config.tie_word_embeddings else total - model.get_input_embeddings().weight.nbytes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second when an array is copied onto another one of 256 MiB, which is beyond the
    caches: the median of the repeats."""
    import torch

    source = torch.rand(_COPY_BYTES // 4, device=device)
    target = torch.rand_like(source)
    seconds = []
    for _ in range(1 + _COPY_REPEATS):
        started = _now(device)
        for _ in range(_COPIES):
            target.copy_(source)
        seconds.append(_now(device) - started)
    return 2 * _COPY_BYTES * _COPIES / statistics.median(seconds[1:])


def _sentence(error: RuntimeError, device: torch.device) -> str | None:
    """What is to be said of an error that belongs to the cell; None if it does not."""
    import torch
    from torch._dynamo.exc import TorchDynamoException  # of inductor's too

    said = str(error).strip().split("\n")
    if isinstance(error, torch.OutOfMemoryError):
        used, limit = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory
        limit *= torch.cuda.get_per_process_memory_fraction()
        return f"does not fit: torch ran out of memory with {used / 1e9:.1f} GB in use of {limit / 1e9:.1f} GB"
    if "DefaultCPUAllocator" in said[0]:
        return "does not fit: torch ran out of memory on the CPU"
    if isinstance(error, TorchDynamoException):
        return f"torch.compile cannot compile the decode step: {said[0]}"
    return None


def _facts(cell: PeerCell, device: torch.device) -> dict[str, Any]:
    """Identity of the cell and what must be known beside its numbers; allocates nothing."""
    import torch
    import transformers

    model = build(cell, "meta")
    return {
        "model": cell.name,
        "decoder": cell.decoder,
        "sharing": str(cell.model.sharing),
        "cache": cell.cache,
        "dtype": cell.dtype,
        "prompt": cell.prompt,
        "new": cell.new,
        "batch": cell.batch,
        "largest": False,
        "passes": "trained",
        "memory_cap_bytes": cell.memory_cap_bytes,
        "memory_model_bytes": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": threads(),
        "attention": model.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "repeats": cell.repeats,
        "random_weights": True,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The model of the CPU and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads()} cores"


def commit() -> str | None:
    """What `git describe` says of this code; None where it is no git checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path, metavar="CELL.json")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    options = parser.parse_args(arguments)
    try:
        result = measure(read_cell(options.cell))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
