"""The model token by token, in float64 numpy: what all passes must converge to. Slow and plain on purpose."""

import numpy as np

from lckv_jax import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each rotated pair, by the formulas as published, one pair at a time."""
    out = []
    for i in range(config.head_dim // 2):
        f = config.rope_theta ** (-2.0 * i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None and scaling.type == "linear":
            f /= scaling.factor
        elif scaling is not None:
            wavelength = 2 * np.pi / f
            context = scaling.original_max_position_embeddings
            if wavelength > context / scaling.low_freq_factor:
                f /= scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                f = (1 - smooth) * f / scaling.factor + smooth * f
        out.append(f)
    return np.array(out)


def rotate(x, position, freq):
    half = x.shape[-1] // 2
    cos, sin = np.cos(position * freq), np.sin(position * freq)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def coded(x, largest):
    """x [K, H] as integers up to `largest` and back, one scale a head; None = as it is."""
    if largest is None:
        return x
    scale = np.abs(x).max(axis=-1, keepdims=True) / largest
    scale = np.where(scale == 0, 1.0, scale)
    return np.round(x / scale) * scale


def token_by_token(
    params, config: ModelConfig, tokens, segments=None, *, prompt=1, sinks=0, window=None, largest=None, stored=None
):
    """Logits [T, V] of one row.

    sinks, window: of a cache that keeps only the first and the last tokens (the current one counts) where the map
    itself has no window; positions are then those in the cache. largest: of the codes of keys and values, see `coded`.
    stored: what the token at a position finds of the keys and values [t, K, H] of the first t positions, its own
    perhaps among them; None = those. prompt: tokens that read everything as it is.
    """
    p = {k: ({n: np.asarray(w, np.float64) for n, w in v.items()} if isinstance(v, dict) else np.asarray(v, np.float64))
         for k, v in params.items()}  # fmt: skip
    sharing, freq = config.sharing, frequencies(config)
    segments = [0] * len(tokens) if segments is None else list(segments)
    cache = {owner: [] for owner in sharing.owners}  # owner -> list of (segment, position, k, v)
    logits, position = [], -1
    for t, token in enumerate(tokens):
        position = position + 1 if t and segments[t] == segments[t - 1] else 0
        x = p["embed"][token]
        for i in range(config.num_layers):
            layer = {name: w[i] for name, w in p["layers"].items()}
            h = norm(x, layer["attn_norm"], config.norm_eps)
            if i in sharing.owners:
                c = sharing.owners.index(i)
                k = np.einsum("D,DKH->KH", h, p["kv"]["wk"][c]) + p["kv"].get("bk", np.zeros(64))[c]
                v = np.einsum("D,DKH->KH", h, p["kv"]["wv"][c]) + p["kv"].get("bv", np.zeros(64))[c]
                cache[i].append((segments[t], position, rotate(k, position, freq), v))
            local = all(w for w, source in zip(sharing.windowed, sharing.sources) if source == sharing.sources[i])
            kept = None if local or t < prompt else window
            gone = max(0, position - (sinks + kept - 1)) if kept and sinks else 0  # tokens between sinks and window
            codes = largest if t >= prompt else None
            q = rotate(np.einsum("D,DNH->NH", h, layer["wq"]) + layer.get("bq", 0), position - gone, freq)
            strict = sharing.sources[i] > i or config.strict_everywhere
            held = cache[sharing.sources[i]]
            if stored and held and t >= prompt:
                pairs = zip(*stored(position, np.array([e[2] for e in held]), np.array([e[3] for e in held])))
                held = [(*entry[:2], *pair) for entry, pair in zip(held, pairs)]
            seen = [
                (rotate(coded(k, codes), 0 if at < sinks else -gone, freq), coded(v, codes))
                for segment, at, k, v in held
                if segment == segments[t]
                and (at < position if strict else at <= position)
                and (not sharing.windowed[i] or at > position - config.window)
                and (kept is None or at < sinks or at > position - kept)
            ]
            out = np.zeros((config.num_heads, config.head_dim))
            for n in range(config.num_heads if seen else 0):
                head = n // (config.num_heads // config.num_kv_heads)
                scores = np.array([q[n] @ k[head] for k, _ in seen]) / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                out[n] = (weights / weights.sum()) @ np.array([v[head] for _, v in seen])
            x = x + np.einsum("NH,NHD->D", out, layer["wo"]) + layer.get("bo", 0)
            h = norm(x, layer["mlp_norm"], config.norm_eps)
            gate = h @ layer["gate"] + layer.get("gate_bias", 0)
            up = h @ layer["up"] + layer.get("up_bias", 0)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"] + layer.get("down_bias", 0)
        head = p["embed"].T if config.tie_embeddings else p["head"]
        logits.append(norm(x, p["final_norm"], config.norm_eps) @ head)
    return np.array(logits)
