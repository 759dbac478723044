"""Every kernel against the reference: outputs, gradients, empty rows, strictness; the choice between them; the mesh.

Without its device, cuDNN's path runs around jax's own implementation and splash in the interpreter; the kernels
themselves are under the markers `gpu` and `tpu`.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_internals
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model import kernels
from lckv_jax.model.attention import attend
from lckv_jax.model.loss import loss
from lckv_jax.model.transformer import init_params

ROOT = Path(__file__).resolve().parent.parent
UNOPTIMIZED = (
    {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
)  # compiles in half the time
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    sharing="0_3_3_3", no_grad_passes=1, grad_passes=2, window=5, init_std=0.2, remat="attention",
)  # fmt: skip


@pytest.fixture
def on(monkeypatch):
    """Lets `attend` run a kernel here as if this were its platform."""

    def pretend(platform, **options):
        monkeypatch.setattr(kernels, "local_platform", lambda: platform)
        name = {"gpu": "cudnn", "tpu": "splash"}[platform]
        monkeypatch.setattr(kernels, name, partial(getattr(kernels, name), **options))

    return pretend


def arrays(T, heads=(4, 2), H=16, B=2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, T, h, H)), dtype) for h in (heads[0], heads[1], heads[1]))


def layout(kind, T):
    """(positions, segments) of two rows."""
    line = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    if kind == "documents":
        starts = [[0, T // 3, T // 3 + 1, T // 2], [0, T // 2 - 1]]
        segments = np.stack([np.searchsorted(row, np.arange(T), side="right") for row in starts]).astype(np.int32)
        first = np.stack([np.array(row)[s - 1] for row, s in zip(starts, segments)])
        return jnp.asarray(line - first, jnp.int32), jnp.asarray(segments)
    if kind == "padding":
        return jnp.asarray(np.maximum(line - np.array([[T // 4 + 1], [0]]), -1), jnp.int32), None
    return jnp.asarray(line), None


def run(qkv, kind, backend="xla", **options):
    positions, segments = layout(kind, qkv[0].shape[1])
    return attend(
        *qkv, q_pos_BT=positions, k_pos_BS=positions, q_seg_BT=segments, k_seg_BS=segments, plain=kind == "plain",
        backend=backend, **options,
    )  # fmt: skip


def with_gradients(qkv, kind, backend="xla", **options):
    def objective(qkv):
        out = run(qkv, kind, backend, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    both = jax.value_and_grad(objective, has_aux=True)
    (_, out), grads = jax.jit(both, compiler_options=UNOPTIMIZED)(qkv)
    return tuple(np.asarray(x, np.float32) for x in (out, *grads))


def assert_same(qkv, kind, backend, atol, **options):
    got, want = with_gradients(qkv, kind, backend, **options), with_gradients(qkv, kind, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, np.abs(b).max()), err_msg=name)
    empty = np.all(want[0] == 0.0, axis=(2, 3))
    assert np.all(got[0][empty] == 0.0) and (empty.any() or not options["strict"])


# ---------------------------------------------------------------- without a device

CUDNN = {"implementation": "xla"}
SPLASH = {"interpret": True}


@pytest.mark.parametrize(
    ("kind", "strict", "window", "T", "heads"),
    [
        ("plain", False, None, 12, (4, 2)),
        ("plain", False, 5, 13, (4, 4)),
        ("plain", True, None, 13, (4, 2)),
        ("plain", True, 1, 12, (4, 2)),
        ("plain", True, 2, 12, (4, 1)),
        ("plain", True, 5, 12, (4, 2)),
        ("documents", False, 5, 12, (4, 2)),
        ("documents", True, None, 13, (4, 2)),
        ("documents", True, 2, 12, (4, 1)),
        ("padding", True, None, 12, (4, 2)),
    ],
)
def test_cudnn_path_equals_reference(on, monkeypatch, kind, strict, window, T, heads):
    on("gpu", **CUDNN)
    monkeypatch.setattr(kernels, "_refusal", lambda *_: None)  # float32, for a tight tolerance
    assert_same(arrays(T, heads), kind, "cudnn", 1e-5, strict=strict, window=window)


@pytest.mark.parametrize(
    ("kind", "strict", "window", "T", "heads"),
    [
        ("plain", True, None, 128, (4, 2)),
        ("plain", True, 30, 384, (2, 2)),  # three blocks
        ("plain", True, 1, 128, (4, 2)),
        ("documents", False, 30, 128, (2, 1)),
        ("documents", True, 2, 128, (4, 2)),
        ("padding", True, None, 128, (2, 1)),
    ],
)
def test_splash_equals_reference(on, kind, strict, window, T, heads):
    on("tpu", **SPLASH)
    assert_same(arrays(T, heads), kind, "splash", 1e-5, strict=strict, window=window)


BACKENDS = {"xla": ("cpu", {}, 12), "cudnn": ("gpu", CUDNN, 12), "splash": ("tpu", SPLASH, 128)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "documents"])
def test_strict_rows_never_see_their_own_token(on, monkeypatch, backend, kind):
    platform, options, T = BACKENDS[backend]
    if options:
        on(platform, **options)
        monkeypatch.setattr(kernels, "_refusal", lambda *_: None)
    q, k, v = arrays(T)
    attention = jax.jit(lambda k, v: run((q, k, v), kind, backend, strict=True))
    before = np.asarray(attention(k, v))
    assert np.all(before[:, 0] == 0.0)
    for t in (0, T // 2, T - 1):
        after = np.asarray(attention(k.at[:, t].set(1e4), v.at[:, t].set(-1e4)))
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
        assert t == T - 1 or np.any(after[:, t + 1 :] != before[:, t + 1 :])


@pytest.mark.parametrize("kind", ["plain", "documents"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_cudnn_path_of_one_token(on, monkeypatch, kind, strict):
    on("gpu", **CUDNN)
    monkeypatch.setattr(kernels, "_refusal", lambda *_: None)
    qkv = arrays(1)
    out, *grads = (
        with_gradients(qkv, "plain", "cudnn", strict=strict)
        if kind == "plain"
        else with_gradients(qkv, "padding", "cudnn", strict=strict)
    )
    assert all(np.isfinite(grad).all() for grad in grads)
    row = 1  # row 0 is padding in the other kind
    want = np.zeros_like(out[row]) if strict else np.repeat(np.asarray(qkv[2][row]), 2, axis=1)
    np.testing.assert_allclose(out[row], want, atol=1e-6)


def test_model_loss_and_gradients_through_splash(on):
    """The whole model: contexts, passes, scans and saved attention outputs reach the kernel."""
    on("tpu", **SPLASH)
    compare_models(CONFIG.model_copy(update={"grad_passes": 1}), "splash", 128, True, 1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_model_loss_and_gradients_through_cudnn_path(on, monkeypatch, packed):
    on("gpu", **CUDNN)
    monkeypatch.setattr(kernels, "_refusal", lambda *_: None)
    compare_models(CONFIG.model_copy(update={"grad_passes": 1 + (not packed)}), "cudnn", 32, packed, 1e-4)


def compare_models(config, backend, T, packed, tolerance):
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, T + 1), 0, config.vocab_size)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, T + 1)), axis=1)) if packed else None
    results = []
    for name in ("xla", backend):
        changed = config.model_copy(update={"attention": name})
        objective = partial(loss, config=changed, tokens_BT=tokens, segment_ids_BT=segments)
        both = jax.jit(jax.value_and_grad(objective), compiler_options=UNOPTIMIZED)
        results.append(jax.device_get(both(params)))
    (want, want_grads), (got, grads) = results
    assert abs(want - got) <= tolerance * abs(want)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        scale = np.abs(b.astype(np.float32)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_cudnn_lowers_and_no_kernel_runs_twice(on, monkeypatch, packed):
    """jax accepts every argument for CUDA, forward and backward; `remat: attention` calls the kernel as often as none,
    and `full` once more for each of the backward pass."""
    on("gpu")
    monkeypatch.setattr(cudnn_internals, "check_cudnn_version", lambda: 91000)
    tokens = jax.ShapeDtypeStruct((2, 34), jnp.int32)
    calls = {}
    for remat in ("none", "attention", "full"):
        config = CONFIG.model_copy(update={"dtype": "bfloat16", "attention": "auto", "remat": remat})
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))

        def objective(params, tokens, segments, config=config):
            return loss(params, config, tokens, segment_ids_BT=segments if packed else None)

        traced = jax.jit(jax.grad(objective)).trace(params, tokens, tokens)
        text = str(traced.jaxpr)
        calls[remat] = [text.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd")]
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("ScaleBiasSoftmaxBackward" if packed else "fmhaSoftmaxBackward") > 0
        assert (lowered.count("ScaleBias") > 0) == packed
    forward, backward = calls["none"]
    assert (
        backward > 0 and calls["attention"] == [forward, backward] and calls["full"] == [forward + backward, backward]
    )


# ---------------------------------------------------------------- the choice


def config(**changes):
    return ModelConfig(**{**CONFIG.model_dump(), "head_dim": 64, "dtype": "bfloat16", **changes})


@pytest.mark.parametrize(
    ("changes", "platform", "seq_len", "backend", "reason"),
    [
        ({}, "gpu", 2047, "cudnn", "the one for gpu"),
        ({}, "tpu", 2048, "splash", "the one for tpu"),
        ({}, "cpu", None, "xla", "no other one for cpu"),
        ({}, "Tesla T4", None, "xla", "no other one for Tesla T4"),
        ({"dtype": "float32"}, "gpu", None, "xla", "cudnn computes in bfloat16, not in float32"),
        ({"head_dim": 192}, "gpu", None, "xla", "cudnn takes no head size 192"),
        ({"head_dim": 20}, "gpu", None, "xla", "set model.head_dim to a multiple of 8 up to 128"),
        ({"dtype": "float32"}, "tpu", 256, "splash", "the one for tpu"),
        ({}, "tpu", 1000, "xla", "set data.seq_len to a multiple of 128"),
        ({"attention": "xla"}, "gpu", 2048, "xla", "as model.attention says"),
        ({"attention": "cudnn"}, "gpu", 2048, "cudnn", "as model.attention says"),
    ],
)
def test_choice(changes, platform, seq_len, backend, reason):
    got = kernels.choose_backend(config(**changes), platform, seq_len=seq_len)
    assert got[0] == backend and reason in got[1] and got[1].startswith(f"attention kernel: {backend}, ")


@pytest.mark.parametrize(
    ("changes", "platform", "seq_len", "words"),
    [
        ({"attention": "cudnn"}, "cpu", None, ["this is cpu", "; set model.attention=auto"]),
        ({"attention": "cudnn", "dtype": "float32"}, "gpu", None, ["float32", "model.dtype=bfloat16"]),
        ({"attention": "cudnn", "head_dim": 136}, "gpu", None, ["136", "model.head_dim"]),
        ({"attention": "splash"}, "gpu", 256, ["needs a TPU", "; set model.attention=auto"]),
        ({"attention": "splash"}, "tpu", 200, ["200", "data.seq_len to a multiple of 128"]),
        ({"attention": "splash", "dtype": "float64"}, "tpu", 256, ["float64", "model.dtype"]),
        ({"attention": "splash", "head_dim": 20}, "tpu", 256, ["20", "model.head_dim"]),
    ],
)
def test_a_kernel_that_cannot_serve_is_an_error(changes, platform, seq_len, words):
    with pytest.raises(UserError, match=f"^model.attention={changes['attention']}: ") as caught:
        kernels.choose_backend(config(**changes), platform, seq_len=seq_len)
    assert all(word in str(caught.value) for word in words)


def test_attend_chooses_by_the_same_rule():
    qkv = arrays(8)
    np.testing.assert_array_equal(run(qkv, "plain", "auto", strict=True), run(qkv, "plain", strict=True))
    for backend in ("cudnn", "splash"):
        with pytest.raises(UserError, match="this is cpu"):
            run(qkv, "plain", backend, strict=True)


def test_plain_needs_a_row_read_by_itself():
    q, k, v = arrays(8)
    positions = jnp.zeros((2, 8), jnp.int32)
    for key, given in (((k[:, :4], v[:, :4]), {}), ((k, v), {"q_seg_BT": positions, "k_seg_BS": positions})):
        with pytest.raises(ValueError, match="plain"):
            attend(q, *key, q_pos_BT=positions, k_pos_BS=positions, strict=True, plain=True, **given)


def test_bias_bytes():
    assert kernels.bias_bytes(config(sharing="standard"), 4, 100) == 4 * 100 * 100 * 2
    assert kernels.bias_bytes(config(sharing="lckv(warmup=2)"), 4, 100) == 2 * 4 * 100 * 100 * 2
    everywhere = config(sharing="lckv(warmup=2)", strict_everywhere=True, dtype="float32")
    assert kernels.bias_bytes(everywhere, 1, 100) == 100 * 100 * 4


def test_benchmark_measures_what_there_is(tmp_path, capsys):
    pytest.importorskip("benchmarks.attention", reason="run from the root of the repository")
    from benchmarks.attention import main, read_pairs

    shape = ["--shape", "1,16,2,1,8", "--dtype", "float32", "--window", "4", "--repeats", "2"]
    assert main([*shape, "--peak", "1e12", "--out", str(tmp_path / "out.json")]) == 0
    cells = json.loads((tmp_path / "out.json").read_text())["cells"]
    measured = [cell["case"] for cell in cells if cell["backend"] == "xla" and len(cell["seconds"]) == 2]
    assert measured == ["causal", "strict", "window", "packed"]
    assert capsys.readouterr().out.count("%") == len(cells)
    assert [read_pairs(16, strict, None, packed) for strict, packed in ((0, 0), (1, 0), (1, 1))] == [136, 120, 24]


# ---------------------------------------------------------------- several devices

ON_A_MESH = """
import os, sys
os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"] = "--xla_force_host_platform_device_count=8", "cpu"
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
import jax, numpy as np
from functools import partial
from lckv_jax.config import MeshConfig
from lckv_jax.model import kernels
from lckv_jax.parallel.mesh import make_mesh
from test_kernels import arrays, run, with_gradients

