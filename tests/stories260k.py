"""stories260K, a really trained model, from its documented files to a Hugging Face folder.

python tests/stories260k.py WEIGHTS FOLDER
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_stories260k(weights: Path, folder: Path) -> Path:
    """The weights in stories260K.bin (see the README of the real data) as a llama in `folder`, without a tokenizer."""
    raw = (weights / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    numbers, at = np.frombuffer(raw, "<f4", offset=28), 0
    size = dim // heads

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(matrix, count):
        """Rows of each head from neighbouring pairs to halves, as HF rotates them."""
        return matrix.reshape(count, size // 2, 2, dim).swapaxes(1, 2).reshape(matrix.shape)

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    parts = {  # in the order of the file
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_heads * size, dim),
        "self_attn.v_proj": (kv_heads * size, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for part, shape in parts.items():
        for layer, tensor in enumerate(take(layers, *shape)):
            count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(part)
            tensors[f"model.layers.{layer}.{part}.weight"] = halves(tensor, count) if count else tensor
    tensors["model.norm.weight"] = take(dim)
    assert len(numbers) - at == 2 * context * size // 2  # the unused rotary tables
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(weights: Path, folder: Path) -> None:
    """Its tokenizer, tok512.bin, as a sentencepiece `tokenizer.model` in `folder`."""
    raw, at, pieces = (weights / "tok512.bin").read_bytes(), 4, b""
    types = {0: 2, 1: 3, 2: 3} | dict.fromkeys(range(3, 259), 6)  # unknown, control, bytes; the others are normal
    for id in range(512):
        score, length = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + length].decode().strip("\n").replace(" ", "\u2581").encode()
        at += 8 + length
        pieces += _field(1, _field(1, text) + b"\x15" + struct.pack("<f", score) + _field(3, types.get(id, 1)))
    trainer = _field(3, 2) + _field(4, 512) + _field(35, 1)  # BPE, vocabulary, bytes for unknown characters
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)  # a space in front; spaces stay
    (folder / "tokenizer.model").write_bytes(pieces + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: an integer, or a string of bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


if __name__ == "__main__":
    weights, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(weights, write_stories260k(weights, folder))
