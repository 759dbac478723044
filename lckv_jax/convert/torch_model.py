"""Transformers of the Llama form whose layers share keys and values (LCKV, 2405.10637; 2410.14442), in PyTorch.

This one file stands beside exported weights as `modeling_lckv.py`; it needs torch and transformers only:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("Once upon a time", return_tensors="pt"))

Layer i reads the keys and values (K,V) that layer sources[i] computes; a layer that somebody reads is an owner, and only
owners are cached. A layer that reads one above itself (upward) reads strictly earlier tokens. Spans of layers with
upward ones are solved by passes over all tokens, each of which reads the K,V of the pass before. In training these are
`no_grad_passes` and then `grad_passes`. In eval mode `config.passes` says how many: "trained" (as many), "exact" (until
the K,V stand still, so that they are those of token-by-token evaluation) or a relative change of K,V at which a row is
done. After a cache, T new tokens need at most T passes: one token at a time is always exact.

transformers 5.0 to 5.23 are tested, with torch 2.13. Attention is torch's scaled_dot_product_attention.
Names of sizes: B batch, T new tokens, P cached ones, S keys, D width, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

KV = tuple[Tensor, Tensor]  # keys, rotated at their own positions, and values, each [B, K, S, H]


class Span(NamedTuple):
    """Layers start..stop-1, solved together; cyclic if one of them reads a layer above itself."""

    start: int
    stop: int
    cyclic: bool


class Sharing(NamedTuple):
    """Which layer reads whose K,V, and whether through the sliding window; what follows from it."""

    sources: tuple[int, ...]
    windowed: tuple[bool, ...]
    owners: tuple[int, ...]
    spans: tuple[Span, ...]


def read_sharing(text: str, num_layers: int) -> Sharing:
    """The map of a string such as 0_6_6_6_6_6_6_7: the source of each layer, followed by `s` for a sliding window."""
    entries = [re.fullmatch(r"(\d+)(s?)", entry) for entry in str(text).split("_")]
    sources = tuple(int(entry[1]) for entry in entries if entry)
    if len(entries) != num_layers or len(sources) != num_layers or max(sources) >= num_layers:
        raise ValueError(
            f"sharing is {text!r}; it must name a source from 0 to {num_layers - 1} for each of {num_layers} layers"
        )
    spans, start = [], 0
    while start < num_layers:
        cyclic, stop = sources[start] > start, start + 1
        if cyclic:  # up to the highest layer that any layer inside reads
            while max(sources[start:stop]) >= stop:
                stop = max(sources[start:stop]) + 1
        else:
            while stop < num_layers and sources[stop] <= stop:
                stop += 1
        spans.append(Span(start, stop, cyclic))
        start = stop
    windowed = tuple(bool(entry and entry[2]) for entry in entries)
    return Sharing(sources, windowed, tuple(sorted(set(sources))), tuple(spans))


DEFAULTS = {
    **{"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": None},
    **{"num_attention_heads": 8, "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-5},
    **{"rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048, "initializer_range": 0.02},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    **{"use_cache": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    **{"sharing": None, "sliding_window": 4096, "strict_everywhere": False, "no_grad_passes": 7, "grad_passes": 2},
    **{"start": "zero", "tolerance": 0.0, "passes": "trained"},
}
CHOICES = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "start": ("zero", "input")}


class LckvConfig(PreTrainedConfig):
    """The keys of a `llama` config.json, and `sharing`, `sliding_window`, `strict_everywhere` (every layer reads
    strictly earlier tokens), `no_grad_passes`, `grad_passes`, `start` (the K,V that the first pass reads: "zero", or of
    the span's "input"), `tolerance` (in training: the change at which no_grad_passes end early) and `passes`."""

    model_type = "lckv"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **keys: Any):
        keys = {**DEFAULTS, **keys}
        layers, heads = keys["num_hidden_layers"], keys["num_attention_heads"]
        keys["num_key_value_heads"] = keys["num_key_value_heads"] or heads
        keys["head_dim"] = keys["head_dim"] or keys["hidden_size"] // heads
        keys["sharing"] = keys["sharing"] or "_".join(map(str, range(layers)))
        # transformers 5 keeps base and scaling of the rotary embedding in this one; config.json may have either spelling
        base = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
        self.rope_parameters = base | (keys.pop("rope_scaling") or {}) | (keys.pop("rope_parameters", None) or {})
        self.use_cache = keys.pop("use_cache")  # transformers takes it for a setting of generate(), and drops it
        super().__init__(**keys)
        read_sharing(self.sharing, layers)
        for name, values in CHOICES.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} is {value!r}; this model computes {' or '.join(map(repr, values))} only")
        if heads % self.num_key_value_heads or self.no_grad_passes < 0 or self.grad_passes < 1:
            raise ValueError(
                f"{heads} query heads must be a multiple of {self.num_key_value_heads} K,V heads, no_grad_passes="
                f"{self.no_grad_passes} at least 0 and grad_passes={self.grad_passes} at least 1"
            )


