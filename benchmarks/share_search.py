"""Seconds of KVSharer's search on a random model of 22 layers and about 50M parameters, on this machine.

    python -m benchmarks.share_search [--sentences 30] [--tokens 64] [--layers 6] [--threshold -1]

A search of no layer first, which compiles the one program of all trials; then the same with so many layers, timed.
A threshold of 1 rejects every candidate: the most trials that there can be.
"""

import argparse
import time

import jax
import numpy as np

from lckv_jax import ModelConfig
from lckv_jax.model.transformer import init_params
from lckv_jax.share.kvsharer import search

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1344, num_layers=22, num_heads=6, num_kv_heads=3, head_dim=64
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threshold", type=float, default=0.5)
    options = parser.parse_args()
    params = init_params(MODEL, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens_BT = np.random.default_rng(0).integers(0, MODEL.vocab_size, (options.sentences, options.tokens), np.int32)
    print(f"{MODEL.num_layers} layers, {size / 1e6:.1f} M parameters, {tokens_BT.shape} tokens, {jax.devices()[0]}")
    for layers, what in ((0, "distances only, compilation with it"), (options.layers, f"{options.layers} layers")):
        started = time.perf_counter()
        found = search(params, MODEL, tokens_BT, layers, threshold=options.threshold)
        seconds = time.perf_counter() - started
        print(f"{what:<40}{seconds:8.2f} s   {len(found.pairs)} accepted of {len(found.tried)} tried", flush=True)
    print(f"map {found.sharing}; last cosine {found.tried[-1].cosine if found.tried else 1.0:.4f}")


if __name__ == "__main__":
    main()
