"""`python -m lckv_jax COMMAND ...`: one table of commands; each is one function elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lckv_jax.config import RunConfig, load_config
from lckv_jax.errors import Stopped, UserError


def _train(config: RunConfig) -> None:
    from lckv_jax.train.loop import train

    train(config)


def _prepare(config: RunConfig) -> None:
    from lckv_jax.data.prepare import prepare

    manifest = prepare(config.data, config.model.vocab_size)
    print(f"{config.data.folder}: {manifest.train.tokens:,} training and {manifest.valid.tokens:,} validation tokens")


def _describe(config: RunConfig) -> None:
    from lckv_jax.describe import describe

    print(describe(config))


class _Command(NamedTuple):
    function: Callable[[RunConfig], None]
    help: str


_COMMANDS = {
    "train": _Command(_train, "pretrain; resumes by itself"),
    "prepare": _Command(_prepare, "text to token shards (train does it where it is missing)"),
    "describe": _Command(_describe, "the sharing map, parameters, KV bytes and FLOPs of a config"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 0, 2 after one sentence about what the user can mend, 42 after SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m lckv_jax", description="Pretraining of transformers whose layers share keys and values."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        subparser.add_argument("config", help="a YAML file, such as configs/quickstart.yaml")
        subparser.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="overrides, such as optimizer.learning_rate=1e-3"
        )
    options = parser.parse_args(arguments)
    try:
        _COMMANDS[options.command].function(load_config(options.config, options.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 42
    return 0


if __name__ == "__main__":
    sys.exit(main())
