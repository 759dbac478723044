"""Trains configs on the same tokens one after the other, and compares them: curves in one plot, perplexity, cost.

    python -m benchmarks.pair configs/llama-50m.yaml configs/lckv-50m.yaml --folder runs/pair [--plot FILE] [a.b=c ...]
        [--evaluate "files=[PATH/TO/held_out.txt]" ...]

The overrides hold for all runs, those after --evaluate for `evaluate`. The first config is the baseline of the ratios.
A finished run is only read, an interrupted one goes on. The printed table is Markdown. Seconds a step are medians; only
on a quiet machine is their ratio worth anything.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lckv_jax.config import RunConfig, load_config
from lckv_jax.describe import count_parameters
from lckv_jax.train.metrics import Record, read_metrics


class Result(NamedTuple):
    """One run: its name, configuration, metrics and what `evaluate` says of its last checkpoint."""

    name: str
    config: RunConfig
    records: list[Record]
    report: dict[str, Any]


def run(path: Path, folder: Path, overrides: list[str], evaluation: list[str]) -> Result:
    """Trains one config, unless that is done, and evaluates it, unless its scores are there already."""
    out, scores = folder / path.stem, folder / f"{path.stem}.json"
    overrides = [*overrides, f"out={out}", f"data.folder={folder / 'data'}"]
    command = [sys.executable, "-m", "lckv_jax"]
    subprocess.run([*command, "train", str(path), *overrides], check=True)
    if not scores.exists():
        subprocess.run([*command, "evaluate", str(out), f"out={scores}", *evaluation], check=True)
    records = read_metrics(out / "metrics.jsonl")
    return Result(path.stem, load_config(path, overrides), records, json.loads(scores.read_text()))


def draw(results: list[Result], path: Path) -> None:
    """Training (thin, smoothed over 20 steps) and validation loss of all runs over tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(results):
        train = [(r["tokens_seen"], r["loss"]) for r in result.records if r.get("loss") is not None]
        valid = [(r["tokens_seen"], r["valid_loss"]) for r in result.records if r.get("valid_loss") is not None]
        smooth = [statistics.fmean(loss for _, loss in train[max(0, i - 19) : i + 1]) for i in range(len(train))]
        axes.plot([tokens for tokens, _ in train], smooth, f"C{number}-", lw=0.8, alpha=0.6)
        label = f"{result.name}: {result.config.model.sharing}"
        axes.plot(*zip(*valid), f"C{number}o-", ms=3.5, lw=1.4, label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.set_title("validation (marked) and training loss at equal tokens", fontsize="medium")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def step_seconds(result: Result) -> float:
    """Median over all steps but the first, which compiles."""
    return statistics.median(r["seconds"] for r in result.records if r.get("seconds") and r["step"] > 1)


def table(results: list[Result]) -> list[str]:
    """One column a run."""
    first = results[0]

    def row(name: str, values: list[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def cache(result: Result) -> int:
        model = result.config.model
        return model.sharing.cache_bytes_per_token(model.num_kv_heads, model.head_dim, 2)

    def flops(result: Result) -> float:
        return result.config.model.flops(result.config.data.seq_len).train

    rows = [row("", [result.name for result in results]), row("---", ["---"] * len(results))]
    rows.append(row("parameters", [f"{count_parameters(r.config.model):,}" for r in results]))
    rows.append(row("K,V bytes a token (bfloat16)", [f"{cache(r):,}" for r in results]))
    rows.append(row("training tokens", [f"{r.records[-1]['tokens_seen']:,}" for r in results]))
    scores = [{score["passes"]: score for score in r.report["reports"]} for r in results]
    for passes in dict.fromkeys(name for score in scores for name in score):
        # a map without passes has one report, which holds for all settings
        chosen = [score.get(passes) or next(iter(score.values())) for score in scores]
        rows.append(row(f"perplexity, {passes} passes", [f"{score['perplexity']:.2f}" for score in chosen]))
        rows.append(row(f"bits per byte, {passes} passes", [f"{score['bits_per_byte']:.4f}" for score in chosen]))
    rows.append(row("seconds a step", [f"{step_seconds(r):.2f}" for r in results]))
    rows.append(row("ratio of seconds", [f"{step_seconds(r) / step_seconds(first):.2f}" for r in results]))
    rows.append(row("ratio of training FLOPs by formula", [f"{flops(r) / flops(first):.2f}" for r in results]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG | a.b=c")
    parser.add_argument("--folder", type=Path, default=Path("runs/pair"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--evaluate", nargs="*", default=[], metavar="a.b=c")
    options = parser.parse_intermixed_args()
    overrides = [argument for argument in options.configs if "=" in argument]
    paths = [Path(argument) for argument in options.configs if "=" not in argument]
    results = [run(path, options.folder, overrides, options.evaluate) for path in paths]
    if options.plot:
        draw(results, options.plot)
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
