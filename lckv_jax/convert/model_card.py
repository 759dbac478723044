"""The model card (README.md) of an exported folder: what the model is, how it was trained, how to load it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lckv_jax.checkpoint import Stored
from lckv_jax.config import RunConfig, SourceConfig
from lckv_jax.convert.hub_config import Format
from lckv_jax.model_config import ModelConfig
from lckv_jax.sharing import KVSharing

_LEGEND = """[K,V] computes keys and values; ^ reads a layer above, strictly earlier tokens; v reads one below; \
+|+ layers that are solved together by passes."""

_NEEDS: dict[Format, str] = {
    "llama": "This is a plain Llama model: transformers load it as it is.",
    "lckv": "The model is computed by `modeling_lckv.py` in this folder, so transformers (version 5) want your consent "
    "to run it: `trust_remote_code=True`.",
    "lckv-llama": "Names and keys are those of the official LCKV code, https://github.com/whyNLP/LCKV: it must be "
    "importable, with transformers 4.45.",
}
_WRONG_THERE = """Take its logits of a text only: its `generate` of a map with cyclic spans, as this one, gives wrong \
tokens, with a cache as without. An export in the default format generates them rightly."""

_EXACT = """The prompt is solved by as many passes as in training. `from_pretrained(..., passes="exact")` makes as \
many as its tokens need to stand still, and a number such as `passes=1e-2` stops at that change of K,V."""


def model_card(stored: Stored, *, title: str, format: Format, dtype: str, context: int) -> str:
    """Markdown with a YAML head. title: of the card. dtype: of the tensors. context: tokens the model was made for."""
    config, trained = stored.config, stored.meta["step"] > 0
    return "\n".join([
        *_head(format),
        f"# {_printable(title)}",
        "",
        *_about(config, trained=trained),
        "",
        "## Load it",
        "",
        *_loading(format, title, config.model, has_tokenizer=stored.tokenizer is not None),
        "",
        "## Architecture",
        "",
        *_table(_sizes(stored, dtype, context)),
        "",
        f"Sharing map `{config.model.sharing}`:",
        "",
        "```",
        config.model.sharing.diagram(),
        "```",
        "",
        _LEGEND,
        "",
        *(["## Training", "", *_table(_training(stored)), ""] if trained else []),
    ])  # fmt: skip


def _printable(title: str) -> str:
    """One line of UTF-8, whatever a folder is called."""
    return " ".join(title.encode(errors="replace").decode().split())


def _head(format: Format) -> list[str]:
    tags = ["lckv-jax", format, *(["custom_code"] if format == "lckv" else [])]
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(tags)),
        "---",
        "",
    ]


def _about(config: RunConfig, *, trained: bool) -> Iterator[str]:
    """trained: False for step 0, as an import is, whose config proposes a training that has not been."""
    owners, layers = len(config.model.sharing.owners), config.model.num_layers
    if owners == layers and not config.model.sharing.cyclic:
        what = f"A Llama-style language model of {_counted(layers, 'layer')}."
    else:
        computes = "one of them computes" if owners == 1 else f"{owners} of them compute"
        what = (
            f"A Llama-style language model whose {layers} layers share keys and values: {computes} K,V, "
            "which the others read."
        )
    if trained and config.init_from is not None:
        yield f"{what} Trained with lckv_jax from the weights of `{_last_part(config.init_from)}`."
    elif trained:
        yield f"{what} Pretrained with lckv_jax."
    elif config.init_from is None:
        yield f"{what} It is not trained: its weights are random."
    else:
        yield (
            f"{what} Its weights are those of another model, taken by lckv_jax (and converted, if that one had another "
            "sharing map or more K/V heads) and not trained further."
        )


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _loading(format: Format, title: str, model: ModelConfig, *, has_tokenizer: bool) -> Iterator[str]:
    generates = format != "lckv-llama" or not model.sharing.cyclic
    yield _NEEDS[format] if generates else f"{_NEEDS[format]} {_WRONG_THERE}"
    yield ""
    yield "```python"
    if format == "lckv-llama":
        yield "import models  # of the official code: registers lckv-llama"
    yield "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else "")
    yield ""
    yield f"folder = {title!r}  # where this folder lies"
    trusted = ", trust_remote_code=True" if format == "lckv" else ""
    yield f"model = AutoModelForCausalLM.from_pretrained(folder{trusted})"
    if has_tokenizer:
        yield f"tokenizer = AutoTokenizer.from_pretrained(folder{trusted})"
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if has_tokenizer and generates:
        yield "tokens = model.generate(**inputs, max_new_tokens=64)"
        yield "print(tokenizer.decode(tokens[0], skip_special_tokens=True))"
    if has_tokenizer:
        yield ""
        yield "# for batches of several texts, unless there is a pad token: tokenizer.pad_token = tokenizer.eos_token"
    yield "```"
    if format == "lckv" and model.sharing.cyclic:
        yield ""
        yield _EXACT


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _sizes(stored: Stored, dtype: str, context: int) -> dict[str, str]:
    model = stored.config.model
    standard = KVSharing.parse("standard", model.num_layers)
    mine, theirs = (
        sharing.cache_bytes_per_token(model.num_kv_heads, model.head_dim) for sharing in (model.sharing, standard)
    )
    rows = {
        "parameters": f"{sum(math.prod(leaf.shape) for leaf in stored.leaves.values()):,} ({dtype})",
        "vocabulary": f"{model.vocab_size:,}" + (", embedding and head tied" if model.tie_embeddings else ""),
        "layers, width, MLP width": f"{model.num_layers}, {model.hidden_size:,}, {model.intermediate_size:,}",
        "query heads, K/V heads, head size": f"{model.num_heads}, {model.num_kv_heads}, {model.head_dim}",
        "context": f"{context:,} tokens",
        "rotary base": f"{model.rope_theta:g}"
        + (f", {model.rope_scaling.type} scaling by {model.rope_scaling.factor:g}" if model.rope_scaling else ""),
        "K,V cache per token": f"{mine:,} bytes in bfloat16; {theirs:,} with the standard map ({mine / theirs:.3f} x)",
    }
    if any(model.sharing.windowed):
        rows["sliding window"] = f"{model.window:,} tokens in layers marked so"
    if model.strict_everywhere:
        rows["attention"] = "every layer reads strictly earlier tokens"
    return rows


def _training(stored: Stored) -> dict[str, str]:
    config, step = stored.config, stored.meta["step"]
    batch = f"{_counted(config.data.batch_size, 'row')} of {_counted(config.data.seq_len, 'token')}"
    tokens = stored.meta.get("tokens_seen")
    tokens = step * config.data.batch_size * config.data.seq_len if tokens is None else tokens
    rows = {"steps": f"{step:,} of {config.train.steps:,}", "tokens seen": f"{tokens:,}"}
    if config.init_from is not None:
        rows["started from"] = f"`{_last_part(config.init_from)}`"
    rows |= {
        "data": ", ".join(map(_source, config.data.sources)),
        "batch": batch,
        "optimiser": _optimizer(config),
        "learning rate": _learning_rate(config),
    }
    if config.model.sharing.cyclic:
        rows["passes over a cyclic span"] = _passes(config)
    if stored.averaged:
        rows["parameters are"] = f"an exponential moving average, decay {config.train.ema_decay:g}"
    rows["validation"] = _validation(stored)
    return rows


def _last_part(path: str) -> str:
    """The name of a run: a card is published, so it tells no folder of this machine."""
    parts = [part for part in Path(path).parts if not part.isdecimal() and part != "checkpoints"]
    return parts[-1] if parts else path


def _source(source: SourceConfig) -> str:
    name = "the source code of Python's standard library" if source.path == "builtin" else f"`{source.path}`"
    return name if source.weight is None else f"{name} ({source.weight:.1%})"


def _optimizer(config: RunConfig) -> str:
    made = config.optimizer
    clip = "no clipping" if made.clip_norm is None else f"gradients clipped to norm {made.clip_norm:g}"
    betas = "" if made.name == "adafactor" else f", betas {made.b1:g} and {made.b2:g}"
    return f"{made.name}{betas}, weight decay {made.weight_decay:g}, {clip}"


def _learning_rate(config: RunConfig) -> str:
    made = config.optimizer
    return f"{made.learning_rate:g}, {made.schedule} schedule after {_counted(made.warmup_steps, 'step')} of warm-up"


def _passes(config: RunConfig) -> str:
    model, schedule = config.model, config.train.no_grad_passes_schedule
    line = f"m = {model.no_grad_passes} without and b = {model.grad_passes} with gradient, start: {model.start}"
    if schedule:
        line += ", m by step: " + ", ".join(f"{m} from {step:,}" for step, m in schedule)
    return line + (f", until a change of {model.tolerance:g}" if model.tolerance else "")


def _validation(stored: Stored) -> str:
    """The newest validation that the checkpoint or the run's metrics.jsonl tell of, up to its step."""
    step, loss = stored.meta["step"], stored.meta.get("valid_loss")
    if loss is None:
        told = [record for record in _records(stored.run / "metrics.jsonl") if record["step"] <= step]
        if not told:
            return "never validated"
        step, loss = told[-1]["step"], told[-1]["valid_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return f"perplexity {perplexity:,.2f} (loss {loss:.4f} nats a token) at step {step:,}"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl with a step and a validation loss; a line that is none, as one torn by a kill, is
    left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and type(record.get("step")) is int and _is_number(record.get("valid_loss")):
                yield record


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # no NaN either
