"""Set-up of MuJoCo Warp for engine `warp`: availability, version checks and logging.

Importing this module is cheap: neither MJX nor warp are imported before `require_warp` is called.
"""

import importlib.metadata
import logging
from pathlib import Path

import mujoco

from mac.errors import UserError, one_line

_log = logging.getLogger(__name__)


def available() -> bool:
    """Returns whether engine `warp` is installed, without importing anything."""
    try:
        return bool(importlib.metadata.version("warp-lang"))
    except importlib.metadata.PackageNotFoundError:
        return False


def require_warp() -> None:
    """Requires a warp that loads, and redirects its output to a logger.

    Raises:
        UserError: if it is missing or does not load.
    """
    remedy = "`pip install -e '.[warp]'` or use engine c or mjx"
    if not available():
        raise UserError(f"engine warp needs the package warp-lang, which is not installed; {remedy}")
    from mujoco.mjx import warp as bridge  # takes seconds, and imports warp

    if not bridge.WARP_INSTALLED or bridge.mujoco_warp is None:
        versions = f"warp-lang {importlib.metadata.version('warp-lang')} with mujoco {mujoco.__version__}"
        raise UserError(f"engine warp cannot be loaded ({versions}); {remedy}")
    warp = bridge.warp
    if type(warp.get_logger()).__module__.startswith("warp"):  # else the user has chosen a logger
        warp.set_logger(_WarpLog())
    try:
        warp.init()
    except RuntimeError as error:
        raise UserError(f"warp does not start ({one_line(error)}); {remedy}") from error
    cache = Path(warp.config.kernel_cache_dir)
    if not cache.is_dir() or not any(cache.iterdir()):
        _log.warning("engine warp compiles its kernels now, which takes minutes; they are kept in %s", cache)


class _WarpLog:
    """Sends warp's messages, which it would print, to this module's logger."""

    def debug(self, message: str) -> None:
        _log.debug(message)

    info = debug  # a line for each kernel that is loaded

    def warning(self, message: str, category: type[Warning] | None = None, stacklevel: int = 1) -> None:
        _log.warning(message)

    def error(self, message: str) -> None:
        _log.error(message)
