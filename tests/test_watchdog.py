"""The watchdog lets a process live that is fed, and ends one that is not, wherever it hangs, with its stacks."""

import subprocess
import sys
import textwrap

import pytest

from lckv_jax.parallel.watchdog import Watchdog


def run(body):
    code = "import time\nfrom lckv_jax.parallel.watchdog import Watchdog\ndef main():\n" + textwrap.indent(body, "    ")
    return subprocess.run([sys.executable, "-c", code + "\nmain()"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(60)",
        "sum(range(10**12))",  # in C, and never lets go of Python
        "import threading; threading.Thread(target=time.sleep, args=(60,)).start(); threading.Event().wait()",
    ],
)
def test_it_ends_a_process_that_hangs(hang):
    done = run(f"with Watchdog(0.3) as watchdog:\n    watchdog.feed()\n    {hang}")
    assert done.returncode == -14  # 142 for a shell
    assert "in main" in done.stderr


def test_it_spares_a_process_that_is_fed_or_done():
    body = "with Watchdog(1) as watchdog:\n    for _ in range(12): watchdog.feed(); time.sleep(0.2)\ntime.sleep(1.5)"
    done = run(body)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_comes_first_or_takes_long_has_ten_times_as_long():
    assert run("with Watchdog(0.3):\n    time.sleep(1)").returncode == 0
    done = run("with Watchdog(0.3) as w:\n    w.feed()\n    w.feed(longer=True)\n    time.sleep(1)")
    assert done.returncode == 0


def test_the_limit_follows_the_steps(monkeypatch):
    times = iter(range(0, 100_000, 50))  # a step takes 50 seconds
    monkeypatch.setattr("lckv_jax.parallel.watchdog.time.monotonic", lambda: next(times))
    with Watchdog(None) as watchdog:
        assert watchdog.limit() == 300
        for _ in range(5):
            watchdog.feed()
        assert watchdog.limit() == 20 * 50
    with Watchdog(7.0) as watchdog:
        assert watchdog.limit() == 7
