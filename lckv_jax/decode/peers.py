"""One bench cell measured with Hugging Face transformers: LlamaForCausalLM of the same sizes, with random weights.

    python -m lckv_jax.decode.peers CELL.json RESULT.json

`transformers dynamic` is the default there: DynamicCache, nothing compiled. `transformers static` is what its
`cache_implementation="static"` does: StaticCache, and a decode step compiled with the settings of its `generate`; the
prompt is not compiled there either. Both are driven by a loop that is leaner than `generate`: argmax on the device, no
stopping criteria and no logits processors. Only this process knows torch, which is imported where it is used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lckv_jax.config import build_config
from lckv_jax.convert.hub_config import hub_config, natural_format
from lckv_jax.decode.bench_record import (
    COPIES,
    PEERS,
    WARM_UPS,
    Cell,
    commit,
    cores,
    cpu_copy_bandwidth,
    cpu_name,
    milliseconds,
    versions,
    write_json,
)
from lckv_jax.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import Cache, LlamaForCausalLM

_COMPILED_STEPS = 3  # the first compiles, the second records a CUDA graph, the third replays it
_COPY_BYTES, _IN_A_ROW = 2**28, 4


class Times(NamedTuple):
    """Seconds of the prompt with its first token, and of the steps after it."""

    prefill: float
    decode: float


def read_cell(path: Path) -> Cell:
    """The cell in a JSON file; raises UserError, also where transformers' Llama is no peer of the model."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a cell: {error}") from error
    cell = build_config(Cell, tree, str(path))
    wanted = cell.identity
    has_peer = {"decoder": wanted.decoder in PEERS, "cache": wanted.cache == "full", "batch": wanted.batch != "largest"}
    if wrong := [name for name, fine in has_peer.items() if not fine]:
        raise UserError(
            f"{path}: identity.{wrong[0]}={getattr(wanted, wrong[0])} is not measured with transformers; use the "
            "decoder lckv_jax"
        )
    if natural_format(cell.model) != "llama":
        raise UserError(
            f"{path}: {cell.identity.decoder} knows no map but the standard one, and model.sharing is "
            f"{cell.model.sharing}; measure it with the decoder lckv_jax"
        )
    return cell


def measure(cell: Cell) -> dict[str, Any]:
    """The record of one cell: identity, facts, results, error (one sentence, and then results are null).

    Errors are those that belong to the cell: memory that does not suffice, a program that cannot be compiled.
    """
    import torch

    started = datetime.now(UTC).isoformat(timespec="seconds")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA multiplies float32
    torch.set_num_threads(cores())  # as XLA; torch's own default is fewer where cores run two threads each
    record = {"identity": cell.identity.model_dump(), "facts": {**_facts(cell, device), "started": started}}
    cap = cell.identity.memory_cap_bytes
    if cap is not None and device.type == "cpu":
        return {**record, "results": None, "error": "cannot be capped: torch caps the memory of GPUs only"}
    if cap is not None:
        share = cap / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        return {**record, "results": _results(cell, device), "error": None}
    except RuntimeError as error:  # what torch raises for both
        if (sentence := _sentence(error, device)) is None:
            raise
        return {**record, "results": None, "error": sentence}


