"""Means over tokens that are not independent of each other: standard errors over clusters of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and its standard error; None where there is a single cluster."""

    value: float
    stderr: float | None


def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """sum(above) / sum(below) over clusters, with the standard error of a ratio by linearisation (Cochran 1977, 6.4):
    clusters, such as documents, are a sample of many; their tokens may resemble each other as they like."""
    n, total = len(above), math.fsum(below)
    value = math.fsum(above) / total
    if n < 2:
        return Estimate(value, None)
    squares = math.fsum((np.asarray(above) - value * np.asarray(below)) ** 2)
    return Estimate(value, math.sqrt(n / (n - 1) * squares) / total)


def perplexity_of(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def perplexity(nats: Estimate) -> Estimate:
    """That of a mean -log p; the standard error by the delta method."""
    value = perplexity_of(nats.value)
    return Estimate(value, None if nats.stderr is None else value * nats.stderr)
