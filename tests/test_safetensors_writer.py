"""Files written tensor by tensor are what the safetensors library reads, whatever the shapes."""

import json
import os
import tempfile
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lckv_jax.convert import safetensors_writer
from lckv_jax.convert.safetensors_writer import NAMES, SafetensorsFile, Spec
from lckv_jax.errors import UserError

SPECS = st.builds(Spec, st.sampled_from(sorted(NAMES)), st.lists(st.integers(0, 130), max_size=2).map(tuple))


def random(spec, rng):
    """Random bits, NaN among them; of a matrix, a transposed view."""
    bits = rng.integers(0, 256, (*spec.shape[::-1], spec.numpy_dtype.itemsize), np.uint8)
    return bits.view(spec.numpy_dtype)[..., 0].T


def write(path, specs, tensors):
    with closing(SafetensorsFile(path, specs)) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.sync()
        for name, tensor in tensors.items():
            file.check(name, tensor)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=9), SPECS, min_size=1, max_size=6), st.randoms())
def test_the_library_reads_what_was_written(specs, order):
    specs.pop("__metadata__", None)
    rng = np.random.default_rng(order.randrange(2**32))
    tensors = {name: random(spec, rng) for name, spec in specs.items()}
    shuffled = order.sample(sorted(tensors), len(tensors))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write(path, specs, {name: tensors[name] for name in shuffled})
        raw = path.read_bytes()
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(tensors)
            for name, tensor in tensors.items():
                found = file.get_tensor(name)
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert found.tobytes() == tensor.tobytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, spec in specs.items():
        assert header[name]["data_offsets"][0] % spec.numpy_dtype.itemsize == 0  # aligned, for readers that map it


def test_bfloat16_is_named_so(tmp_path):
    write(tmp_path / "x", {"a": Spec("bfloat16", (2,))}, {"a": np.ones(2, ml_dtypes.bfloat16)})
    assert b'"dtype":"BF16"' in (tmp_path / "x").read_bytes()


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with closing(SafetensorsFile(tmp_path / "x", {"a": Spec("float32", (2, 3))})) as file:
        for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float16)):
            with pytest.raises(ValueError, match="announced"):
                file.write("a", wrong)


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsFile(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "mine"


def test_a_bit_that_changed_on_the_disk_is_noticed(tmp_path):
    tensor = np.zeros((3, 5), np.float32)
    with closing(SafetensorsFile(tmp_path / "x", {"a": Spec("float32", (3, 5))})) as file:
        file.write("a", tensor)
        file.check("a", tensor)
        tensor[1, 2] = -0.0  # equal as a number, not as bits
        with pytest.raises(UserError, match=r"x: a reads back other than it was written"):
            file.check("a", tensor)


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(safetensors_writer.os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    tensor = np.arange(100, dtype=np.float32).reshape(10, 10).T
    write(tmp_path / "x", {"a": Spec("float32", (10, 10))}, {"a": tensor})