def build(cell: Cell, device: torch.device | str) -> LlamaForCausalLM:
    """The model of the cell with random weights, made on the device in the cell's dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype, length = cell.identity.dtype, cell.identity.prompt + cell.identity.new
    keys = hub_config(cell.model, format="llama", max_position_embeddings=length, dtype=dtype, bos_id=None, eos_id=None)
    torch.manual_seed(cell.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
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


def _results(cell: Cell, device: torch.device) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache, StaticCache

    wanted, cuda = cell.identity, device.type == "cuda"
    static = wanted.decoder == "transformers static"
    bandwidth = copy_bandwidth(device)
    model = build(cell, device)
    prompt_BT = torch.randint(cell.model.vocab_size, (wanted.batch, wanted.prompt), device=device)
    step, compile_s, cache = model, 0.0, None
    if static:
        cache = StaticCache(config=model.config, max_cache_len=wanted.prompt + wanted.new)
        step = model.get_compiled_call(None)
        compile_s = generate(model, step, prompt_BT, min(wanted.new, 1 + _COMPILED_STEPS), cache)[1].decode
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UPS + cell.repeats):
        if static:
            cache.reset()
        else:
            cache = None  # the last one goes before the next one comes
            cache = DynamicCache(config=model.config)
        times.append(generate(model, step, prompt_BT, wanted.new, cache)[1])
    return {
        **_speeds(cell, times[WARM_UPS:], weight_bytes(model), bandwidth),
        "passes_used": None,
        "residual": None,
        "compile_s": round(compile_s, 2),
        "largest": False,
        "memory_model_bytes": None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_bytes_kind": "allocator" if cuda else None,
        "cache_bytes_held": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    }


def _speeds(cell: Cell, times: list[Times], weights: int, bandwidth: tuple[float, str]) -> dict[str, Any]:
    """Rates of the timed runs, and the bytes that a step reads and writes at least: weights, the columns that the cache
    has (on average; a static one has all from the start), and one new column."""
    wanted = cell.identity
    steps = [run.decode / (wanted.new - 1) for run in times]
    step = statistics.median(steps)
    written = wanted.batch * _token_bytes(cell)
    columns = wanted.new if wanted.decoder == "transformers static" else wanted.new / 2  # step i of new - 1 reads i
    read = written * (wanted.prompt + columns)
    return {
        "prefill_ms": milliseconds([run.prefill for run in times]),
        "decode_step_ms": milliseconds(steps),
        "decode_tokens_per_s": wanted.batch / step,
        "tokens_per_s": wanted.batch * wanted.new / statistics.median(run.prefill + run.decode for run in times),
        "cache_bytes_read_per_step": round(read),
        "weight_bytes_read_per_step": weights,
        "copy_bandwidth": bandwidth[0],
        "copy_bandwidth_how": bandwidth[1],
        "share_of_roofline": (weights + read + written) / step / bandwidth[0],
    }


def _token_bytes(cell: Cell) -> int:
    """Of the keys and values of one token in all layers."""
    import torch

    itemsize = getattr(torch, cell.identity.dtype).itemsize
    return cell.model.sharing.cache_bytes_per_token(cell.model.num_kv_heads, cell.model.head_dim, itemsize)


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads a row for each token, unless
    the head is the embedding."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if model.config.tie_word_embeddings else total - model.get_input_embeddings().weight.nbytes


def copy_bandwidth(device: torch.device) -> tuple[float, str]:
    """Bytes read and written per second by a copy, the best of some, and how it was made: as `bench_cell` has it, but
    by torch on a GPU."""
    import torch

    if device.type == "cpu":
        return cpu_copy_bandwidth()
    source = torch.rand(_COPY_BYTES // 4, device=device)
    target = torch.rand_like(source)
    seconds = []
    for _ in range(1 + COPIES):
        started = _now(device)
        for _ in range(_IN_A_ROW):
            target.copy_(source)
        seconds.append(_now(device) - started)
    how = f"torch's copy_ of {_COPY_BYTES >> 20} MiB into memory that is there"
    return 2 * _COPY_BYTES * _IN_A_ROW / min(seconds[1:]), how


def _sentence(error: RuntimeError, device: torch.device) -> str | None:
    """What is to be said of an error that belongs to the cell; None if it does not."""
    import torch
    from torch._dynamo.exc import TorchDynamoException  # of inductor's too

    if isinstance(error, torch.OutOfMemoryError):
        used, limit = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory
        limit *= torch.cuda.get_per_process_memory_fraction()
        return f"does not fit: torch ran out of memory with {used / 1e9:.1f} GB in use of {limit / 1e9:.1f} GB"
    if "DefaultCPUAllocator" in str(error):
        return "does not fit: torch ran out of memory on the CPU"
    if isinstance(error, TorchDynamoException):
        cause = getattr(error, "inner_exception", error)
        said = str(cause).strip().partition("\n")[0]
        return f"torch.compile cannot compile the decode step: {type(cause).__name__}: {said}"
    return None


def _facts(cell: Cell, device: torch.device) -> dict[str, Any]:
    """What must be known beside the numbers; allocates nothing. attention: what transformers chose."""
    import torch

    model = build(cell, "meta")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": cores(),
        "attention": model.config._attn_implementation,
        "versions": versions("torch", "transformers"),
        "commit": commit(),
        "repeats": cell.repeats,
        "random_weights": True,
    }


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
    write_json(options.result, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
