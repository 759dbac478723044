"""How long zero-shot tasks take: seconds, programs compiled and items a second, task by task.

    python -m benchmarks.zero_shot MODEL --data FOLDER [--tokenizer FILE] [--tasks NAME,...] [--limit 200]
                                   [--passes trained] [--max-length 1024] [--batch-tokens 4096]

MODEL is a run folder or a checkpoint, or a YAML config such as configs/lckv-50m.yaml, whose parameters are then random;
that needs --tokenizer, a .model or tokenizer.json. FOLDER holds the jsonl files that configs/eval names. The time of a
task includes compilation, and for passes that are not exact the exact ones on its first 50 items, whose share is told:
random parameters need many more of those than trained ones.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

TASKS = "hellaswag,openbookqa,winogrande,arc_easy,arc_challenge,boolq,piqa,lambada"


def load_model(model: str, tokenizer: str | None) -> tuple[Any, Any, Any]:
    """Parameters, model config and tokenizer."""
    from lckv_jax.checkpoint import load
    from lckv_jax.config import load_config
    from lckv_jax.data.tokenizer import load_tokenizer
    from lckv_jax.model.transformer import init_params

    if not model.endswith(".yaml"):
        params, run, own = load(model)
        return params, run.model, load_tokenizer(tokenizer) if tokenizer else own
    if tokenizer is None:
        raise SystemExit("a config has no tokenizer; give --tokenizer FILE")
    config = load_config(model).model
    return init_params(config, jax.random.key(0)), config, load_tokenizer(tokenizer)


@contextmanager
def exact_seconds(lm: Any) -> Iterator[Callable[[], float]]:
    """Seconds that requests by exact passes took so far, of which the model's own passes know nothing."""
    spent, score = [0.0], lm.continuations.score

    def timed(requests: Any, passes: Any) -> Any:
        started = time.monotonic()
        yield from score(requests, passes)
        spent[0] += (time.monotonic() - started) * (passes != lm.passes)

    lm.continuations.score = timed
    yield lambda: spent[0]
    lm.continuations.score = score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--passes", default="trained")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    wanted = parser.parse_args()
    from lckv_jax.evaluate.harness import HarnessModel
    from lckv_jax.evaluate.tasks import load_tasks, run_task

    passes = wanted.passes if wanted.passes in ("trained", "exact") else float(wanted.passes)
    params, config, tokenizer = load_model(wanted.model, wanted.tokenizer)
    lm = HarnessModel(
        params, config, tokenizer, passes=passes, max_length=wanted.max_length, batch_tokens=wanted.batch_tokens
    )
    print(f"{'task':<15}{'items':>6}{'seconds':>9}{'exact':>8}{'compiled':>9}{'items/s':>9}  metrics", flush=True)
    total = sampled = 0.0
    with exact_seconds(lm) as exact:
        for task in load_tasks(wanted.tasks.split(","), data=wanted.data):
            result = run_task(lm, task, limit=wanted.limit)
            took, total, sampled = exact() - sampled, total + result.seconds, exact()
            rate = result.items / (result.seconds - took)
            metrics = ", ".join(f"{name} {value:.4g}" for name, (value, _) in result.metrics.items())
            print(
                f"{result.task:<15}{result.items:>6}{result.seconds:>9.1f}{took:>8.1f}{result.compilations:>9}{rate:>9.2f}"
                f"  {metrics}",
                flush=True,
            )
    print(f"{total:.1f} s, of which {sampled:.1f} s for exact passes; {lm.compilations} programs compiled")


if __name__ == "__main__":
    main()
