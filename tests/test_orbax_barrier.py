"""A process whose save fails does not wait for the others, who wait for it."""

import orbax.checkpoint as ocp

from lckv_jax.orbax_barrier import make_barrier


def test_only_a_save_that_goes_well_waits(monkeypatch):
    met = []
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: lambda key, timeout_ms: met.append(key))
    barrier = make_barrier()
    barrier(key="well", timeout_ms=1)
    try:
        try:
            raise OSError("a full disk")
        finally:
            barrier(key="on the way out", timeout_ms=1)
    except OSError:
        pass
    barrier(key="afterwards", timeout_ms=1)
    assert met == ["well", "afterwards"]
