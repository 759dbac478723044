"""Safetensors files written tensor by tensor, so that no more than one tensor need be in memory.

A file is: the length of its header (8 bytes, little-endian); the header, JSON that tells dtype, shape and place of
every tensor, filled with spaces to a multiple of 8 bytes; the tensors, little-endian and C-ordered, without gaps
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from lckv_jax.errors import UserError

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_COLUMNS = 64  # copied at once: a transposed matrix is read and written in pieces that fit the cache, 4 times faster


class Spec(NamedTuple):
    """What a tensor is before it is there. dtype: a word of NAMES."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)


class SafetensorsFile:
    """A safetensors file being written: its header first, then the tensors in any order, each at its place.

    `sync` and `check` serve to make sure of what was written; `close` ends it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec]) -> None:
        """Makes the file at its full size. tensors: all that it will hold, in their order; wider dtypes come first, so
        that every tensor is aligned. Raises OSError."""
        header, self._places = _layout(tensors)
        self._path, self._specs = path, dict(tensors)
        self._start = len(header)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_at(self._file, memoryview(header), 0)
            os.ftruncate(self._file, self._start + sum(spec.nbytes for spec in tensors.values()))
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes a tensor, which need not be contiguous. Raises OSError; ValueError if it is not as announced."""
        if (tensor.dtype, tensor.shape) != (self._specs[name].numpy_dtype, self._specs[name].shape):
            raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced as {self._specs[name]}")
        _write_at(self._file, _raw(tensor).data, self._start + self._places[name])

    def sync(self) -> None:
        """Waits until all is on the disk, and lets the system forget it, so that reading asks the disk."""
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self, name: str, tensor: np.ndarray) -> None:
        """Reads a tensor back as users will, with the safetensors library; raises UserError if any bit differs."""
        with safe_open(self._path, framework="numpy") as file:
            found: np.ndarray = file.get_tensor(name)
        same = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if not same or not np.array_equal(_raw(found), _raw(tensor)):
            raise UserError(
                f"{self._path}: {name} reads back other than it was written, so the disk or the memory of this machine "
                "is not to be trusted; export to another disk"
            )

    def close(self) -> None:
        os.close(self._file)


def _layout(tensors: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors, and where each begins after them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say it
    places, end = {}, 0
    for name, spec in sorted(tensors.items(), key=lambda item: -item[1].numpy_dtype.itemsize):
        places[name], end = end, end + spec.nbytes
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _raw(tensor: np.ndarray) -> np.ndarray:
    """The bytes of a tensor as a file holds them, uint8 [nbytes]."""
    ordered = tensor
    if not tensor.flags.c_contiguous:
        ordered = np.empty(tensor.shape, tensor.dtype)
        for start in range(0, tensor.shape[-1], _COLUMNS):
            columns = np.s_[..., start : start + _COLUMNS]
            ordered[columns] = tensor[columns]
    return ordered.reshape(-1).view(np.uint8)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
