"""How fast batches are read and text is prepared, on one core.

    python -m benchmarks.data [--text GLOB] [--tokenizer FILE.model] [--rounds 5] [--json FILE]

Reading: tokens a second of masked batches of 16 x 1024 through `iterate`, bytes already checked; goal 5 M.
Preparing: the tokenising stage of `prepare` against sentencepiece's `encode` alone, one thread, on the same documents,
in turns; goal 80 %. Without --text, on generated text.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data.batches import batches, iterate
from lckv_jax.data.corpora import documents
from lckv_jax.data.prepare import load_manifest, prepare
from lckv_jax.data.tokenizer import train_sentencepiece

B, T = 16, 1024
VOCAB = 8192
READ_STEPS = 300
ENCODE_CHARS = 4 << 20  # as much at once as `prepare`


def write_texts(folder: Path, megabytes: int) -> str:
    """Documents of some thousand characters of words whose lengths and frequencies resemble those of English."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ol", "un")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with (folder / "texts.jsonl").open("w") as file:
        while file.tell() < megabytes * 1_000_000:
            text = " ".join(rng.choices(words, weights, k=rng.randint(50, 1000)))
            file.write(json.dumps({"text": text + ".\n"}) + "\n")
    return str(folder / "texts.jsonl")


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of all threads; says more where others use the machine

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


def read_batches(data: DataConfig) -> Seconds:
    """Of READ_STEPS batches."""
    manifest = load_manifest(data.folder)
    dataset = batches(data.folder, manifest, "train", seq_len=T, batch_size=B, seed=0)
    with contextlib.closing(iterate(dataset)) as iterator:
        for _ in range(manifest.train.tokens // (B * T) + 1):  # an epoch, so that all blocks are checked
            next(iterator)
        start = Seconds.now()
        for _ in range(READ_STEPS):
            next(iterator)
        return Seconds.now().since(start)


def prepare_again(data: DataConfig, folder: Path) -> Seconds:
    """Of the tokenising stage."""
    stages: dict[str, Seconds] = {}
    prepare(
        data.model_copy(update={"folder": str(folder)}),
        VOCAB,
        lambda line: stages.update({line.split()[0]: Seconds.now()}),
    )
    return stages["tokenised"].since(stages["copied"])


def encode_alone(data: DataConfig) -> Seconds:
    """Of sentencepiece for the same documents, as many at once as in `prepare`."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=data.tokenizer)
    groups, size = [[]], 0
    for document in documents(data.sources):
        groups[-1].append(document.text)
        size += len(document.text)
        if size >= ENCODE_CHARS:
            groups.append([])
            size = 0
    start = Seconds.now()
    for texts in groups:
        processor.encode(texts, out_type="numpy", num_threads=1)
    return Seconds.now().since(start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="GLOB", help="as in data.sources")
    parser.add_argument("--tokenizer", help="a sentencepiece .model; without it one of 8192 ids is trained")
    parser.add_argument("--megabytes", type=int, default=20, help="of generated text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = (SourceConfig(path=options.text or write_texts(folder, options.megabytes)),)
        tokenizer = options.tokenizer
        if tokenizer is None:
            tokenizer = str(folder / "made.model")
            Path(tokenizer).write_bytes(train_sentencepiece((d.text for d in documents(sources)), VOCAB))
        data = DataConfig(sources=sources, tokenizer=tokenizer, folder=str(folder / "0"))
        pairs = [(encode_alone(data), prepare_again(data, folder / str(n))) for n in range(options.rounds)]
        reads = [read_batches(data) for _ in range(options.rounds)]
        manifest = load_manifest(data.folder)
        tokens = manifest.train.tokens + manifest.valid.tokens
        result: dict[str, float] = {"tokens": tokens, "rounds": options.rounds}
        for clock in Seconds._fields:
            encode, whole = (statistics.median(getattr(t, clock) for t in column) for column in zip(*pairs))
            share = statistics.median(getattr(e, clock) / getattr(p, clock) for e, p in pairs)
            read = statistics.median(getattr(t, clock) for t in reads)
            result |= {
                f"read_tokens_per_second_{clock}": round(READ_STEPS * B * T / read),
                f"prepare_tokens_per_second_{clock}": round(tokens / whole),
                f"encode_tokens_per_second_{clock}": round(tokens / encode),
                f"prepare_share_of_encode_{clock}": round(share, 3),
            }
    for field, value in result.items():
        print(f"{field:32} {value:>12,}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
