"""Error lines and exit statuses, shared by all commands."""

import sys
from collections.abc import Callable

import jax

from experiments.cli import jax_env_vars
from experiments.cli.standard_streams import standard_streams
from mac.errors import UserError, one_line
from mac.run.io.signals import Terminated, sigterm_raises
from mac.run.train import Diverged


def exit_status(work: Callable[[], int], *, short_of_memory: str, interrupted: str) -> int:
    """Calls `work` and returns its exit status: its own, or 1 diverged, 2 bad input, 128 + a signal's number.

    Meanwhile output that cannot be written or encoded raises nothing (`standard_streams.py`), and variables
    of JAX that would change results are ignored (`jax_env_vars.py`).

    Args:
        short_of_memory: what to do when memory runs out.
        interrupted: what Ctrl-C leaves behind.
    Raises:
        SystemExit: after printing the help.
    """
    with standard_streams() as streams:
        for note in jax_env_vars.set_required():
            print(note, file=sys.stderr)
        if sys.platform == "win32":
            print("note: untested on Windows; take Linux, or WSL", file=sys.stderr)
        try:
            status = _status(work, short_of_memory, interrupted)
        except SystemExit as stop:
            if stop.code:
                raise
            raise SystemExit(streams.verdict(0)) from None
        return streams.verdict(status)


def _status(work: Callable[[], int], short_of_memory: str, interrupted: str) -> int:
    try:
        with sigterm_raises():
            return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: out of memory ({one_line(error)}); {short_of_memory}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as signal:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 143 if isinstance(signal, Terminated) else 130
