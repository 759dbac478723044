"""What a run says when it ends."""

from pathlib import Path

from small_runs import run_config

from lckv_jax.train.summary import summary

TIME = {"start": 10.0, "compile": 30.0, "data": 0.0, "step": 60.0, "lost": 0.0}


def account(time=TIME, stretches=1, lost_steps=0, **more):
    return {"step": 9, "time": time, "stretches": stretches, "lost_steps": lost_steps, **more}


def steps(first, last, **more):
    return [
        {"step": s, "loss": 5.0 - s, "tokens_per_second": 100.0 * s, "skipped": 0, **more}
        for s in range(first, last + 1)
    ]


def lines(records, *, start=0, stop=9):
    return summary(run_config(), records, start=start, stop=stop, checkpoint=Path("run/9"), curve=Path("loss.png"))


def test_all_there_is_to_say():
    valid = [{"step": 5, "valid_loss": 2.0}, {"step": 9, "valid_loss": 2.5}]
    told = lines([*steps(1, 8, mfu=0.25, hfu=0.9), *steps(9, 9, skipped=2), *valid, account()])
    assert told == [
        "done: 9 steps of 256 tokens, 2,304 in all",
        "time 1:40 for 9 steps: step 60.0% (goodput), compile 30.0%, start 10.0%",
        "speed 500 tokens/s (median), MFU 25.0% (FLOPs of the standard model), HFU 90.0% (of every pass)",
        "validation loss 2.5000 (ln(V) is 4.16), perplexity 12.2; the best was 2.0000 at step 5",
        "2 of 9 updates were left out (`skip_cause` in metrics.jsonl)",
        "checkpoint run/9, loss curve loss.png",
    ]


def test_what_nobody_recorded_is_not_told():
    assert lines([]) == ["done: 9 steps of 256 tokens, 2,304 in all", "checkpoint run/9, loss curve loss.png"]
    told = lines([{"step": 9, "loss": None, "tokens_per_second": None}, {"step": 9, "valid_loss": None}, account()])
    assert [line.split()[0] for line in told] == ["done:", "time", "checkpoint"]
    assert len(lines([account(dict.fromkeys(TIME, 0.0))])) == 2  # a clock that stood


def test_a_run_of_several_stretches_tells_what_it_lost():
    time = {**TIME, "step": 40.0, "lost": 15.0, "down": 5.0}
    told = lines([account(), account(time, 3, 7)])
    shares = "step 40.0% (goodput), compile 30.0%, lost 15.0% (7 steps made again), start 10.0%, down 5.0%"
    assert told[1] == f"time 1:40 for 9 steps in 3 stretches: {shares}"
    assert "(1 step made again)" in lines([account(time, 2, 1)])[1]


def test_what_the_checkpoints_cost():
    saves = [account(save_stall=stall) for stall in (0.5, 0.02, 0.01)]
    assert lines(saves)[2] == "checkpoints held up the steps for 0.02 s each (median)"
    written = {"step": 9, "save_seconds": 1.25}
    assert lines([*saves, written])[2] == (
        "checkpoints held up the steps for 0.02 s each, and were on disk after 1.25 s (medians)"
    )


def test_the_speed_is_that_of_this_stretch():
    told = lines([*steps(1, 6), *steps(7, 9, device_flops_per_second=2.5e12)], start=6)
    assert told[1] == "speed 800 tokens/s (median), 2.5 TFLOP/s a device"
    assert lines(steps(1, 9), start=9)[1].startswith("speed 500 tokens/s")  # no steps: that of the run


def test_the_last_validation_may_be_the_best():
    told = lines([{"step": 5, "valid_loss": 2.5}, {"step": 9, "valid_loss": 2.0}])
    assert told[1] == "validation loss 2.0000 (ln(V) is 4.16), perplexity 7.4"


def test_a_loss_too_large_for_its_perplexity():
    assert "perplexity inf" in lines([{"step": 9, "valid_loss": 1000.0}])[1]


def test_a_run_that_was_stopped_does_not_say_done():
    assert lines(steps(1, 4), stop=4)[0] == "stopped: 4 of 9 steps of 256 tokens, 1,024 in all"
