"""The exceptions that the command line turns into a sentence and an exit code."""


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
        self.code = 42
