"""`describe --compile`: the real step is compiled on the mesh, its memory and collectives are told, nothing runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lckv_jax.compiled import Collective, collectives, compile_step
from lckv_jax.config import load_config
from lckv_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_on_eight_devices(tiny_config):
    """The state is split by eight, the outputs take the place of the arguments, and weights are gathered."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "lckv_jax", "describe", str(tiny_config), "--compile", "mesh.fsdp=8"]
    done = subprocess.run(
        [*command, "data.batch_size=8"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "train step compiled for 8 cpu devices (mesh data=1, fsdp=8, tensor=1)" in text
    assert re.search(r"^  all-gather +[\d.,]+ MiB  \d+ times$", text, re.M), text
    assert "those inside loops run several times" in text
    assert re.search(r"^  temporaries +[\d.,]+ MiB$", text, re.M)
    exact = [float(x) for x in re.findall(r"([\d.]+) MiB  exact", text)]
    arguments = float(re.search(r"arguments \(state and batch\) +([\d.]+) MiB", text)[1])
    assert arguments == pytest.approx(sum(exact), abs=0.3)
    assert not (tiny_config.parent / "run").exists() and not (tiny_config.parent / "data").exists()


def test_the_state_is_donated_and_never_made(tiny_config, monkeypatch):
    def never(*arguments):
        raise AssertionError("a state was made")

    monkeypatch.setattr("lckv_jax.train.state.init_state", never)
    step = compile_step(load_config(tiny_config, ["model.sharing=standard"]))
    assert step.memory["outputs in place of arguments"] > 0.9 * step.memory["outputs"]
    assert step.collectives == [] and step.seconds > 0


def test_a_mesh_that_does_not_fit(tiny_config):
    with pytest.raises(UserError, match=r"does not fit the 1 device of this machine; .* as mesh\.data=1 "):
        compile_step(load_config(tiny_config, ["mesh.fsdp=8"]))


HLO = """
%body (p: f32[8]) -> f32[8] {
  %all-gather.1 = bf16[8,16]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %ar = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), to_apply=%add
}
ENTRY %main {
  %ags = (f32[2]{0:T(128)}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ags)
  %many = ((f32[2]{0}, s8[4]{0}), (f32[16]{0}, s8[32]{0})) all-gather-start(%x, %y), dimensions={0}
  %cp = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %cpd = f32[8]{0} collective-permute-done(%cp)
  %rs = f32[3]{0} reduce-scatter(%x), metadata={op_name="a = all-reduce(b)"}
  ROOT %p2 = pred[5]{0} all-to-all(%q)
}

%all-reduce-scatter.1 (input.1: f32[8,16]) -> f32[8,4] {
  %input.1 = f32[8,16]{1,0} parameter(0)
  %ar.2 = f32[8,16]{1,0} all-reduce(%input.1), to_apply=%add
  ROOT %dynamic-slice.1 = f32[8,4]{1,0} dynamic-slice(%ar.2, %zero, %offset), dynamic_slice_sizes={8,4}
}
"""


def test_collectives_of_a_program():
    """Pairs count once, by their results; names of operands and metadata do not count; what TPUs write as an all-reduce
    of which each device keeps its part is a reduce-scatter."""
    assert collectives(HLO) == [
        Collective("all-gather", 3, 8 * 16 * 2 + 16 * 4 + (16 * 4 + 32)),
        Collective("all-reduce", 1, (4 + 4) * 4),
        Collective("reduce-scatter", 2, 3 * 4 + 8 * 4 * 4),
        Collective("all-to-all", 1, 5),
        Collective("collective-permute", 1, 8 * 4),
    ]
    assert collectives("ENTRY %main { ROOT %x = f32[] add(%a, %b) }") == []
