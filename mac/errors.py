"""The one exception that stands for a mistake in the user's input."""


class UserError(ValueError):
    """Bad input: a file, flag, shape or value that the user can correct.

    The message is one line that names what is wrong, where, and the remedy. The command line
    prints it without a traceback and exits with status 2; library callers may catch it as a
    `ValueError`.
    """
