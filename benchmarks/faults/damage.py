"""Damaged bytes in checkpoints and data shards: flipped bits, zeroed blocks, cut off files, deleted files."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

from benchmarks.faults.runs import (
    PATIENCE,
    SAVE_EVERY,
    STEPS,
    Place,
    Result,
    check_code,
    differences,
    resumed_from,
)

KINDS = ("flip", "zero", "truncate", "delete")
KEPT = 3  # checkpoints to go back to


def break_file(path: Path, kind: str, choose: random.Random) -> None:
    """Changes a file in one of the ways of KINDS, so that it is not what it was."""
    content = bytearray(path.read_bytes())
    if kind == "delete" or not content:
        path.unlink()
        return
    if kind == "truncate":
        del content[choose.randrange(len(content)) :]
    if kind == "flip":
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    if kind == "zero":
        size = min(len(content), choose.choice((1, 16, 512, 4096)))
        where = choose.randrange(len(content) - size + 1)
        if not any(content[where : where + size]):  # zeros already: others would be no damage
            where = next(i for i in range(len(content)) if content[i])
        content[where : where + size] = bytes(len(content[where : where + size]))
    path.write_bytes(content)


def copy_of_run(place: Place, name: str) -> Path:
    """A folder with data/ and a run/ that has its last KEPT checkpoints still to make, and KEPT before them."""
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "run"
    shutil.copytree(place.reference, run, ignore=shutil.ignore_patterns("checkpoints"))
    for step in range(STEPS - 2 * KEPT * SAVE_EVERY, STEPS - KEPT * SAVE_EVERY, SAVE_EVERY):
        shutil.copytree(place.reference / "checkpoints" / str(step), run / "checkpoints" / str(step))
    shutil.copytree(place.folder / "data", folder / "data")
    return folder


def one(place: Place, choose: random.Random, *, of_data: bool) -> dict:
    """Damages one file of a run, starts it, and tells what became of it: detected, harmless or missed."""
    folder = copy_of_run(place, "damaged")
    newest = max(int(path.name) for path in (folder / "run" / "checkpoints").iterdir())
    where = folder / "data" if of_data else folder / "run" / "checkpoints" / str(newest)
    files = sorted(path for path in where.rglob("*.bin" if of_data else "*") if path.is_file())
    path, kind = choose.choice(files), choose.choice(KINDS)
    break_file(path, kind, choose)
    log = folder / "log"
    code = place.launch(folder / "run", log, f"data.folder={folder / 'data'}").wait(timeout=PATIENCE)
    text = log.read_text(errors="replace")
    told = {"file": str(path.relative_to(folder)), "kind": kind, "code": code}
    if of_data and code == 2:
        return told | {"outcome": "detected" if path.name in text else "missed", "differing": []}
    check_code(code, 0, log)
    differing = differences(place, folder / "run")
    detected = f"step {newest} is unusable" in text and resumed_from(text) == newest - SAVE_EVERY
    outcome = "missed" if differing else "detected" if detected else "harmless"
    return told | {"outcome": outcome, "differing": differing, "reason": "".join(re.findall("unusable: .*", text)[:1])}


def damage(place: Place, rounds: int, seed: int) -> Result:
    """So many damaged files, every fourth of them a data shard; after each the run is started, and compared."""
    choose = random.Random(seed)
    done: list[dict] = []
    for number in range(rounds):
        done.append(one(place, choose, of_data=number % 4 == 3))
        what = done[-1]
        print(f"{number + 1}: {what['kind']} {what['file']}: {what['outcome']} (exit code {what['code']})", flush=True)

    def count(outcome: str) -> int:
        return sum(what["outcome"] == outcome for what in done)

    return Result(
        "a flipped bit, zeroed block, cut off or deleted file in the newest checkpoint or a data shard",
        "goes on from the checkpoint before, or stops and names the shard; never other numbers",
        rounds,
        f"{count('detected')} detected, {count('harmless')} harmless (unnoticed, but the end is bit-identical), "
        f"{count('missed')} missed",
        not count("missed"),
        {"damages": done},
    )
