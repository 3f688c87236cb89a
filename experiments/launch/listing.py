"""Lists algorithms and environments: `python experiments/run.py --list`."""

import textwrap
from typing import Any

from baselines import algorithms
from envs_mjx.registry import registered_names
from experiments.launch.hparams import HPARAMS, load_rows, patterns, row_applies
from experiments.launch.settings import PRESETS

WIDTH, INDENT = 110, 16


def settings_of(algo: str, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """For each preset, the patterns of environments that an algorithm has settings for.

    These are the rows that say how long to train; the others change a part of them.
    """
    found: dict[str, list[str]] = {}
    for preset in PRESETS:
        whole = [row for row in rows if "steps" in row and row_applies(row, algo, None, preset)]
        if preset != "auto" and whole:
            found[preset] = list(dict.fromkeys(pattern for row in whole for pattern in patterns(row, "env")))
    return found


def algorithm_list() -> str:
    """Every algorithm: its name, paper and year, what it learns, and the settings that it has."""
    rows, parts = load_rows(HPARAMS), []
    for name, entry in algorithms().items():
        parts.append(f"{name:<{INDENT}}{entry.source}")
        parts += [_indented(entry.learns)] if entry.learns else []
        own = load_rows(entry.hparams) if entry.hparams else []
        found = settings_of(name, rows + own)
        for preset, envs in found.items():
            parts.append(_indented(f"--preset {preset}: {', '.join(envs)}"))
        if not found:
            parts.append(_indented("the defaults of its configuration, in any environment"))
    parts.append(
        "\nEnvironments are patterns of --env; values and their sources are in experiments/hparams.toml."
        "\nWhat fits NAME-oraclerep-v0 also serves NAME-v0, whose goals are whole observations, and what fits"
        "\nD4RL's NAME-LEVEL-v2 serves Minari's mujoco/NAME/LEVEL-v0."
    )
    parts.append(
        "\nOn the file of --data.path, without an environment: --env data-only (rewards are in the file) or"
        "\n--env data-only-goals (goals are states of the data); see docs/data.md."
    )
    if registered := registered_names():
        parts.append(f"\nEnvironments of plug-ins: {', '.join(registered)}")
    return "\n".join(parts)


def _indented(text: str) -> str:
    space = " " * INDENT
    return textwrap.fill(text, WIDTH, initial_indent=space, subsequent_indent=space + "  ")
