"""Transformers of the Llama form whose layers share keys and values (LCKV, 2405.10637; 2410.14442), in PyTorch.

This one file stands beside exported weights as `modeling_lckv.py` and needs torch and transformers only:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Layer i reads the keys and values (K,V) that layer sources[i] computes. A layer that somebody reads is an owner; only
owners are cached. A layer that reads one above itself (upward) reads strictly earlier tokens. Spans of layers that hold
upward ones are solved by passes over all tokens, each of which reads the K,V of the pass before: `no_grad_passes` and
then `grad_passes` in training. In eval mode `config.passes` says how many: "trained" (as many), "exact" (until the K,V
stand still, as if token by token) or a number: until their relative change is at most that. Tokens after cached ones
are always exact, whatever `passes` is, so that any way of decoding, by one token or by several, finds the same ones.
Tested with transformers 5.0 to 5.23 (assistants: 5.23) and torch 2.13. Sizes in names: B batch, T new tokens after P
cached ones, S keys, D width, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

KV = tuple[Tensor, ...]  # keys, rotated at their own positions, and values, each [B, K, S, H]
Slots = dict[int, KV]  # by owner


class Sharing(NamedTuple):
    """For each layer, whose K,V it reads and whether through the sliding window."""

    sources: tuple[int, ...]
    windowed: tuple[bool, ...]
    owners: tuple[int, ...]
    spans: dict[range, set[int]]  # layers solved together, and the owners that upward ones among them read


def read_sharing(text: str, num_layers: int) -> Sharing:
    """The map of a string such as 0_6_6_6_6_6_6_7: the source of each layer, followed by `s` for a sliding window."""
    entries = [re.fullmatch("([0-9]+)(s?)", entry) for entry in (text.split("_") if isinstance(text, str) else [])]
    if len(entries) != num_layers or not all(entry and int(entry[1]) < num_layers for entry in entries):
        raise ValueError(f"sharing is {text!r}; it must name a source from 0 to {num_layers - 1} for each layer")
    sources = tuple(int(entry[1]) for entry in entries)
    spans, start = {}, 0
    while start < num_layers:
        stop = start + 1  # or up to the highest layer that any layer inside reads
        while (reach := max(sources[start:stop]) + 1) > stop:
            stop = reach
        spans[range(start, stop)] = {sources[i] for i in range(start, stop) if sources[i] > i}
        start = stop
    return Sharing(sources, tuple(entry[2] == "s" for entry in entries), tuple(sorted(set(sources))), spans)


def read_passes(passes: Any) -> str | float:
    """`config.passes`: "trained", "exact" or a tolerance, which may be written as a string."""
    number = re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", str(passes))
    if passes not in ("trained", "exact") and not (number and float(passes) < 1):
        raise ValueError(f"config.passes is {passes!r}; use 'trained', 'exact' or a tolerance below 1, such as 1e-2")
    return float(passes) if number else passes


DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": None,
    "num_attention_heads": 8, "num_key_value_heads": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "use_cache": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.02,
    "sharing": None, "sliding_window": 4096, "strict_everywhere": False, "no_grad_passes": 7, "grad_passes": 2,
    "start": "zero", "tolerance": 0.0, "passes": "trained",
}  # fmt: skip
ROPE = ("default", "linear", "llama3")
CHOICES = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "start": ("zero", "input"), "rope_type": ROPE}


class LckvConfig(PreTrainedConfig):
    """The keys of a `llama` config.json, and `sharing`, `sliding_window`, `strict_everywhere` (all layers read strictly
    earlier tokens), `no_grad_passes`, `grad_passes`, `start` (the K,V that the first pass reads: "zero", or those that
    the span's "input" gives), `tolerance` (change at which no_grad_passes end early, in training) and `passes`."""

    model_type = "lckv"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **keys: Any):
        keys = {**DEFAULTS, **keys}
        layers, heads = keys["num_hidden_layers"], keys["num_attention_heads"]
        keys["num_key_value_heads"] = keys["num_key_value_heads"] or heads
        keys["sharing"] = "_".join(map(str, range(layers))) if keys["sharing"] is None else keys["sharing"]
        theta, scaling, rope = (keys.pop(name) for name in ("rope_theta", "rope_scaling", "rope_parameters"))
        rope = rope or scaling or {}  # transformers 5 rewrites the older spelling, of two keys, into rope_parameters
        self.rope_parameters = {"rope_theta": theta, "rope_type": rope.get("type", "default"), **rope}
        read_sharing(keys["sharing"], layers)
        for name, values in CHOICES.items():
            if (value := {**keys, **self.rope_parameters}[name]) not in values:
                raise ValueError(f"{name} is {value!r}; this model computes only {', '.join(map(str, values))}")
        if heads % keys["num_key_value_heads"]:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads, which is {heads}")
        if (head_dim := keys["head_dim"] or keys["hidden_size"] / heads) % 2:
            raise ValueError(f"head_dim, or hidden_size / num_attention_heads, is {head_dim:g}; it must be even")
        keys["head_dim"] = int(head_dim)
        for name, least in {"sliding_window": 1, "no_grad_passes": 0, "grad_passes": 1}.items():
            if not isinstance(value := keys[name], int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        keys["passes"] = read_passes(keys["passes"])
        self.max_position_embeddings = keys["max_position_embeddings"]  # transformers asks for it too early,
        self.use_cache = keys.pop("use_cache")  # and drops this one as a setting of generate()
        super().__init__(**keys)


def rope_frequencies(config: LckvConfig) -> list[float]:
    """Radians a position for each rotated pair, H/2 of them (2104.09864; scaling as in transformers' llama)."""
    rope, size = config.rope_parameters, config.head_dim
    frequencies = [rope["rope_theta"] ** (-i / size) for i in range(0, size, 2)]
    if rope["rope_type"] == "linear":
        frequencies = [f / rope["factor"] for f in frequencies]
    if rope["rope_type"] == "llama3":  # long wavelengths are stretched, short ones kept, those between blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = [rope["original_max_position_embeddings"] * f / math.tau for f in frequencies]
        keep = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
        return [f * (k + (1.0 - k) / rope["factor"]) for f, k in zip(frequencies, keep)]
    return frequencies


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if that is wider: of norms, rotary tables, logits and loss."""
    return torch.promote_types(dtype, torch.float32)


class Tokens:
    """What layers need to know of the T new tokens and of the P before them, whose K,V are in `past`.
    valid_BT: which new tokens are no padding; None if all are. cos, sin [B or 1, 1, T, H]: the first half of sin is
    negative, see `rotate`. Masks are built once for each kind of layer that asks.
    """

    def __init__(self, config: LckvConfig, x_BTD: Tensor, past: Slots, attention_mask_BS: Tensor | None):
        (B, T, _), device = x_BTD.shape, x_BTD.device
        self.past, self.num_past = past, next(iter(past.values()))[0].shape[2] if past else 0
        self.window, self.masks, self.valid_BT = config.sliding_window, {}, None
        self.position_BS = torch.arange(self.num_past + T, device=device)[None]  # -1 = padding
        if attention_mask_BS is not None:
            if [*attention_mask_BS.shape] != (want := [B, self.num_past + T]):
                raise ValueError(f"attention_mask has shape {[*attention_mask_BS.shape]}; cached and new tokens {want}")
            valid_BS = attention_mask_BS.to(device) != 0
            if not valid_BS.all():
                self.position_BS = valid_BS.cumsum(1).masked_fill(~valid_BS, 0) - 1
                self.valid_BT = valid_BS[:, self.num_past :]
        frequencies = torch.tensor(rope_frequencies(config), dtype=wider(x_BTD.dtype), device=device)
        angles = self.position_BS[:, None, self.num_past :, None].to(frequencies.dtype) * frequencies
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def with_past(self, new: Slots) -> Slots:
        """The K,V of cached and new tokens, of whichever there are."""
        if self.past:
            new = {i: tuple(torch.cat(pair, 2) for pair in zip(self.past[i], kv)) for i, kv in new.items()}
        return {**self.past, **new}

    def readable(self, num_keys: int, strict: bool, windowed: bool) -> tuple[Tensor | None, Tensor | None]:
        """Which of the first S keys each new token reads, [B or 1, 1, T, S], and which tokens read none, [.., T, 1].
        These have all keys in the mask, so that softmax is finite. None: no mask is needed, at most a causal kernel."""
        total = self.position_BS.shape[1]
        windowed = windowed and self.window < total
        if self.valid_BT is None and not windowed and self.num_past in (0, total - 1):
            return None, None
        kind = num_keys, strict, windowed
        if kind not in self.masks:
            query, key = self.position_BS[:, None, self.num_past :, None], self.position_BS[:, None, None, :num_keys]
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
    B, N, T, H = q_BNTH.shape
    k, v = (x[:, :, : tokens.num_past] for x in kv) if strict and T == 1 else kv
    K, S = k.shape[1:3]
    if S == 0:
        return torch.zeros_like(q_BNTH)
    mask, none = tokens.readable(S, strict, windowed)
    if T == 1:  # the query heads of a K,V head as its queries: nothing is repeated
        out = F.scaled_dot_product_attention(q_BNTH.reshape(B, K, N // K, H), k, v, attn_mask=mask).reshape(B, N, T, H)
    elif mask is not None:
        k, v = (x.repeat_interleave(N // K, 1) if K < N else x for x in (k, v))  # not all kernels do it under a mask
        out = F.scaled_dot_product_attention(q_BNTH, k, v, attn_mask=mask)
    elif strict:  # causal, of each query to the keys before it
        q, k, v = q_BNTH[:, :, 1:], k[:, :, :-1], v[:, :, :-1]
        out = F.pad(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K < N), (0, 0, 1, 0))
    else:
        out = F.scaled_dot_product_attention(q_BNTH, k, v, is_causal=True, enable_gqa=K < N)
    return out if none is None else out.masked_fill(none, 0.0)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467), in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        wide = wider(x.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: LckvConfig, index: int, sharing: Sharing):
        super().__init__()
        D, inner, H = config.hidden_size, config.intermediate_size, config.head_dim
        self.head_dim, self.windowed = H, sharing.windowed[index]
        self.strict = sharing.sources[index] > index or config.strict_everywhere
        query, key = config.num_attention_heads * H, config.num_key_value_heads * H
        sizes = {"q_proj": (D, query), "o_proj": (query, D)}
        if index in sharing.owners:
            sizes |= {"k_proj": (D, key), "v_proj": (D, key)}
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(*size, config.attention_bias) for name, size in sizes.items()})
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        sizes = {"gate_proj": (D, inner), "up_proj": (D, inner), "down_proj": (inner, D)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, config.mlp_bias) for name, size in sizes.items()})

    def heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project_kv(self, x_BTD: Tensor, tokens: Tokens) -> KV:
        """The K,V that an owner computes from its input."""
        h = self.input_layernorm(x_BTD)
        return rotate(self.heads(self.self_attn.k_proj(h)), tokens), self.heads(self.self_attn.v_proj(h))

    def forward(self, x: Tensor, kv: KV | None, tokens: Tokens) -> Tensor:
        """The layer's output. kv: what it reads; None if that is nothing, so that only the bias of o_proj comes out."""
        out = x.new_zeros(1, 1, self.self_attn.o_proj.in_features)
        if kv is not None:
            q = rotate(self.heads(self.self_attn.q_proj(self.input_layernorm(x))), tokens)
            out = attend(q, kv, tokens, strict=self.strict, windowed=self.windowed).transpose(1, 2).flatten(2)
        x = x + self.self_attn.o_proj(out)
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class LckvModel(nn.Module):
    def __init__(self, config: LckvConfig):
        super().__init__()
        self.config, self.sharing = config, read_sharing(config.sharing, config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, self.sharing) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Slots]:
        """The normed last hidden state, [B, T, D], and the K,V of all owners, of cached and new tokens."""
        x, slots = x_BTD, {}
        for span, read_above in self.sharing.spans.items():
            read = self.solve(span, x, slots, tokens) if read_above else {}
            x, _ = self.sweep(span, x, read, slots, tokens)
        return self.norm(x), slots

    def sweep(self, layers: range, x: Tensor, read: Slots, slots: Slots, tokens: Tokens) -> tuple[Tensor, Slots]:
        """One pass over some layers: their output, and the K,V of the owners among them, of new tokens only.
        read: K,V that upward layers read, of new tokens only; slots: those that others read, to which it adds."""
        new, above = {}, tokens.with_past(read)
        for i in layers:
            layer, source = self.layers[i], self.sharing.sources[i]
            if i in self.sharing.owners:
                new[i] = layer.project_kv(x, tokens)
                slots[i] = tokens.with_past({i: new[i]})[i]
            x = layer(x, (above if source > i else slots).get(source), tokens)
        return x, new

    def kv_pass(self, span: range, x: Tensor, read: Slots, slots: Slots, tokens: Tokens) -> Slots:
        """A pass that is not the last: the K,V that the next one reads. The highest layer computes nothing else."""
        x, new = self.sweep(span[:-1], x, read, dict(slots), tokens)
        new[span[-1]] = self.layers[span[-1]].project_kv(x, tokens)
        return {owner: new[owner] for owner in self.sharing.spans[span]}

    def solve(self, span: range, x: Tensor, slots: Slots, tokens: Tokens) -> Slots:
        """The K,V that the last pass over a span reads, of new tokens only.
        At inference a row that is done keeps its K,V and never depends on its batch mates; in training all go on."""
        read, (limit, tolerance) = {}, self.stop_rule(x, tokens)
        if x.shape[1] == 1:  # reads what is cached, and nothing of itself
            return read
        tracked = min(self.config.grad_passes, limit) if torch.is_grad_enabled() else 1
        with torch.no_grad():
            if self.config.start == "input":
                read = {owner: self.layers[owner].project_kv(x, tokens) for owner in self.sharing.spans[span]}
            moving_B = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
            for _ in range(limit - tracked):
                new = self.kv_pass(span, x, read, slots, tokens)
                if tolerance and read:
                    moves_B = largest_change(new, read, tokens) > tolerance
                    open_B = moving_B[:, None, None, None]
                    new = {i: tuple(torch.where(open_B, *pair) for pair in zip(kv, read[i])) for i, kv in new.items()}
                    moving_B = moves_B.any().expand_as(moves_B) if self.training else moving_B & moves_B
                read = new
                if tolerance and not moving_B.any():
                    break
        for _ in range(tracked - 1):
            read = self.kv_pass(span, x, read, slots, tokens)
        return read

    def stop_rule(self, x_BTD: Tensor, tokens: Tokens) -> tuple[int, float]:
        """The most passes to make, and the relative change of K,V at which to stop before; 0: at none."""
        config, T = self.config, x_BTD.shape[1]
        trained = min(config.no_grad_passes + config.grad_passes, T)
        if self.training:
            return trained, config.tolerance
        passes, exact = read_passes(config.passes), 8 * torch.finfo(x_BTD.dtype).eps
        if passes == "trained" and not tokens.num_past:
            return trained, 0.0
        tolerance = exact if isinstance(passes, str) else passes
        return T, min(tolerance, exact) if tokens.num_past else tolerance


