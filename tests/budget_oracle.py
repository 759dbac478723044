"""Budgets token by token, in float64 numpy with lists that really lose what is given up. Slow and plain on purpose."""

from typing import NamedTuple

import numpy as np
from oracle import coded, frequencies, norm, rotate

from lckv_jax import ModelConfig


class Token:
    """One token in one head's list: where it stood, its key and value, and how much has been read of it."""

    def __init__(self, position, k, v):
        self.position, self.k, self.v, self.score = position, k, v, 0.0


class Told(NamedTuple):
    """logits: [tokens - prompt + 1, V] of what follows the prompt and each later token. kept: the positions in each
    head's list by owner, when the prompt has ended and after each later token. mass: [K, prompt] by owner, as `fill`
    takes it. kvs: keys and values [prompt, K, H] by owner."""

    logits: np.ndarray
    kept: list[dict[int, list[list[int]]]]
    mass: dict[int, np.ndarray]
    kvs: dict[int, tuple[np.ndarray, np.ndarray]]


def chosen(scores, cells, recent, pool):
    """Places kept of a list of scores: the last `recent`, then those with the largest score around them."""
    places = range(len(scores))
    if len(scores) <= cells:
        return list(places)
    early = len(scores) - recent
    around = [max(scores[max(0, j - pool // 2) : min(early, j + pool // 2 + 1)]) for j in range(early)]
    best = sorted(range(early), key=lambda j: (-around[j], j))[: cells - recent]
    return sorted([*best, *places[early:]])


def budget_oracle(params, config: ModelConfig, tokens, prompt, *, select, cells, recent, largest=None, pool=7) -> Told:
    """One row. cells: by owner, None = everything is kept; largest: see `oracle.coded`, of tokens after the prompt."""
    p = {k: ({n: np.asarray(w, np.float64) for n, w in v.items()} if isinstance(v, dict) else np.asarray(v, np.float64))
         for k, v in params.items()}  # fmt: skip
    sharing, freq, K = config.sharing, frequencies(config), config.num_kv_heads
    lists = {owner: [[] for _ in range(K)] for owner in sharing.owners}
    logits, kept, mass, kvs = [], [], {}, {}
    for t, token in enumerate(tokens):
        x = p["embed"][token]
        for i in range(config.num_layers):
            layer = {name: w[i] for name, w in p["layers"].items()}
            h = norm(x, layer["attn_norm"], config.norm_eps)
            if i in sharing.owners:
                c = sharing.owners.index(i)
                k = rotate(np.einsum("D,DKH->KH", h, p["kv"]["wk"][c]), t, freq)
                v = np.einsum("D,DKH->KH", h, p["kv"]["wv"][c])
                for head in range(K):
                    lists[i][head].append(Token(t, k[head], v[head]))
            q = rotate(np.einsum("D,DNH->NH", h, layer["wq"]), t, freq)
            strict = sharing.sources[i] > i or config.strict_everywhere
            codes = largest if t >= prompt else None
            counts = t >= (prompt - recent if select != "h2o" else 0)
            out = np.zeros((config.num_heads, config.head_dim))
            for n in range(config.num_heads):
                seen = [
                    cell
                    for cell in lists[sharing.sources[i]][n // (config.num_heads // K)]
                    if (cell.position < t if strict else cell.position <= t)
                    and (not sharing.windowed[i] or cell.position > t - config.window)
                ]
                if not seen:
                    continue
                scores = np.array([q[n] @ coded(cell.k, codes) for cell in seen]) / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                out[n] = weights @ np.array([coded(cell.v, codes) for cell in seen])
                for cell, weight in zip(seen, weights):
                    cell.score += weight * counts
            x = x + np.einsum("NH,NHD->D", out, layer["wo"])
            h = norm(x, layer["mlp_norm"], config.norm_eps)
            gate = h @ layer["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
        if t < prompt - 1:
            continue
        logits.append(norm(x, p["final_norm"], config.norm_eps) @ p["head"])
        for owner, heads in lists.items():
            if t == prompt - 1:
                mass[owner] = np.array([[cell.score for cell in head] for head in heads])
                arrays = [np.array([[getattr(cell, x) for cell in head] for head in heads]) for x in "kv"]
                kvs[owner] = tuple(array.swapaxes(0, 1) for array in arrays)
            for number, head in enumerate(heads if cells[owner] is not None else []):
                if t == prompt - 1:
                    places = chosen([cell.score for cell in head], cells[owner], recent, 1 if select == "h2o" else pool)
                    heads[number] = [head[place] for place in places]
                elif select == "h2o" and len(head) > cells[owner]:
                    head.remove(min(head[:-recent], key=lambda cell: cell.score))
        kept.append({owner: [[cell.position for cell in head] for head in heads] for owner, heads in lists.items()})
    return Told(np.array(logits), kept, mass, kvs)
