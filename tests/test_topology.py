"""Hardware by name: what a name means, where its devices lie in the mesh, and the train step compiled for it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lckv_jax.__main__ import main
from lckv_jax.config import MeshConfig
from lckv_jax.errors import UserError
from lckv_jax.model.kernels import local_platform
from lckv_jax.parallel import topology
from lckv_jax.parallel.mesh import arrange, make_mesh, mesh_sizes, number_of_slices
from lckv_jax.parallel.topology import abstract_mesh, parse_topology

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "platform", "devices", "layout", "slices"),
    [
        ("v5e-1", "tpu", 1, "v5e:1x1", 1),
        ("v5e-16", "tpu", 16, "v5e:4x4", 1),
        ("V5E-16", "tpu", 16, "v5e:4x4", 1),
        ("v6e:2x4", "tpu", 8, "v6e:2x4", 1),
        ("v5p-8", "tpu", 4, "v5p:2x2x1", 1),
        ("v5p-128", "tpu", 64, "v5p:4x4x4", 1),
        ("2xv5e-16", "tpu", 32, "v5e:4x4", 2),
        ("4xv5p:2x2x2", "tpu", 32, "v5p:2x2x2", 4),
        ("gpu-16", "gpu", 16, "", 1),
        ("cpu-3", "cpu", 3, "", 1),
    ],
)
def test_what_a_name_means(name, platform, devices, layout, slices):
    got = parse_topology(name)
    assert got[:5] == (name, platform, devices, layout, slices)
    assert (got.hbm is not None) == (platform == "tpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-17", "v5e-16"),
        ("v5-16", "v5e-16 or"),
        ("v6e:4x4x4", "v6e-N"),
        ("v5p:4x4", "v5p-N"),
        ("0xv5e-16", "v5e-16"),
        ("v5e:0x4", "known"),
        ("cpu-0", "cpu-N"),
        ("2xgpu-8", "gpu-N"),
        ("gpu:2x4", "gpu-N"),
        ("hopper-8", "known"),
        ("", "known"),
    ],
)
def test_a_name_that_means_nothing(name, words):
    with pytest.raises(UserError, match="there is no such hardware") as error:
        parse_topology(name)
    assert words in str(error.value)


def device(number, platform, slice_index=None, process_index=0, coords=(0, 0, 0)):
    kind = {"tpu": "TPU v5 lite", "gpu": "NVIDIA H100", "cpu": "cpu"}[platform]
    return SimpleNamespace(
        id=number, platform=platform, device_kind=kind, slice_index=slice_index, process_index=process_index,
        coords=coords, core_on_chip=0,
    )  # fmt: skip


def tpu_slices(number):
    """Slices of 2 x 4 chips each, in the order of another host first."""
    return [
        device(8 * index + 4 * x + y, "tpu", slice_index=index, process_index=2 * index + y // 2, coords=(x, y, 0))
        for index in reversed(range(number))
        for y in range(4)
        for x in range(2)
    ]


@pytest.mark.parametrize("sizes", [(2, 8, 1), (2, 2, 4), (4, 1, 4), (16, 1, 1)])
def test_data_alone_spans_slices(sizes):
    grid = arrange(sizes, tpu_slices(2))
    assert grid.shape == sizes and len({device.id for device in grid.flat}) == 16
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert (slices == slices[:, :1, :1]).all(), "fsdp and tensor stay inside a slice"
    assert sorted(slices[:, 0, 0]) == [0] * (sizes[0] // 2) + [1] * (sizes[0] // 2)


def test_a_mesh_that_would_tear_slices_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"data=1 on the 16 devices of 4 processes, .* 2 slices, .* mesh.data=2, .* 8 "):
        make_mesh(MeshConfig(data=-1, fsdp=16), tpu_slices(2))
    with pytest.raises(UserError, match=r"data=1 on the 32 devices of 2xv5e-16"):
        abstract_mesh(MeshConfig(data=1, fsdp=32), parse_topology("2xv5e-16"))


def test_hosts_of_gpus_may_be_torn_but_are_not_where_data_is_large_enough():
    """To jax each host of GPUs is a slice; fsdp over several of them is usual."""
    hosts = [device(4 * index + n, "gpu", slice_index=index, process_index=index) for index in (1, 0) for n in range(4)]
    assert number_of_slices(hosts) == 1
    for sizes in ((1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)):
        ids = np.vectorize(lambda device: device.id)(arrange(sizes, hosts))
        np.testing.assert_array_equal(ids, np.arange(8).reshape(sizes))


def test_sizes_on_devices():
    assert mesh_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 16, "there") == (4, 2, 2)
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 16, "there", slices=2) == (2, 4, 2)
    with pytest.raises(UserError, match=r"does not fit the 8 devices of 2 processes; .* as mesh.data=8 "):
        make_mesh(MeshConfig(fsdp=3), [device(n, "cpu", process_index=n // 4) for n in range(8)])


def test_the_kernel_is_that_of_the_devices_compiled_for():
    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=tpu)
    assert local_platform() == jax.default_backend()
    with jax.sharding.use_abstract_mesh(mesh):
        assert local_platform() == "tpu"
        seen = []
        jax.eval_shape(lambda: seen.append(local_platform()))
        assert seen == ["tpu"]
    assert local_platform() == jax.default_backend()


def describes(capsys, *arguments):
    assert main(["describe", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_formula_is_told_for_hardware_that_is_not_there(tiny_config, capsys):
    text = describes(capsys, tiny_config, "--topology", "v5e-16", "mesh.fsdp=4", "data.batch_size=16",
                     "data.seq_len=128")  # fmt: skip
    assert "memory of one device of 16 of v5e-16 (mesh data=4, fsdp=4, tensor=1)" in text
    assert "attention kernel: splash, the one for tpu" in text and "this machine" not in text
    text = describes(capsys, tiny_config, "--topology", "gpu-4", "model.dtype=bfloat16")
    assert "memory of one device of 4 of gpu-4" in text and "attention kernel: cudnn, the one for gpu" in text


def test_mistakes_are_one_sentence(tiny_config, capsys, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(topology.jax.config, "update", lambda *setting: None)  # jax runs already, and goes on
    for arguments, words in {
        ("--topology", "v5e-17"): "did you mean",
        ("--topology", "v5e-16", "mesh.fsdp=3"): "does not fit the 16 devices of v5e-16",
        ("--topology", "v5e-16", "data.batch_size=8"): "batch_size=8 is not divisible by the 16 devices",
        ("--compile", "--topology", "v5e-4"): 'not installed; pip install "jax[tpu]"',
        ("--topology", "v5e-4", "model.attention=cudnn"): "cudnn needs an NVIDIA GPU",
    }.items():
        assert main(["describe", str(tiny_config), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error


def run(*arguments, timeout=300):
    """describe in a process of its own: what it compiles for is fixed when jax starts."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "lckv_jax", "describe", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
        timeout=timeout,
    )  # fmt: skip


