"""Faults injected into real runs on this machine: kills, damage, full disks, hangs. Each row is a command.

    python -m benchmarks.faults ROW [--rounds N] [--seed 0] [--folder FOLDER] [--update docs/reliability.md]

Prints a row of the table in docs/reliability.md, and writes what lies behind it to FOLDER/ROW.json. The runs are those
of a tiny model in 2 processes; they, their data and their compiled programs stay in FOLDER and serve the next row.
Exit code 1 if a promise was broken. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks.faults import costs, damage, disk, kills, peers
from benchmarks.faults.runs import Place, Result, prepare


class Row(NamedTuple):
    run: Callable[[Place, int, int], Result]
    rounds: int  # unless told otherwise


ROWS = {
    "kills": Row(kills.kills, 50),
    "damage": Row(damage.damage, 60),
    "killed-peer": Row(peers.killed_peer, 6),
    "frozen-peer": Row(peers.frozen_peer, 4),
    "hang": Row(peers.hang, 4),
    "exception": Row(peers.exception, 6),
    "sigterm": Row(peers.sigterm, 6),
    "disk-full": Row(disk.disk_full, 5),
    "read-only": Row(disk.read_only, 5),
    "clock": Row(disk.clock, 5),
    "overhead": Row(costs.overhead, 5),
    "processes": Row(costs.processes, 3),
}


def line(name: str, result: Result) -> str:
    """The row of the table, which begins with its name."""
    kept = "yes" if result.kept else "**no**"
    return f"| `{name}` | {result.fault} | {result.promise} | {result.rounds} | {result.found} | {kept} |"


def update(page: Path, name: str, row: str) -> None:
    """Puts a row in the place of the one of that name."""
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    at = [number for number, text in enumerate(lines) if text.startswith(f"| `{name}` |")]
    if len(at) != 1:
        sys.exit(f"{page} has {len(at)} rows of {name}, not one")
    lines[at[0]] = row + "\n"
    page.write_text("".join(lines), encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--update", type=Path, metavar="PAGE", help="a page whose row of that name is to be replaced")
    options = parser.parse_args(words)
    jax.config.update("jax_platforms", "cpu")  # for the comparisons here; an accelerator is left alone
    row = ROWS[options.row]
    place = prepare(options.folder.absolute(), processes=2, devices=1)
    result = row.run(place, options.rounds or row.rounds, options.seed)
    (place.folder / f"{options.row}.json").write_text(json.dumps(result._asdict(), indent=1) + "\n", encoding="utf-8")
    print(line(options.row, result))
    if options.update:
        update(options.update, options.row, line(options.row, result))
    return 0 if result.kept else 1


if __name__ == "__main__":
    sys.exit(main())