def rope_type(rope: dict[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type is {kind!r}; only default, linear and llama3 are computed here")
    return kind


def rope_frequencies(config: LckvConfig) -> list[float]:
    """Radians a position for each rotated pair, H/2 of them (2104.09864; scaling as in transformers' llama)."""
    rope, size = config.rope_parameters, config.head_dim
    frequencies = [rope["rope_theta"] ** (-i / size) for i in range(0, size, 2)]
    if rope["rope_type"] == "linear":
        return [f / rope["factor"] for f in frequencies]
    if rope["rope_type"] == "llama3":  # long wavelengths are stretched, short ones kept, those between blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = [rope["original_max_position_embeddings"] * f / (2 * math.pi) for f in frequencies]
        keep = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
        return [f * (k + (1.0 - k) / rope["factor"]) for f, k in zip(frequencies, keep)]
    return frequencies


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if that is wider: of norms, rotary tables, logits and loss."""
    return torch.promote_types(dtype, torch.float32)


class Tokens:
    """What every layer needs to know of the T new tokens and the `past` (P) cached ones before them.

    valid_BT: which new tokens are no padding; None if all are. cos, sin [B or 1, 1, T, H]: the first half of sin is
    negative, see `rotate`. Masks are built once for each kind of layer that asks.
    """

    def __init__(self, config: LckvConfig, x_BTD: Tensor, past: int, attention_mask_BS: Tensor | None):
        device, length = x_BTD.device, past + x_BTD.shape[1]
        self.past, self.window, self.masks = past, config.sliding_window, {}
        self.valid_BT = None
        self.position_BS = torch.arange(length, device=device)[None]  # -1 = padding
        if attention_mask_BS is not None:
            if attention_mask_BS.shape != (x_BTD.shape[0], length):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask_BS.shape)}; it must be {(x_BTD.shape[0], length)}: "
                    f"one entry for each of {past} cached and {x_BTD.shape[1]} new tokens"
                )
            valid_BS = attention_mask_BS.to(device) != 0
            if not valid_BS.all():
                self.position_BS = valid_BS.cumsum(1).masked_fill(~valid_BS, 0) - 1
                self.valid_BT = valid_BS[:, past:]
        dtype = wider(x_BTD.dtype)
        frequencies = torch.tensor(rope_frequencies(config), dtype=dtype, device=device)
        angles = self.position_BS[:, None, past:, None].to(dtype) * frequencies
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def readable(self, num_keys: int, strict: bool, windowed: bool) -> tuple[Tensor, Tensor] | None:
        """Which of the first S keys each new token reads, [B or 1, 1, T, S], and which tokens read none, [.., T, 1].

        Tokens that read none have all keys in the mask, so that softmax is finite. None: nothing is masked but, where
        there are several tokens, those to come.
        """
        total = self.position_BS.shape[1]
        windowed = windowed and self.window < total
        if self.valid_BT is None and not windowed and (self.past == 0 or total == self.past + 1):
            return None
        kind = num_keys, strict, windowed
        if kind not in self.masks:
            query, key = self.position_BS[:, None, self.past :, None], self.position_BS[:, None, None, :num_keys]
            mask = (key >= 0) & (key < query if strict else key <= query)
            if windowed:
                mask &= key > query - self.window
            none = ~mask.any(-1, keepdim=True)
            self.masks[kind] = mask | none, none
        return self.masks[kind]


def rotate(x_BNTH: Tensor, tokens: Tokens) -> Tensor:
    """x with each pair (i, i + H/2) rotated by the angle of its position: halves, not interleaved pairs."""
    x = x_BNTH.to(tokens.cos.dtype)
    low, high = x.chunk(2, -1)
    return torch.addcmul(x * tokens.cos, torch.cat((high, low), -1), tokens.sin).to(x_BNTH.dtype)


def attend(q_BNTH: Tensor, kv: KV, tokens: Tokens, *, strict: bool, windowed: bool) -> Tensor:
    """Softmax attention of grouped query heads, [B, N, T, H]; exactly zero where there is nothing to read."""
    (B, N, T, H), (k, v) = q_BNTH.shape, kv
    if strict and T == 1:
        k, v = k[:, :, : tokens.past], v[:, :, : tokens.past]
    K, S = k.shape[1:3]
    if S == 0:
        return torch.zeros_like(q_BNTH)
    mask, none = tokens.readable(S, strict, windowed) or (None, None)
    if T == 1:  # the query heads of a K,V head as its queries: nothing is repeated
        out = F.scaled_dot_product_attention(q_BNTH.view(B, K, N // K, H), k, v, attn_mask=mask).view(B, N, T, H)
    elif mask is not None:
        k, v = (x.repeat_interleave(N // K, 1) if K < N else x for x in (k, v))  # not all kernels do it under a mask
        out = F.scaled_dot_product_attention(q_BNTH, k, v, attn_mask=mask)
    elif strict:  # causal, of each query to the keys before it
        q, k, v = q_BNTH[:, :, 1:], k[:, :, :-1], v[:, :, :-1]
        return F.pad(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K < N), (0, 0, 1, 0))
    else:
        out = F.scaled_dot_product_attention(q_BNTH, k, v, is_causal=True, enable_gqa=K < N)
    return out if none is None else out.masked_fill(none, 0.0)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467), in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        wide = wider(x.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LckvConfig, layer: int, sharing: Sharing):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.attention_bias
        self.windowed = sharing.windowed[layer]
        self.strict = sharing.sources[layer] > layer or config.strict_everywhere
        query, key = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)
        if layer in sharing.owners:
            self.k_proj = nn.Linear(config.hidden_size, key, bias=bias)
            self.v_proj = nn.Linear(config.hidden_size, key, bias=bias)

    def heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project_kv(self, h_BTD: Tensor, tokens: Tokens) -> KV:
        return rotate(self.heads(self.k_proj(h_BTD)), tokens), self.heads(self.v_proj(h_BTD))

    def forward(self, h_BTD: Tensor, kv: KV | None, tokens: Tokens) -> Tensor | None:
        """kv None: there is nothing to read, so that zeros enter o_proj and only its bias comes out."""
        if kv is None:
            return self.o_proj.bias
        q = rotate(self.heads(self.q_proj(h_BTD)), tokens)
        out = attend(q, kv, tokens, strict=self.strict, windowed=self.windowed)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LckvConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LckvConfig, layer: int, sharing: Sharing):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, sharing)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, h_BTD: Tensor, kv: KV | None, tokens: Tokens) -> Tensor:
        """h: the normed x; kv: what the layer reads."""
        out = self.self_attn(h_BTD, kv, tokens)
        x = x_BTD if out is None else x_BTD + out
        return x + self.mlp(self.post_attention_layernorm(x))


class LckvModel(nn.Module):
    """Everything but the head."""

    def __init__(self, config: LckvConfig):
        super().__init__()
        self.config, self.sharing = config, read_sharing(config.sharing, config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([Layer(config, layer, self.sharing) for layer in layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: DynamicCache | None) -> Tensor:
        """The normed last hidden state, [B, T, D]. Keeps the owners' K,V of the new tokens in the cache."""
        x, slots = x_BTD, {}
        past = dict(zip(self.sharing.owners, map(cached, cache.layers))) if cache and tokens.past else {}
        for span in self.sharing.spans:
            read = self.solve(span, x, slots, past, tokens) if span.cyclic else {}
            x, _ = self.sweep(range(span.start, span.stop), x, read, slots, past, tokens, cache)
        return self.norm(x)

    def sweep(
        self,
        layers: Iterable[int],
        x_BTD: Tensor,
        read: dict[int, KV],
        slots: dict[int, KV],
        past: dict[int, KV],
        tokens: Tokens,
        cache: DynamicCache | None = None,
    ) -> tuple[Tensor, dict[int, KV]]:
        """One pass over some layers: their output, and the K,V of the owners among them, of the new tokens only.

        read: the K,V of the pass before, for upward layers; slots: K,V with their past by owner, for the others; this
        pass adds to it. cache: keeps the K,V if given.
        """
        x, new, above = x_BTD, {}, {owner: join(past.get(owner), read.get(owner)) for owner in {*past, *read}}
        for index in layers:
            layer, source = self.layers[index], self.sharing.sources[index]
            h = layer.input_layernorm(x)
            if index in self.sharing.owners:
                new[index] = kv = layer.self_attn.project_kv(h, tokens)
                slot = self.sharing.owners.index(index)
                slots[index] = join(past.get(index), kv) if cache is None else cache.update(*kv, slot)
            x = layer(x, h, (above if source > index else slots).get(source), tokens)
        return x, new

    def kv_pass(
        self, span: Span, x: Tensor, read: dict[int, KV], slots: dict[int, KV], past: dict[int, KV], tokens: Tokens
    ) -> dict[int, KV]:
        """A pass that is not the last: the K,V that the next one reads. The highest layer computes nothing else."""
        x, new = self.sweep(range(span.start, span.stop - 1), x, read, dict(slots), past, tokens)
        top = self.layers[span.stop - 1]
        new[span.stop - 1] = top.self_attn.project_kv(top.input_layernorm(x), tokens)
        return {owner: new[owner] for owner in self.read_above(span)}

    def read_above(self, span: Span) -> set[int]:
        """The owners that upward layers of the span read."""
        return {source for index in range(span.start, span.stop) if (source := self.sharing.sources[index]) > index}

    def solve(self, span: Span, x: Tensor, slots: dict[int, KV], past: dict[int, KV], tokens: Tokens) -> dict[int, KV]:
        """The K,V that the last pass over a cyclic span reads, of the new tokens only.

        As many passes as there are new tokens, and more, change nothing any more, not even gradients. At inference a
        row that is done keeps its K,V, so that it never depends on its batch mates; in training the batch decides.
        """
        T = x.shape[1]
        if T == 1:
            return {}
        limit, tolerance = self.stop_rule(T, x.dtype)
        tracked = min(self.config.grad_passes, limit) if torch.is_grad_enabled() else 1
        read: dict[int, KV] = {}
        with torch.no_grad():
            if self.config.start == "input":
                for owner in self.read_above(span):
                    layer = self.layers[owner]
                    read[owner] = layer.self_attn.project_kv(layer.input_layernorm(x), tokens)
            moving = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
            for _ in range(limit - tracked):
                new = self.kv_pass(span, x, read, slots, past, tokens)
                if tolerance is not None and read:
                    moves = largest_change(new, read, tokens) > tolerance
                    new = {owner: freeze(moving, kv, read[owner]) for owner, kv in new.items()}
                    moving = moves.any().expand_as(moving) if self.training else moving & moves
                read = new
                if tolerance is not None and not moving.any():
                    break
        for _ in range(tracked - 1):
            read = self.kv_pass(span, x, read, slots, past, tokens)
        return read

    def stop_rule(self, num_tokens: int, dtype: torch.dtype) -> tuple[int, float | None]:
        """The most passes to make, and the relative change of K,V at which to stop before (None: no test)."""
        config, passes = self.config, self.config.passes
        trained = min(config.no_grad_passes + config.grad_passes, num_tokens)
        if self.training:
            return trained, config.tolerance or None
        if passes == "trained":
            return trained, None
        if passes == "exact":
            return num_tokens, 8 * torch.finfo(dtype).eps
        if isinstance(passes, (str, bool)) or not 0 <= passes < math.inf:
            raise ValueError(f"config.passes is {passes!r}; use 'trained', 'exact' or a tolerance such as 1e-2")
        return num_tokens, passes or None


def cached(layer: DynamicLayer) -> KV:
    return layer.keys, layer.values


def join(past: KV | None, new: KV | None) -> KV | None:
    if past is None or new is None:
        return past or new
    return torch.cat((past[0], new[0]), 2), torch.cat((past[1], new[1]), 2)


def freeze(moving_B: Tensor, new: KV, old: KV) -> KV:
    keys, values = (torch.where(moving_B[:, None, None, None], *pair) for pair in zip(new, old))
    return keys, values


def largest_change(new: dict[int, KV], old: dict[int, KV], tokens: Tokens) -> Tensor:
    """The largest relative change of any single token's keys or values in each row, [B]."""
    changes = []
    for now, before in ((now, before) for owner in new for now, before in zip(new[owner], old[owner])):
        now, before = now.to(wider(now.dtype)), before.to(wider(now.dtype))
        moved, size = (x.square().sum((1, 3)) for x in (now - before, now))
        relative = (moved / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()
        changes.append(relative if tokens.valid_BT is None else relative.masked_fill(~tokens.valid_BT, 0.0))
    return torch.stack(changes).amax((0, 2))


class LckvForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head. `config.passes` may be set at any time."""

    config_class = LckvConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LckvConfig):
        super().__init__(config)
        self.model = LckvModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits in float32 or wider; with labels also their loss, the mean over those that are not -100, shifted here.

        attention_mask [B, P + T]: 0 marks padding, on either side; positions are counted from it.
        logits_to_keep: of how many last tokens (0: of all), or of which, logits are computed.
        num_items_in_batch: the labels that the loss is divided by, if gradients are accumulated.
        """
        if odd := [name for name, value in unknown.items() if value is not None and value is not False]:
            raise ValueError(f"LckvForCausalLM does not take {', '.join(odd)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values
        if cache is not None or use_cache:
            cache = self.slot_cache(DynamicCache() if cache is None else cache)
        past = cache.get_seq_length() if cache is not None else 0
        tokens = Tokens(self.config, x, past, attention_mask)
        x = self.model(x, tokens, cache)
        kept = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(kept)
        logits = logits.to(wider(logits.dtype))
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError("labels need the logits of all tokens; leave out logits_to_keep")
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(*flat, reduction="mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def slot_cache(self, cache: DynamicCache) -> DynamicCache:
        """The cache with one layer for each owner; generate() makes it with one for each layer of the model."""
        if type(cache) is not DynamicCache or cache.offloading:
            kind = "an offloading cache" if isinstance(cache, DynamicCache) else f"a {type(cache).__name__}"
            raise ValueError(f"LckvForCausalLM keeps its keys and values in a DynamicCache, not in {kind}")
        slots = len(self.model.sharing.owners)
        if cache.get_seq_length() == 0:
            cache.layers = [DynamicLayer() for _ in range(slots)]
        if len(cache.layers) != slots:
            raise ValueError(f"the cache has {len(cache.layers)} layers, but this model has {slots} owners of K,V")
        return cache
