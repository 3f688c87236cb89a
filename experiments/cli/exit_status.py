"""Error lines and exit statuses, shared by all commands."""

import contextlib
import sys
import traceback
from collections.abc import Callable

from experiments.cli import jax_env_vars
from experiments.cli.standard_streams import standard_streams
from mac.errors import UserError, one_line
from mac.free_memory import held_by_others
from mac.run import hosts
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
        jax_env_vars.take_memory_as_needed()
        if sys.platform == "win32":
            print("note: untested on Windows; take Linux, or WSL", file=sys.stderr)
        try:
            status = _status(work, short_of_memory, interrupted)
        except SystemExit as stop:
            if stop.code:
                raise
            raise SystemExit(streams.verdict(0)) from None
        except BaseException:
            if hosts.count() > 1:  # the others would wait for this process
                traceback.print_exc()
                hosts.leave(1, agreed=False)
            raise
        hosts.leave(status, agreed=status not in (1, 2))
        return streams.verdict(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the memory of the host or of a device does not suffice.

    XLA, CUDA's libraries and warp each have words of their own. A kernel that wants more shared memory than a
    multiprocessor has is another fault, though XLA gives it the same status.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    if "shared memory" in text or "shmem" in text:
        return False
    words = "resource_exhausted", "out of memory", "out_of_memory", "_alloc_failed", "failed to allocate"
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _others_on_the_card() -> str:
    """Returns a remedy where other programs hold much of the card's memory, else an empty text."""
    card = None
    with contextlib.suppress(RuntimeError):  # JAX did not start
        card = held_by_others()
    if card is None:
        return ""
    taken, total = ((size / 1e9) for size in (card.total - card.free, card.total))
    return f"; other programs hold {taken:.0f} of this GPU's {total:.0f} GB (nvidia-smi names them)"


def _status(work: Callable[[], int], short_of_memory: str, interrupted: str) -> int:
    try:
        with sigterm_raises():
            return work()
    except UserError as error:
        if hosts.is_first() or not isinstance(error, Diverged | hosts.SharedError):  # which all notice
            print(f"error: {hosts.name()}{error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            hosts.wait_for_loss()
            raise
        remedies = short_of_memory + ("" if isinstance(error, MemoryError) else _others_on_the_card())
        print(f"error: out of memory ({one_line(error)}); {remedies}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as signal:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        status = 143 if isinstance(signal, Terminated) else 130
        hosts.leave(status, agreed=False)
        return status
