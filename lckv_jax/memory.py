"""The memory of a run on one device, by formula: what the state holds, and what a training step needs beside it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from lckv_jax.config import MeshConfig, ModelConfig, RunConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import MESH_AXES
from lckv_jax.model.kernels import bias_bytes
from lckv_jax.model.transformer import dim_sizes, parameter_dims
from lckv_jax.parallel.mesh import check_sizes, make_mesh, replicated_dims
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import TrainState, abstract_state
from lckv_jax.train.step import check_micro_batch


class Memory(NamedTuple):
    """Bytes on one device of a mesh. state: by part of the train state, exact. The rest is a formula.

    rows: of a micro-batch. gradients: float32, as the parameters; with accumulation the sum and those of a micro-batch.
    copies: of weights, in the compute dtype or gathered over fsdp, and their gradients. stored: what the backward pass
    needs of every layer. working: what the layer or the piece of the loss that needs most holds while it is computed.
    """

    mesh: dict[str, int]
    rows: int
    state: dict[str, int]
    gradients: int
    copies: int
    stored: int
    working: int

    @property
    def step(self) -> int:
        """What a training step needs beside the state: the compiler's temporaries."""
        return self.gradients + self.copies + self.stored + self.working


def train_state(config: RunConfig, mesh: Any) -> tuple[optax.GradientTransformationExtraArgs, TrainState]:
    """The optimiser, and the shapes, dtypes and shardings of the state on a mesh, which may be an abstract one."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return optimizer, abstract_state(config, optimizer, mesh)


def planned_mesh(config: MeshConfig) -> Mesh | AbstractMesh:
    """The mesh of the devices there are if it fits them, else one of as many devices as it needs; -1 is then 1."""
    try:
        return make_mesh(config)
    except UserError:
        sizes = tuple(1 if size == -1 else size for size in (config.data, config.fsdp, config.tensor))
        return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def memory(config: RunConfig, backend: str, mesh: Any = None) -> Memory:
    """The memory of a run on one device of its mesh, with the attention kernel `backend`; all but `xla` are fused.

    mesh: `planned_mesh` if not given; it may be an abstract one.
    Raises UserError if an axis of the mesh does not divide what it splits.
    """
    mesh = planned_mesh(config.mesh) if mesh is None else mesh
    micro_batch = config.data.batch_size // config.train.accumulation
    check_sizes(config.model, config.data.batch_size, mesh)
    check_micro_batch(config, mesh)
    rows = micro_batch // (mesh.shape["data"] * mesh.shape["fsdp"])
    split = mesh.shape["tensor"]
    _, state = train_state(config, mesh)
    parts = {name: _bytes_on_a_device(part) for name, part in state.items()}
    stored = _stored_bytes(config, rows, split, backend)
    working = max(_layer_bytes(config.model, rows * config.data.seq_len, config.data.seq_len, split, backend),
                  _loss_bytes(config, rows, split))  # fmt: skip
    if backend == "cudnn" and config.data.packing == "masked":
        working += 2 * bias_bytes(config.model, rows, config.data.seq_len)  # and their gradients, which nobody reads
    gradients = parts["params"] * (2 if config.train.accumulation > 1 else 1)
    return Memory(dict(mesh.shape), rows, parts, gradients, _copy_bytes(config.model, mesh), stored, working)


def cache_bytes(model: ModelConfig, tokens: int) -> int:
    """Bytes of the K,V of one row of `tokens` tokens at inference; a slot that is only read through the window keeps
    no more tokens than that."""
    kept = sum(model.sharing.cache_tokens(tokens, model.window))
    return kept * 2 * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize


def _bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


class _Widths(NamedTuple):
    """Numbers that one token has of each kind on one device: width, all query heads, all K/V heads, MLP width."""

    D: int
    NH: int
    KH: int
    F: int


def _widths(model: ModelConfig, split: int) -> _Widths:
    K = model.num_kv_heads if model.num_kv_heads % split else model.num_kv_heads // split
    return _Widths(
        model.hidden_size,
        model.num_heads // split * model.head_dim,
        K * model.head_dim,
        model.intermediate_size // split,
    )


def _saved_numbers(w: _Widths, remat: str) -> tuple[int, int]:
    """Numbers a token that the backward pass of one layer finds stored, and how many more if the layer is an owner; the
    rest it recomputes (model.remat)."""
    return {
        "full": (w.D, 0),  # the layer's input
        "attention": (w.D + w.NH, 0),
        "dots": (3 * w.D + w.NH + 2 * w.F, 2 * w.KH),  # the input, and the products with weights
        "none": (8 * w.D + 6 * w.NH + 5 * w.F, 6 * w.KH),  # counted in compiled programs
    }[remat]


def _score_bytes(model: ModelConfig, seq_len: int, split: int, backend: str) -> tuple[int, int]:
    """Bytes a token of attention scores in the reference kernel: stored without remat, and more while computed.

    The fused kernels hold none; the masks that cuDNN needs for packed documents are counted apart.
    """
    scores = model.num_heads // split * seq_len if backend == "xla" else 0
    return scores * (4 + jnp.dtype(model.dtype).itemsize), scores * 4 * 4 // 3


def _stored_bytes(config: RunConfig, rows: int, split: int, backend: str) -> int:
    """What the forward pass keeps for the backward pass: of each layer once for each pass with gradient over it, of the
    last span's output, and the K,V that another layer reads."""
    model, w = config.model, _widths(config.model, split)
    size = jnp.dtype(model.dtype).itemsize
    a_layer, an_owner = (numbers * size for numbers in _saved_numbers(w, model.remat))
    if model.remat == "none":
        a_layer += _score_bytes(model, config.data.seq_len, split, backend)[0]
    total = 3 * w.D * size
    for span in model.sharing.spans():
        layers = range(span.start, span.stop)
        owners, shared = (len(set(layers).intersection(o)) for o in (model.sharing.owners, model.sharing.shared_owners))
        kv = owners * an_owner + shared * 2 * w.KH * size
        total += len(layers) * a_layer + kv
        if span.cyclic:  # in the earlier passes the highest owner computes only K,V
            total += (model.grad_passes - 1) * ((len(layers) - 1) * a_layer + kv)
    return rows * config.data.seq_len * total


