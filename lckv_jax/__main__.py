"""`python -m lckv_jax COMMAND ...`: one table of commands; each is one function elsewhere."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lckv_jax.config import load_config
from lckv_jax.errors import INTERRUPTED, MISTAKE, STOPPED, Stopped, UserError

PROGRAM = "python -m lckv_jax"


def _train(options: argparse.Namespace) -> None:
    from lckv_jax.parallel import processes
    from lckv_jax.train.loop import train

    config = load_config(options.config, options.overrides)
    processes.start(_flags(options), config.processes)
    train(config)


def _processes(options: argparse.Namespace) -> None:
    from lckv_jax.config import ProcessesConfig, read_overrides
    from lckv_jax.parallel.roll_call import roll_call

    roll_call(_flags(options), read_overrides(ProcessesConfig, options.overrides, "processes"))


def _flags(options: argparse.Namespace) -> Any:
    from lckv_jax.parallel.identity import Flags

    return Flags(options.coordinator, options.processes, options.process)


def _prepare(options: argparse.Namespace) -> None:
    from lckv_jax.data import prepare

    config = load_config(options.config, options.overrides)
    if options.verify:
        prepare.verify(config.data.folder, print)
        return
    manifest = prepare.prepare(config.data, config.model.vocab_size)
    print(f"{config.data.folder}: {manifest.train.tokens:,} training and {manifest.valid.tokens:,} validation tokens")


def _describe(options: argparse.Namespace) -> None:
    from lckv_jax.describe import describe
    from lckv_jax.parallel.topology import parse_topology

    plot = None if options.plot is None else Path(options.plot or f"{Path(options.config).stem}-map.png")
    topology = None if options.topology is None else parse_topology(options.topology)
    config = load_config(options.config, options.overrides)
    print(describe(config, compiled=options.compile, plot=plot, topology=topology))


def _evaluate(options: argparse.Namespace) -> None:
    if options.suite is not None:
        from lckv_jax.evaluate.suite import evaluate_suite

        evaluate_suite(options.checkpoint, options.suite, options.overrides)
        return
    from lckv_jax.evaluate.perplexity import evaluate

    evaluate(options.checkpoint, options.overrides)


def _bench(options: argparse.Namespace) -> None:
    from lckv_jax.decode.bench import bench

    bench(options.config, options.overrides)


def _import(options: argparse.Namespace) -> None:
    _leave_accelerators_alone()
    from lckv_jax.convert.import_hub import import_hub

    import_hub(
        options.folder,
        options.out,
        sharing=options.sharing,
        how=options.how,
        num_kv_heads=options.num_kv_heads,
        window_includes_self=options.window_includes_self == "yes",
    )


def _generate(options: argparse.Namespace) -> None:
    from lckv_jax.decode.prompts import generate_text

    generate_text(options.checkpoint, options.overrides)


def _share(options: argparse.Namespace) -> None:
    from lckv_jax.share.command import share

    names = ("layers", "data", "order", "metric", "sweep", "heal")
    share(options.checkpoint, options.out, options.overrides, {name: getattr(options, name) for name in names})


def _export(options: argparse.Namespace) -> None:
    _leave_accelerators_alone()
    from lckv_jax.convert.export import export

    export(
        options.checkpoint,
        options.out,
        format=options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )


def _leave_accelerators_alone() -> None:
    """For commands that only move numbers, while an accelerator may be training."""
    import jax

    jax.config.update("jax_platforms", "cpu")


class _Argument(NamedTuple):
    """The arguments of `ArgumentParser.add_argument`."""

    name: str
    settings: dict[str, Any]


class _Command(NamedTuple):
    """What a command runs, its line of help, and its arguments."""

    function: Callable[[argparse.Namespace], None]
    help: str
    arguments: tuple[_Argument, ...]


_CONFIG = _Argument("config", {"metavar": "CONFIG", "help": "a YAML file, such as configs/quickstart.yaml"})
_CHECKPOINT = _Argument("checkpoint", {"metavar": "CHECKPOINT", "help": "a run's folder, or one of its checkpoints"})
_SETTINGS = _Argument(
    "overrides",
    {
        "nargs": "*",
        "default": [],
        "metavar": "a=b",
        "help": "files, passes, seq_len, batch_size, max_tokens, packing, out, as in files=texts/*.txt (see "
        "docs/training.md); cache, prompt_tokens, by_position, plot (see docs/generate.md); with --suite those of the "
        "suite, as in tasks.limit=200 (see docs/evaluate.md)",
    },
)
_SUITE = _Argument(
    "--suite",
    {
        "metavar": "SUITE",
        "help": "a YAML file of texts, tasks and caches to measure, such as configs/suites/quick.yaml",
    },
)
_GENERATION = _Argument(
    "overrides",
    {
        "nargs": "*",
        "default": [],
        "metavar": "a=b",
        "help": "prompt, file, out, max_new_tokens, cache, passes, sampling.temperature and others, as in "
        'prompt="import os" (see docs/generate.md)',
    },
)
_OVERRIDES = _Argument(
    "overrides",
    {"nargs": "*", "default": [], "metavar": "a.b=c", "help": "overrides, such as optimizer.learning_rate=1e-3"},
)
_BENCH = _Argument("config", {"metavar": "CONFIG", "help": "a YAML file, such as configs/bench/50m.yaml"})
_CELLS = _Argument(
    "overrides",
    {"nargs": "*", "default": [], "metavar": "a.b=c", "help": "overrides, such as batches=[1,8] or memory_gb=24"},
)
_WAITS = _Argument(
    "overrides",
    {"nargs": "*", "default": [], "metavar": "a=b", "help": "such as initialize_seconds=60 (see docs/training.md)"},
)
_JOINING = (
    _Argument("--coordinator", {"metavar": "HOST:PORT", "help": "of process 0; needed only where no launcher tells "
                                "JAX, or the JAX_... variables (see docs/launch.md)"}),
    _Argument("--processes", {"metavar": "N", "type": int, "help": "how many there are"}),
    _Argument("--process", {"metavar": "I", "type": int, "help": "the number of this one, from 0"}),
)  # fmt: skip
_VERIFY = _Argument("--verify", {"action": "store_true", "help": "only check the prepared shards against their hashes"})
_COMPILE = _Argument(
    "--compile", {"action": "store_true", "help": "compile the train step; tell its memory and collectives"}
)
_TOPOLOGY = _Argument(
    "--topology",
    {
        "metavar": "NAME",
        "help": "hardware that need not be there, such as v5e-16, 2xv5p-64, or gpu-8 (fake devices); for --compile, "
        "TPUs need libtpu",
    },
)
_PLOT = _Argument(
    "--plot", {"nargs": "?", "const": "", "metavar": "FILE", "help": "draw the map (default: CONFIG's name-map.png)"}
)
_IMPORT = (
    _Argument("folder", {"metavar": "FOLDER", "help": "a Hugging Face folder of type llama, lckv-llama or lckv"}),
    _Argument("out", {"metavar": "OUT", "help": "the run folder to write"}),
    _Argument("--sharing", {"metavar": "MAP", "help": "convert to this map, such as lckv(warmup=2)"}),
    _Argument("--how", {"choices": ("mean", "own"), "default": "mean",
                        "help": "K/V projections of an owner: the mean over the layers that read it, or its own"}),
    _Argument("--num-kv-heads", {"metavar": "K", "type": int, "help": "average K/V heads to so many"}),
    _Argument("--window-includes-self", {"choices": ("yes", "no"), "default": "yes",
                                         "help": "no: trained by the official flash scripts, one token wider"}),
)  # fmt: skip
_OUT = _Argument("out", {"metavar": "OUT", "help": "a folder that is not there yet"})
_FORMAT = _Argument(
    "--format",
    {
        "choices": ("auto", "lckv", "lckv-llama"),
        "default": "auto",
        "help": "lckv brings its own PyTorch module, lckv-llama has the official code's names; auto (the default) is "
        "plain llama where that is the model, else lckv",
    },
)
_DTYPE = _Argument(
    "--dtype",
    {"choices": ("float32", "bfloat16", "float16"), "help": "of the weights (default: as they are in the checkpoint)"},
)
_SHARD = _Argument(
    "--max-shard-size", {"default": "5GB", "metavar": "SIZE", "help": "of one file of weights (default: 5GB)"}
)
_SHARE = (
    _Argument("--layers", {"metavar": "C", "type": int, "help": "how many layers give up their K,V"}),
    _Argument("--data", {"metavar": "TEXT", "action": "append", "help": "files to calibrate on, as in data.sources; "
                         "may be given several times (default: the run's validation split)"}),
    _Argument("--order", {"metavar": "ORDER", "help": "pairs tried first: dissimilar (the default), similar, random"}),
    _Argument("--metric", {"metavar": "METRIC", "help": "token_l2 (the default, the released code) or flat_l2 (the "
                           "paper)"}),
    _Argument("--sweep", {"action": "store_const", "const": True, "help": "measure all numbers of layers and orders "
                          "instead; OUT gets tables and a plot"}),
    _Argument("--heal", {"metavar": "STEPS", "type": int, "help": "train on for so many steps; tell what comes back"}),
    _Argument("overrides", {"nargs": "*", "default": [], "metavar": "a=b", "help": "threshold, sentences, tokens, "
                            "files, max_tokens, cache, passes and others (see docs/share.md)"}),
)  # fmt: skip

_COMMANDS = {
    "train": _Command(_train, "pretrain; resumes by itself", (_CONFIG, _OVERRIDES, *_JOINING)),
    "prepare": _Command(_prepare, "text to token shards (train does it where it is missing)",
                        (_CONFIG, _OVERRIDES, _VERIFY)),
    "describe": _Command(_describe, "the map, parameters, KV bytes, FLOPs and memory of a config",
                         (_CONFIG, _OVERRIDES, _COMPILE, _TOPOLOGY, _PLOT)),
    "evaluate": _Command(_evaluate, "perplexity, bits per byte and tasks of a checkpoint",
                         (_CHECKPOINT, _SETTINGS, _SUITE)),
    "generate": _Command(_generate, "text from a checkpoint", (_CHECKPOINT, _GENERATION)),
    "bench": _Command(_bench, "what sharing buys at inference: latency, throughput, memory; goes on by itself",
                      (_BENCH, _CELLS)),
    "processes": _Command(_processes, "who joins a run from here: processes, devices, a collective",
                          (_WAITS, *_JOINING)),
    "import": _Command(_import, "a Hugging Face folder to a run folder, also with another map", _IMPORT),
    "share": _Command(_share, "fewer caches for a finished model, without training (KVSharer), and what that costs",
                      (_CHECKPOINT, _OUT, *_SHARE)),
    "export": _Command(_export, "a checkpoint as a Hugging Face folder, for PyTorch",
                       (_CHECKPOINT, _OUT, _FORMAT, _DTYPE, _SHARD)),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Mistakes are one sentence with the usage, as everywhere."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ").replace(" [-h]", "")
        raise UserError(f"{self.prog.removeprefix(PROGRAM).strip()}: {message}; write {usage}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 0, 2 after one sentence about what the user can mend, 42 after SIGTERM.

    Where several processes run it together, a failure ends this one, and the others with it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(_overview())
        return 0 if words else MISTAKE
    try:
        command = _find(words[0])
        command.function(_parser(words[0], command).parse_intermixed_args(words[1:]))
    except UserError as error:
        return _failed(MISTAKE, str(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(INTERRUPTED, "the reader of its output is gone") if _joined() else 0
    except KeyboardInterrupt as interrupt:
        again = "stopped; nothing that was saved is lost: run the same command again"
        return _failed(INTERRUPTED, str(interrupt) or again)
    except Stopped as stopped:
        return _ended(STOPPED, str(stopped))
    return _ended(0)


def _failed(code: int, words: str) -> int:
    if processes := _joined():
        processes.leave(code, words)
    print(f"error: {words}" if code == MISTAKE else words, file=sys.stderr)
    return code


def _ended(code: int, words: str = "") -> int:
    """What all processes come to together is told by the first."""
    processes = _joined()
    if words and (processes is None or processes.index() == 0):
        print(words, file=sys.stderr)
    if processes:
        processes.end()
    return code


def _joined() -> Any:
    """lckv_jax.parallel.processes, if this process is one of several."""
    module = sys.modules.get("lckv_jax.parallel.processes")
    return module if module is not None and module.count() > 1 else None


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    return "\n".join([
        f"usage: {PROGRAM} COMMAND ...",
        "",
        "Pretraining of transformers whose layers share keys and values.",
        "",
        *(f"  {name:<{width}}  {command.help}" for name, command in _COMMANDS.items()),
        "",
        f"{PROGRAM} COMMAND --help tells its arguments.",
    ])  # fmt: skip


def _find(name: str) -> _Command:
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no command {name!r}; {hint}(commands: {', '.join(_COMMANDS)})")
    return _COMMANDS[name]


def _parser(name: str, command: _Command) -> _Parser:
    parser = _Parser(prog=f"{PROGRAM} {name}", description=command.help, allow_abbrev=False)
    for argument in command.arguments:
        parser.add_argument(argument.name, **argument.settings)
    return parser


def _leave(code: int) -> NoReturn:
    """Ends the process. After Ctrl-C without the interpreter's own end, which crashes while XLA still compiles or
    computes in other threads; everything is saved by then."""
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