def test_fake_devices_are_made_and_said_to_be_fake(tiny_config):
    done = run(tiny_config, "--compile", "--topology", "gpu-6", "mesh.fsdp=2", "data.batch_size=6",
               "model.dtype=bfloat16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train step compiled for gpu-6, 6 cpu devices (mesh data=3, fsdp=2, tensor=1)" in done.stdout
    assert "fake devices of this machine: arguments and collectives are the mesh's" in done.stdout
    compiled = done.stdout.partition("train step compiled")[2]
    assert "attention kernel: xla, because there is no other one for cpu" in compiled
    assert "attention kernel: cudnn, the one for gpu" in done.stdout.partition("train step compiled")[0]
    assert re.search(r"^  all-gather +[\d.,]+ MiB  \d+ times$", compiled, re.M)


# ---------------------------------------------------------------- with the compiler for TPUs


@pytest.fixture
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu absent: pip install "jax[tpu]", best in an environment of its own')


def planned(*arguments):
    """GiB that the compiler plans on one chip, and the text after the formula's. One mesh, no noise, and it fits."""
    done = run(*arguments, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    compiled = done.stdout.partition("train step compiled")[2]
    assert ": it fits" in compiled and "attention kernel: splash, the one for tpu" in compiled
    return float(re.search(r"all of it at once +([\d.,]+) MiB", compiled)[1].replace(",", "")) / 1024, compiled


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("preset", "name", "mesh", "most"),
    [
        ("lckv-50m", "v5e-1", (), 15.75),
        ("lckv-50m", "v6e-4", ("mesh.fsdp=4",), 31.25),
        ("tinyllama-1b-lckv-w2", "v5e-16", ("mesh.fsdp=16",), 15.75),
        ("tinyllama-1b-lckv-w2", "v6e-8", (), 31.25),
    ],
)
def test_presets_fit_tpus(compiler, preset, name, mesh, most):
    gib, text = planned(ROOT / "configs" / f"{preset}.yaml", "--compile", "--topology", name, *mesh)
    assert 0.1 < gib < most
    assert ("no collectives" in text) == name.endswith("-1")


SMALL = ["data.seq_len=128", "data.batch_size=8", "model.head_dim=64", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


@pytest.mark.libtpu
def test_slices_are_joined_by_data(compiler, tiny_config):
    _, text = planned(tiny_config, "--compile", "--topology", "2xv5e-4", *SMALL)
    assert text.startswith(" for 2xv5e-4, 8 TPU v5 lite devices in 2 slices (mesh data=2, fsdp=2, tensor=2)")
    assert re.search(r"^  reduce-scatter|^  all-reduce", text, re.M)


@pytest.mark.libtpu
def test_a_step_that_does_not_fit_is_one_sentence(compiler, tiny_config):
    done = run(tiny_config, "--compile", "--topology", "v5e-1", *SMALL[:1], "data.batch_size=262144")
    assert done.returncode == 2 and done.stderr.startswith("error: the train step does not fit a TPU v5 lite: ")
    assert "15.75G" in done.stderr and "train.accumulation=1" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.libtpu
def test_a_layout_that_libtpu_refuses(compiler, tiny_config):
    done = run(tiny_config, "--compile", "--topology", "v5e:3x3")
    assert done.returncode == 2 and "libtpu refuses it" in done.stderr and done.stderr.count("\n") == 1
