"""The profiler window: which steps are traced, also on resume, at the end of the run and when it fails."""

import jax
import jax.numpy as jnp
import pytest

from lckv_jax.train.profiler import Profiler


@pytest.fixture
def spans(monkeypatch):
    """Every start, annotated step and stop of the profiler, which itself stands still: it is slow."""
    told = []

    class Annotation:
        def __init__(self, name, step_num):
            told.append(step_num)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    return told


@pytest.mark.parametrize(
    ("window", "start", "stop", "want"),
    [
        (None, 0, 5, []),
        ((2, 3), 0, 5, ["start", 2, 3, "stop"]),
        ((3, 3), 0, 5, ["start", 3, "stop"]),
        ((1, 9), 0, 5, ["start", 1, 2, 3, 4, 5, "stop"]),  # the run ends first
        ((2, 4), 2, 5, ["start", 3, 4, "stop"]),  # resumed inside
        ((2, 4), 4, 5, []),  # resumed after it
        ((8, 9), 0, 5, []),
    ],
)
def test_the_window(tmp_path, spans, window, start, stop, want):
    said = []
    profiler = Profiler(window, tmp_path / "profile", said.append)
    for step in range(start + 1, stop + 1):
        assert profiler.run(step, lambda x: x + 1, step) == step + 1
    profiler.close()
    profiler.close()
    assert spans == want
    assert len(said) == bool(want)
    assert (tmp_path / "profile").exists() == bool(want)


def test_a_step_that_fails_ends_the_trace(tmp_path, spans):
    profiler = Profiler((1, 9), tmp_path, lambda line: None)
    with pytest.raises(ZeroDivisionError):
        try:
            profiler.run(1, lambda: 1 / 0)
        finally:
            profiler.close()
    assert spans == ["start", 1, "stop"]


def test_what_cannot_be_written_names_the_folder(tmp_path, spans, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Profiler((1, 1), tmp_path / "file" / "profile", print).run(1, int)

    def fail():
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: no space")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with pytest.raises(OSError, match=r"no space.*traces"):
        Profiler((1, 1), tmp_path / "traces", print).run(1, int)


def test_a_real_trace_appears(tmp_path, capfd):
    step = jax.jit(lambda x: x @ x)
    profiler = Profiler((2, 3), tmp_path / "profile", print)
    for number in range(1, 5):
        profiler.run(number, step, jnp.ones((8, 8)))
    profiler.close()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content and b"train" in content
    assert "profiler trace from step 2 to 3" in capfd.readouterr().out
