"""`python tests/faulty_train.py FAULT PROCESS STEP train CONFIG ...`: the command, with a fault in one process.

FAULT: raise, hang (in Python), user (a UserError), saved (one when a checkpoint is on disk) or kill, before batch
number STEP of this start is used, also those of validation; or elsewhere: each process works in the folder
STEP/PROCESS, and does not wait for others to see it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from lckv_jax import __main__ as command
from lckv_jax.errors import UserError
from lckv_jax.train import loop, run_folder

fault, process, step, *words = sys.argv[1:]
out = next((word.removeprefix("out=") for word in words if word.startswith("out=")), "")
if fault == "elsewhere":
    os.makedirs(os.path.join(step, process))
    os.chdir(os.path.join(step, process))
    run_folder._SEEN_SECONDS = 1.0
seen = 0
original = loop.global_batch


def faulty(*arguments):
    global seen
    seen += 1
    if fault != "elsewhere" and seen == int(step) and os.environ.get("JAX_PROCESS_ID", "0") == process:
        print(f"FAULT {fault}", flush=True)
        if fault == "raise":
            raise RuntimeError("a fault on purpose")
        while fault == "saved" and not any(path.name.isdecimal() for path in Path(out, "checkpoints").iterdir()):
            time.sleep(0.01)
        if fault in ("user", "saved"):
            raise UserError("a mistake on purpose; mend it")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            time.sleep(1)
    return original(*arguments)


loop.global_batch = faulty
command._leave(command.main(words))