def largest_change(new: Slots, old: Slots, tokens: Tokens) -> Tensor:
    """The largest relative change of any single token's keys or values in each row, [B]."""
    now, before = (torch.stack([x.to(wider(x.dtype)) for owner in new for x in slots[owner]]) for slots in (new, old))
    moved, size = (x.square().sum((2, 4)) for x in (now - before, now))
    change_BT = (moved / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt().amax(0)
    return (change_BT if tokens.valid_BT is None else change_BT.masked_fill(~tokens.valid_BT, 0.0)).amax(1)


class LckvForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LckvConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LckvConfig):
        super().__init__(config)
        self.model = LckvModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None, **others: Any,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """Logits, cast to float32 or wider; with labels, shifted here, also the mean loss of those that are not -100.
        attention_mask [B, P + T]: 0 marks padding, on either side. logits_to_keep: of how many last tokens (0: of all),
        or of which. num_items_in_batch: what the loss is divided by instead, where gradients are accumulated."""
        cache, past = past_key_values, {}
        if others.pop("generating", False) and logits_to_keep > 1 and not (cache and cache.get_seq_length()):
            return self.check_candidates(input_ids, attention_mask, cache or DynamicCache(), logits_to_keep - 1)
        as_tuple = others.pop("return_dict", None) is False
        others.pop("cache_position", None)  # from generate() before transformers 5.3; the cache knows it
        others = {name: getattr(self.config, name) for name in ("output_hidden_states", "output_attentions")} | others
        others["both or neither of input_ids and inputs_embeds"] = (input_ids is None) == (inputs_embeds is None)
        part = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        others["labels together with logits_to_keep"] = labels is not None and part
        if odd := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f"LckvForCausalLM does not take {', '.join(odd)}")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is not None or (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache, past = self.slot_cache(DynamicCache() if cache is None else cache)
        x, slots = self.model(x, Tokens(self.config, x, past, attention_mask))
        for layer, kv in zip(cache.layers if cache is not None else (), map(slots.get, self.model.sharing.owners)):
            layer.lazy_initialization(*kv)
            layer.keys, layer.values = kv
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits, loss = self.lm_head(x), None
        logits = logits.to(wider(logits.dtype))
        if labels is not None:
            labels = labels[:, 1:].flatten().to(logits.device)
            count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / count
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if as_tuple else output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "generating": True}

    def check_candidates(self, ids: Tensor, mask: Tensor | None, cache: DynamicCache, count: int) -> Any:
        """The first step of assisted decoding, whose last `count` tokens are candidates: exact, as after the prompt."""
        prompt = self(ids[:, :-count], None if mask is None else mask[:, :-count], cache, logits_to_keep=1)
        output = self(ids[:, -count:], mask, cache)
        output.logits = torch.cat((prompt.logits, output.logits), 1)
        return output

    def slot_cache(self, cache: DynamicCache) -> tuple[DynamicCache, Slots]:
        """The cache, with a layer for each owner (generate() makes one for each layer of the model), and its K,V."""
        if type(cache) is not DynamicCache or cache.offloading:
            raise ValueError(f"K,V are cached in a DynamicCache without offloading, not in this {type(cache).__name__}")
        owners, held = self.model.sharing.owners, cache.get_seq_length()
        if not held:
            cache.layers = [DynamicLayer() for _ in owners]
        if len(cache.layers) != len(owners):
            raise ValueError(f"the cache has {len(cache.layers)} layers, but this model {len(owners)} owners of K,V")
        return cache, {i: (layer.keys, layer.values) for i, layer in zip(owners, cache.layers)} if held else {}
