"""Pretraining of transformers whose layers share keys and values, in JAX."""

from lckv_jax.config import ModelConfig
from lckv_jax.sharing import KVSharing

__all__ = ["KVSharing", "ModelConfig"]
