"""An lm-evaluation-harness model over parameters of ours. Needs neither torch nor transformers.

Prompts are tokenized as the harness' own Hugging Face model does for a Llama whose tokenizer adds BOS: the context
begins with BOS, context and continuation are encoded together and cut where the context's own tokens end, spaces at the
end of a context belong to the continuation. Rolling text is predicted after BOS in windows that share no token; that
model predicts a second BOS after the first, which is none of the text and is left out here.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lckv_jax.config import ModelConfig
from lckv_jax.data.tokenizer import Tokenizer
from lckv_jax.decode.generate import generate
from lckv_jax.decode.loop import unstack
from lckv_jax.decode.sampling import Sampling
from lckv_jax.decode.step import Weights
from lckv_jax.errors import UserError
from lckv_jax.evaluate.continuations import Answer, Continuations, row_lengths
from lckv_jax.evaluate.finished import Finished
from lckv_jax.fingerprint import describe_leaves
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes, stop_rule

_NEW_TOKENS = 256  # generated where a task does not say how many: the harness' own number
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness wants it.

    passes: of the log-likelihoods and of the prompts that text is generated from (`refine.stop_rule`).
    cut: (task, item) of the requests so far that were longer than `max_length` and lost their beginning.
    seed: of tasks that sample.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        passes: Passes = "trained",
        max_length: int,
        finished: Path | None = None,
        batch_tokens: int = 4096,
        mesh: Mesh | None = None,
        fingerprint: str = "",
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """max_length: the most tokens that the model reads at once. finished: a file that keeps answered requests, so
        that a killed evaluation goes on from it. batch_tokens: about so many of a batch. mesh: on which `params` lie.
        fingerprint: of the checkpoint, so that answers of another one are never taken; by default one is computed.
        tell: called with (requests done, requests asked for) after every batch.

        Raises UserError if the tokenizer is not one of the model, for wrong numbers, and as `Finished` does.
        """
        super().__init__()
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only {config.vocab_size:,}; give "
                "the tokenizer that the checkpoint was trained with"
            )
        stop_rule(config, passes)
        self.tokenizer = tokenizer
        self.config = config
        self.passes: Passes = passes
        self.cut: set[tuple[str | None, int | None]] = set()
        self.seed = 0
        self.continuations = Continuations(params, config, max_length=max_length, batch_tokens=batch_tokens, mesh=mesh)
        self._params = params
        self._batch_tokens = batch_tokens
        self._finished = Finished(finished)
        fingerprint = fingerprint or (_fingerprint(params) if finished else "")
        self._facts = [fingerprint, config.model_dump_json(exclude={"attention", "remat"}), tokenizer.fingerprint]
        self._decoder: list[Weights] = []  # made when first needed, for all passes
        self._tell = tell or (lambda done, total: None)

    def with_passes(self, passes: Passes) -> HarnessModel:
        """The same model, with the same compiled programs and finished requests, by other passes."""
        other = copy.copy(self)
        other.passes, other.cut = passes, set()
        return other

    @property
    def compilations(self) -> int:
        """Programs for log-likelihoods compiled so far, at most 8."""
        return self.continuations.compilations

    @property
    def max_length(self) -> int:
        return self.continuations.max_length

    # ---------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, after BOS unless `add_special_tokens` is False."""
        bos = [] if add_special_tokens is False else [self.tokenizer.bos_id]
        return [*bos, *self.tokenizer.encode(string)]

    # ---------------------------------------------------------------- log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """(log p of the continuation, whether greedy decoding gives it) for requests of (context, continuation)."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            if context:
                pairs.append(self._encode_pair(context, continuation))
            else:
                pairs.append(([self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)))
        return self._answers(pairs, requests)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[Answer]:
        return self._answers([(context, continuation) for _, context, continuation in requests], [None] * len(requests))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, every token of it predicted once from BOS or what its window shows before it."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, predicted in map(make_disjoint_window, rolled):
                windows.append((context, predicted))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._answers(windows, [None] * len(windows))):
            totals[owner] += logp
        return totals

    def _answers(self, pairs: Sequence[tuple[list[int], list[int]]], requests: Sequence[Any]) -> list[Answer]:
        fitted = [
            self._fit(context, continuation, request) for (context, continuation), request in zip(pairs, requests)
        ]
        keys = [self._key("loglikelihood", *pair) for pair in fitted]
        missing = {key: pair for key, pair in zip(keys, fitted) if key not in self._finished}
        names, done = list(missing), len(fitted) - len(missing)
        self._tell(done, len(fitted))
        for batch in self.continuations.score(list(missing.values()), self.passes):
            self._finished.add((names[number], answer) for number, answer in batch)
            done += len(batch)
            self._tell(done, len(fitted))
        return [(float(logp), bool(greedy)) for logp, greedy in (self._finished[key] for key in keys)]

    def _fit(self, context: list[int], continuation: list[int], request: Any) -> tuple[list[int], list[int]]:
        """The pair without what it has too much at its beginning, which is counted; the model reads all but the last
        token. Raises UserError for a continuation that is empty, or too long by itself."""
        where = "" if request is None else f"task {request.task_name}, item {request.doc_id}: "
        if not continuation:
            raise UserError(f"{where}a continuation has no tokens; every choice needs a text")
        if len(continuation) > self.max_length:
            raise UserError(
                f"{where}a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}; "
                "give a larger max_length"
            )
        over = len(context) + len(continuation) - (self.max_length + 1)
        if over <= 0:
            return context, continuation
        if request is not None:
            self.cut.add((request.task_name, request.doc_id))
        return context[over:], continuation

    def _key(self, kind: str, *parts: Any) -> str:
        """What an answer depends on, hashed."""
        facts = [kind, *self._facts, self.passes, self.max_length, *parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that each request's context is continued with, up to the first of its stop strings or EOS.

        Requests are (context, {until, max_gen_toks, do_sample, temperature, ...}). Greedy unless `do_sample` says
        otherwise or a temperature above 0 is given without it. A context that leaves no room for the new tokens loses
        its beginning. Raises UserError for a setting that is not known, if the new tokens alone fill the context, or in
        several processes.
        """
        if jax.process_count() > 1:
            raise UserError("a task that generates text runs in one process only; run it by itself, in one process")
        texts = [""] * len(requests)
        groups = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_until(request.args[1])].append(number)
        done = 0
        for until, numbers in groups.items():
            for number, text in self._generate(until, [(number, requests[number]) for number in numbers]):
                texts[number] = text
                done += 1
                self._tell(done, len(requests))
        return texts

    def _generate(self, until: _Until, requests: list[tuple[int, Any]]) -> Iterator[tuple[int, str]]:
        """(which request, its text), the longest prompts first; greedy text is kept as finished."""
        room = self.max_length - until.max_gen_toks
        if room < 1:
            raise UserError(
                f"max_gen_toks={until.max_gen_toks} leaves no room for a prompt in max_length={self.max_length}; give "
                "a larger max_length"
            )
        todo = []
        for number, request in requests:
            ids = self.tok_encode(request.args[0])
            if len(ids) > room:
                self.cut.add((request.task_name, request.doc_id))
            ids = ids[-room:]
            key = "" if until.sampling else self._key("generate", ids, until.stops, until.max_gen_toks)
            if key in self._finished:
                yield number, self._finished[key]
            else:
                todo.append((number, ids, key))
        todo.sort(key=lambda entry: (-len(entry[1]), entry[1]))
        drawn = 0
        while todo:
            length = next(length for length in row_lengths(self.max_length) if length >= len(todo[0][1]))
            count = 1 << max(0, (self._batch_tokens // (length + until.max_gen_toks)).bit_length() - 1)
            batch, todo = todo[:count], todo[count:]
            texts = self._texts(until, [ids for _, ids, _ in batch], length, (self.seed + drawn) % 2**32)
            drawn += len(batch)
            if until.sampling is None:
                self._finished.add((key, text) for (_, _, key), text in zip(batch, texts))
            yield from ((number, text) for (number, _, _), text in zip(batch, texts))

    def _texts(self, until: _Until, prompts: list[list[int]], length: int, seed: int) -> list[str]:
        """The texts that prompts of at most `length` tokens are continued with; sampling draws row i with seed + i.

        A row ends after a token whose own text holds a stop string; others are found in the text of all tokens. Copies
        of the last prompt fill the rows up to a power of two: few shapes, and none of them lasts longer.
        """
        stop = _stop_tokens(self.tokenizer, until.stops) | {self.eot_token_id}
        sampling = until.sampling and until.sampling.model_copy(update={"seed": seed})
        rows = generate(
            self._weights(),
            self.config,
            prompts + prompts[-1:] * ((1 << (len(prompts) - 1).bit_length()) - len(prompts)),
            until.max_gen_toks,
            passes=self.passes,
            sampling=sampling,
            stop=stop,
            prompt_length=length,
        )
        texts = []
        for row in rows[: len(prompts)]:
            ids = row[: row.index(self.eot_token_id)] if self.eot_token_id in row else row
            text = self.tokenizer.decode(id for id in ids if id < self.tokenizer.vocab_size)
            for term in until.stops:
                text = text.split(term)[0]
            texts.append(text)
        return texts

    def _weights(self) -> Weights:
        if not self._decoder:
            params = jax.tree.map(jax.numpy.asarray, self._params)
            self._decoder.append(unstack(params, self.config.model_copy(update={"attention": "auto"})))
        return self._decoder[0]


class _Until(NamedTuple):
    """How a request wants its text: not after these strings, of at most so many tokens, drawn how (None = greedy)."""

    stops: tuple[str, ...]
    max_gen_toks: int
    sampling: Sampling | None


def _until(wanted: dict[str, Any]) -> _Until:
    """The settings of a request, as the harness reads them. Raises UserError for one that is not known."""
    known: dict[str, Any] = {**normalize_gen_kwargs(wanted, _NEW_TOKENS)}
    stops, tokens = known.pop("until"), known.pop("max_gen_toks")
    if unknown := sorted(known.keys() - {"do_sample", *_SAMPLING}):
        raise UserError(
            f"generation_kwargs: {unknown[0]} is not known here; use until, max_gen_toks, do_sample, "
            f"{', '.join(_SAMPLING)}"
        )
    settings: dict[str, Any] = {name: known[name] for name in _SAMPLING if known.get(name)}
    if not known["do_sample"] or known.get("temperature") == 0.0:
        settings = {"temperature": 0.0, "repetition_penalty": settings.get("repetition_penalty", 1.0)}
    try:
        sampling = Sampling(**settings)
    except ValueError as error:
        raise UserError(f"generation_kwargs: {settings} cannot be: {error}") from error
    greedy = sampling == Sampling(temperature=0.0)
    return _Until(tuple(stop for stop in stops if stop), tokens, None if greedy else sampling)


@lru_cache(maxsize=8)
def _stop_tokens(tokenizer: Tokenizer, stops: tuple[str, ...]) -> frozenset[int]:
    """The tokens whose own text holds one of the strings."""
    texts = ((id, tokenizer.decode([id])) for id in range(tokenizer.vocab_size))
    return frozenset(id for id, text in texts if any(stop in text for stop in stops))


def _fingerprint(params: Params) -> str:
    return hashlib.sha256(json.dumps(describe_leaves(params)).encode()).hexdigest()