kernels._refusal = lambda *_: None
kernels.local_platform = lambda: "gpu"
kernels.cudnn = partial(kernels.cudnn, implementation="xla")
split = {"data": 1, "fsdp": 1, "tensor": 1}
for sizes, heads, kind in (({"tensor": 8}, (8, 2), "documents"), ({"data": 2, "tensor": 4}, (12, 6), "plain"),
                           ({"data": 8}, (3, 1), "documents")):  # 2 rows on 8 devices stay whole
    qkv = arrays(12, heads)
    want = with_gradients(qkv, kind, strict=True)
    with jax.set_mesh(make_mesh(MeshConfig(**split | sizes))):
        got = with_gradients(qkv, kind, "cudnn", strict=True)
        out = jax.jit(lambda qkv: run(qkv, kind, "cudnn", strict=True))(qkv)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert out.addressable_shards[0].data.size == out.size // (1 if sizes == {"data": 8} else 8), sizes
    print(sizes, "equal and split")
"""


def test_rows_and_heads_are_split_over_the_mesh():
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3


# ---------------------------------------------------------------- the kernels themselves


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2047, 2048])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("kind", ["plain", "documents", "padding"])
@pytest.mark.parametrize(("strict", "window"), [(False, None), (True, None), (True, 300), (False, 300), (True, 2)])
def test_cudnn_on_its_device(T, H, kind, strict, window):
    assert_same(arrays(T, (8, 2), H, dtype=jnp.bfloat16), kind, "cudnn", 2e-2, strict=strict, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_lckv_model_on_a_gpu_equals_reference(packed):
    compare_models(CONFIG.model_copy(update={"dtype": "bfloat16", "head_dim": 64}), "cudnn", 256, packed, 1e-2)


@pytest.mark.tpu
@pytest.mark.parametrize("T", [128, 2048])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("kind", ["plain", "documents", "padding"])
@pytest.mark.parametrize(("strict", "window"), [(False, None), (True, None), (True, 30), (True, 2)])
def test_splash_on_its_device(T, H, kind, strict, window):
    assert_same(arrays(T, (8, 2), H, dtype=jnp.bfloat16), kind, "splash", 2e-2, strict=strict, window=window)
