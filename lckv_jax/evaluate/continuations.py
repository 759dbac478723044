"""Log-probabilities of continuations of contexts: right-padded rows of few shapes, longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.attention import wider
from lckv_jax.model.axes import constrain
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes, Stop, stop_rule
from lckv_jax.model.transformer import head_matrix, hidden_states
from lckv_jax.parallel.mesh import batch_sharding
from lckv_jax.parallel.rows import global_batch, local_rows

_MOST_SHAPES = 8
_LEAST_LENGTH = 32  # shorter rows are filled up to it
_HEAD_TOKENS = 256  # whose logits exist at once

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context, of at least one, and of what continues it
Answer = tuple[float, bool]  # the sum of log p of the continuation's tokens, and whether each is the likeliest


class _Row(NamedTuple):
    """What the model reads, and the predictions wanted from it: (column, next token), any column several times."""

    inputs: tuple[int, ...]
    wanted: list[tuple[int, int]]
    requests: list[tuple[int, int, int]]  # which one, and where in `wanted` its tokens start and stop


class Continuations:
    """Scores continuations under one model, and counts the programs that it needed.

    params, config: the model; its attention kernel is that of `auto`. max_length: the most tokens that a row may have.
    batch_tokens: about so many of a batch, whatever the length of its rows. mesh: rows are split over (data, fsdp), the
    parameters stay as they lie.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        max_length: int,
        batch_tokens: int = 4096,
        mesh: Mesh | None = None,
    ) -> None:
        if max_length < 1 or batch_tokens < 1:
            raise UserError(f"max_length={max_length}, batch_tokens={batch_tokens}; give 1 or more of both")
        self.config = config.model_copy(update={"attention": "auto"})
        self.max_length = max_length
        self._params = jax.tree.map(jnp.asarray, params)
        self._batch_tokens = batch_tokens
        self._mesh = mesh
        kinds = 1 + (self.config.sharing.cyclic and _is_single(self.config, "trained"))  # of programs for each length
        self._lengths = row_lengths(max_length, _MOST_SHAPES // kinds)
        self._programs: dict[tuple[int, bool], Any] = {}

    @property
    def compilations(self) -> int:
        """Programs compiled so far: one for each length of rows, whatever the passes (where m + b = 1, which needs no
        loop, one more for other passes); at most 8."""
        return len(self._programs)

    def score(self, requests: Sequence[Request], passes: Passes) -> Iterator[list[tuple[int, Answer]]]:
        """The answers of each batch as it is done: (which request, its answer).

        Each request is scored as if it were alone: the others change it by rounding only, and their order does not
        change anything. Requests of which the model reads the same (one-token continuations of one context, repeated
        requests) share a row. passes: see `refine.stop_rule`.
        Raises UserError if a number is not finite.
        """
        stop_rule(self.config, passes)
        rows = sorted(_rows(requests), key=lambda row: (-len(row.inputs), row.inputs))
        if rows and len(rows[0].inputs) > self.max_length:
            raise ValueError(f"a row of {len(rows[0].inputs)} tokens, but max_length={self.max_length}")
        while rows:
            length = next(length for length in self._lengths if length >= len(rows[0].inputs))
            count = self._rows_of(length)
            batch, rows = rows[:count], rows[count:]
            yield self._answers(batch, self._run(batch, length, passes))

    def _rows_of(self, length: int) -> int:
        """The rows of a batch: as many as `batch_tokens` holds, and a multiple of what the mesh splits them into."""
        shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return max(1, self._batch_tokens // length // shards) * shards

    def _run(self, rows: list[_Row], length: int, passes: Passes) -> tuple[np.ndarray, np.ndarray]:
        batch = _batch(rows, self._rows_of(length), length)
        static = passes if _is_single(self.config, passes) else None
        if static is None:
            batch |= _stop(self.config, passes, batch)
        with nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            placed, out = batch, None
            if self._mesh is not None:
                placed, out = _place(batch, self._mesh), NamedSharding(self._mesh, PartitionSpec())
            key = (length, static is not None)
            if key not in self._programs:
                step = jax.jit(_log_probabilities, static_argnames=("config", "passes"), out_shardings=out)
                lowered = step.lower(self._params, placed, config=self.config, passes=static)
                self._programs[key] = lowered.compile()
            return jax.device_get(self._programs[key](self._params, placed))

    def _answers(self, rows: list[_Row], found: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, Answer]]:
        answers = []
        for row, logp, likeliest in zip(rows, *found):
            if not np.isfinite(logp[: len(row.wanted)]).all():
                raise UserError(
                    "the model's logits are not finite; was it trained to its end? Check it with `evaluate`"
                )
            answers += [
                (number, (float(logp[start:stop].sum(dtype=np.float64)), bool(likeliest[start:stop].all())))
                for number, start, stop in row.requests
            ]
        return answers


def row_lengths(max_length: int, most: int = _MOST_SHAPES) -> list[int]:
    """The lengths that rows are filled up to, at most `most`: powers of two to the first that holds `max_length`, and
    as far as that leaves room, from the shortest on, what lies half-way between two of them."""
    top = 1 << max(max_length - 1, _LEAST_LENGTH - 1).bit_length()
    powers = [top >> n for n in range(most) if top >> n >= _LEAST_LENGTH][::-1]
    between = [power * 3 // 2 for power in powers[:-1]]
    return sorted(powers + between[: most - len(powers)])


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """A row for each different input; one that would have more predictions wanted than it has tokens becomes two."""
    rows: dict[tuple[int, ...], list[_Row]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ValueError(f"request {number} has an empty context or continuation")
        inputs = (*context, *continuation[:-1])
        wanted = list(zip(range(len(context) - 1, len(inputs)), continuation))
        same = rows.setdefault(inputs, [])
        if not same or len(same[-1].wanted) + len(wanted) > len(inputs):
            same.append(_Row(inputs, [], []))
        row = same[-1]
        row.requests.append((number, len(row.wanted), len(row.wanted) + len(wanted)))
        row.wanted.extend(wanted)
    return [row for same in rows.values() for row in same]


def _batch(rows: list[_Row], count: int, length: int) -> dict[str, np.ndarray]:
    """Arrays [count, length]: tokens and positions, -1 on padding; columns and labels of what is wanted, from the left;
    and how much of it a row has [count]."""
    tokens_BT, at_BT, labels_BT = (np.zeros((count, length), np.int32) for _ in range(3))
    positions_BT = np.full((count, length), -1, np.int32)
    wanted_B = np.zeros(count, np.int32)
    for n, row in enumerate(rows):
        size = len(row.inputs)
        tokens_BT[n, :size], positions_BT[n, :size] = row.inputs, np.arange(size)
        wanted_B[n] = len(row.wanted)
        at_BT[n, : wanted_B[n]], labels_BT[n, : wanted_B[n]] = np.array(row.wanted, np.int32).T
    return {"tokens": tokens_BT, "positions": positions_BT, "at": at_BT, "labels": labels_BT, "wanted": wanted_B}


def _is_single(config: ModelConfig, passes: Passes) -> bool:
    """Whether the map or `trained` means one pass, for which there is no loop."""
    return not config.sharing.cyclic or (passes == "trained" and config.no_grad_passes + config.grad_passes == 1)


def _stop(config: ModelConfig, passes: Passes, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`refine.stop_rule` as data for each row [B]; a row is one document."""
    stop = stop_rule(config, passes)
    tokens_B = np.maximum((batch["positions"] >= 0).sum(axis=1), 2).astype(np.int32)
    limit_B = tokens_B if stop.limit is None else np.full_like(tokens_B, stop.limit)
    return {"tolerance": np.full(len(limit_B), stop.tolerance, np.float32), "limit": limit_B}


def _place(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    count = len(batch["tokens"])
    rows = list(local_rows(sharding, count))
    flat = NamedSharding(mesh, PartitionSpec(*sharding.spec[:1]))
    placed = {}
    for name, x in batch.items():
        placed |= global_batch(sharding if x.ndim > 1 else flat, count, {name: x[rows]})
    return placed


def _log_probabilities(
    params: Params, batch: dict[str, jax.Array], *, config: ModelConfig, passes: Passes | None
) -> tuple[jax.Array, jax.Array]:
    """log p of each wanted token, float32 or wider, and whether it is the likeliest: both [B, T], from the left.

    The head runs on the wanted columns only, as many at once as make about 256 tokens.
    """
    stop = Stop(batch["tolerance"], batch["limit"]) if passes is None else passes
    hidden = hidden_states(params, config, batch["tokens"], positions_BT=batch["positions"], passes=stop)
    head_DV = constrain(head_matrix(params, config), "DV")
    B, T = batch["tokens"].shape
    size = next(n for n in range(max(1, min(T, _HEAD_TOKENS // B)), 0, -1) if T % n == 0)

    def one_more(n: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, labels = (jax.lax.dynamic_slice_in_dim(batch[name], n * size, size, axis=1) for name in ("at", "labels"))
        x = jnp.take_along_axis(hidden.x_BTD, at[:, :, None], axis=1)
        logits = jnp.einsum("BTD,DV->BTV", x, head_DV, preferred_element_type=wider(x.dtype))
        logits = constrain(logits, "BTV")
        label = labels[:, :, None] == jnp.arange(logits.shape[2])[None, None, :]
        logp = jnp.sum(jnp.where(label, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        new = (logp, jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels)
        return jax.tree.map(lambda old, now: jax.lax.dynamic_update_slice_in_dim(old, now, n * size, 1), found, new)

    start = jnp.zeros((B, T), wider(hidden.x_BTD.dtype)), jnp.zeros((B, T), bool)
    return jax.lax.fori_loop(0, (batch["wanted"].max() + size - 1) // size, one_more, start)
