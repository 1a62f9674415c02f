"""The one error that a user's input can cause."""


class UserError(Exception):
    """Something in the user's input or environment is wrong.

    The message is one clear sentence: what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class DivergedError(UserError):
    """A loss that is not finite: the run cannot go on as it is."""


class RetryError(UserError):
    """Something broke that may work next time: what was finished is kept, and the same command goes on with it."""
