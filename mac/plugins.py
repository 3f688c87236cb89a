"""Plug-ins: packages that add environments and algorithms of their own, found when names are looked up.

A package declares the entry point in its `pyproject.toml`; the module that the entry point names calls
`baselines.register_algorithm` and `envs_mjx.register_env`:

    [project.entry-points."mac_jax.plugins"]
    mine = "my_package.plugin"
"""

import functools
from importlib.metadata import EntryPoint, entry_points

from mac.errors import UserError, one_line

GROUP = "mac_jax.plugins"
"""The entry points' group."""

_loaded: set[str] = set()


def load_plugins() -> None:
    """Imports the modules of all installed packages that declare the entry point; each once a process.

    Raises:
        UserError: one of them cannot be imported, with its package's name.
    """
    for entry in _declared():
        if entry.value in _loaded:
            continue
        _loaded.add(entry.value)  # first, as the module may look names up itself
        try:
            entry.load()
        except Exception as error:
            _loaded.discard(entry.value)
            package = entry.dist.name if entry.dist else entry.name
            raise UserError(
                f"plug-in {entry.value} of package {package} cannot be loaded "
                f"({type(error).__name__}: {one_line(error)}); mend it, or uninstall {package}"
            ) from error


@functools.cache
def _declared() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))
