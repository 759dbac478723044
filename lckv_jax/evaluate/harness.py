"""An lm-evaluation-harness model over parameters of ours; needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from lckv_jax.config import ModelConfig
from lckv_jax.data.tokenizer import Tokenizer
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes


class HarnessModel:
    """A model as lm-evaluation-harness wants it."""

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
        """tell: called with (requests done, requests asked for) after every batch."""
        raise NotImplementedError
