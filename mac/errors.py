"""The one exception that stands for a mistake in the user's input, and how to word it."""


class UserError(ValueError):
    """Bad input: a file, flag, shape or value that the user can correct.

    The message is one line that names what is wrong, where, and the remedy. The command line
    prints it without a traceback and exits with status 2; library callers may catch it as a
    `ValueError`.
    """


def one_line(error: BaseException) -> str:
    """Text of another library's error for use within a `UserError`: one line of at most 200 characters.

    Both ends of a longer text are kept, since the last words often are the system's own reason.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:75]} ... {text[-120:]}"
