"""The exceptions that the command line turns into a sentence and an exit code, and the codes."""

BUG = 1  # an exception that nobody expected, with its traceback
MISTAKE = 2  # one sentence about what the user can mend
STOPPED = 42  # SIGTERM; everything is saved
INTERRUPTED = 130  # Ctrl-C, as shells say it
PEER_FAILED = 134  # another process or a collective failed; also how JAX itself ends a process then
HUNG = 142  # no step for too long: 128 + SIGALRM


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and the mend, in one sentence.

    `python -m lckv_jax` prints it after `error:` and exits with code 2.
    """


class Stopped(SystemExit):
    """SIGTERM ended the command, and everything is saved: the same command goes on from there.

    `python -m lckv_jax` prints it and exits with code 42, at which schedulers and launchers start it again. A
    SystemExit, as it may come from anywhere: `except Exception` must not take it for a fault of what it interrupts.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = STOPPED
