"""Seconds that the PyTorch module needs to generate on the CPU: the prompt, each further token, and all of it.

    python -m benchmarks.torch_generate [--config configs/lckv-50m.yaml] [--batch 1 8] [--prompt 64] [--new 64]
                                        [--threads 2] [--repeats 5] [--passes trained]

Random weights, random prompts, greedy, medians of the repeats after one warm-up. Each line ends with the CPU seconds in
each second: well below --threads, others were using the cores, and the times are worth nothing. First it checks, on a
small model of the same map, that cached tokens are those of exact passes over the whole text at every step.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin

from lckv_jax.config import load_config
from lckv_jax.convert.hub_config import hub_config
from lckv_jax.convert.torch_model import LckvConfig, LckvForCausalLM
from lckv_jax.errors import UserError


class Times(NamedTuple):
    """Seconds of the prompt with its first token, of all tokens, and the CPU seconds of the latter for each second."""

    prompt: float
    total: float
    busy: float


def build(keys: dict[str, Any], **changes: Any) -> GenerationMixin:
    torch.manual_seed(0)
    return LckvForCausalLM(LckvConfig(**{**keys, **changes})).eval()


def generate(model: GenerationMixin, prompt_BT: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    """Exactly `new` greedy tokens for each row."""
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(prompt_BT, max_new_tokens=new, **options)[:, prompt_BT.shape[1] :]


def check_tokens(keys: dict[str, Any]) -> str:
    """Compares cached tokens with those of exact passes without a cache."""
    small = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.15}
    model = build(keys, **small, num_attention_heads=4, num_key_value_heads=2, passes="exact")
    prompt = torch.randint(256, (4, 24))
    cached, whole = (generate(model, prompt, 24, use_cache=use_cache) for use_cache in (True, False))
    return f"{int((cached == whole).sum())} of {whole.numel()} cached tokens as without a cache"


def measure(model: GenerationMixin, prompt: torch.Tensor, new: int) -> Times:
    started = time.perf_counter()
    generate(model, prompt, 1)
    first = time.perf_counter() - started
    started, cpu = time.perf_counter(), time.process_time()
    generate(model, prompt, new)
    total = time.perf_counter() - started
    return Times(first, total, (time.process_time() - cpu) / total)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/lckv-50m.yaml"))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", default="trained", help="trained, exact or a tolerance: passes over the prompt")
    options = parser.parse_args(arguments)
    if options.new < 2:
        raise UserError(f"--new is {options.new}; a time for each further token needs at least 2")
    torch.set_num_threads(options.threads)
    config = load_config(options.config).model
    length = options.prompt + options.new
    keys = hub_config(config, format="lckv", max_position_embeddings=length, dtype="float32", bos_id=None, eos_id=None)
    named = options.passes in ("trained", "exact")
    model = build(keys, passes=options.passes if named else float(options.passes))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"torch {torch.__version__}, {options.threads} threads, {millions:.1f} M parameters, {config.sharing}")
    print(check_tokens(keys))
    print(
        f"{'batch':>5} {'prompt + 1 token':>17} {'a further token':>16} {'total, median (min - max)':>28} {'busy':>5}"
    )
    for batch in options.batch:
        prompt = torch.randint(config.vocab_size, (batch, options.prompt))
        times = [measure(model, prompt, options.new) for _ in range(options.repeats + 1)][1:]
        first, total, busy = (statistics.median(column) for column in zip(*times))
        further = statistics.median((t.total - t.prompt) / (options.new - 1) for t in times)
        spread = f"{total:.3f} s ({min(t.total for t in times):.3f} - {max(t.total for t in times):.3f})"
        print(f"{batch:>5} {first:>15.3f} s {further * 1e3:>13.2f} ms {spread:>28} {busy:>5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
