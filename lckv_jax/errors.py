"""The one exception that the command line turns into a sentence."""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and the mend, in one sentence.

    `python -m lckv_jax` prints it after `error:` and exits with code 2.
    """