def _layer_bytes(model: ModelConfig, tokens: int, seq_len: int, split: int, backend: str) -> int:
    """What one layer holds in its backward pass: everything it computes, and the gradients on their way."""
    everything = sum(_saved_numbers(_widths(model, split), "none")) * jnp.dtype(model.dtype).itemsize
    return tokens * (everything + sum(_score_bytes(model, seq_len, split, backend)))


def _loss_bytes(config: RunConfig, rows: int, split: int) -> int:
    """Logits of a chunk and their gradients, in float32."""
    chunk = min(config.train.loss_chunk, -(-config.data.seq_len // 2))
    return 2 * rows * chunk * config.model.vocab_size // split * 4


def _copy_bytes(model: ModelConfig, mesh: Any) -> int:
    """Copies of weights: each run's slice in the compute dtype, its gradients from each earlier pass, and embedding and
    head, gathered over fsdp, with their gradients."""
    sizes, dims = dim_sizes(model), parameter_dims(model)
    size, split, fsdp = jnp.dtype(model.dtype).itemsize, mesh.shape["tensor"], mesh.shape["fsdp"]
    whole = replicated_dims(model, mesh)
    stacked = sum(
        math.prod(sizes[dim] for dim in entry)
        // ((split if set(entry) & set("NKF") - set(whole) else 1) * (fsdp if "D" in entry else 1))
        for entry in jax.tree.leaves((dims["layers"], dims["kv"]))
    )
    spans = model.sharing.spans()
    cyclic = sum(span.stop - span.start for span in spans if span.cyclic) / model.num_layers
    sliced = size < 4 or sum(len(model.sharing.runs(span)) for span in spans) > 1
    total = stacked * size * (sliced + cyclic * (model.grad_passes - 1) + (size < 4))
    if fsdp > 1:
        head = model.vocab_size * model.hidden_size // split
        total += head * (2 * 4 + size + 4) + 3 * stacked * fsdp // model.num_layers * size
    return int(total)
