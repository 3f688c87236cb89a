"""The score of a policy in an environment: success, D4RL's normalised score, or the return."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mac.types import EnvSpec, Episodes


class ScoreKind(NamedTuple):
    """One kind of number, and how it is written.

    Attributes:
        name: of its column in `eval.jsonl`, and in tables.
        axis: its label in a picture.
        form: how it is written in a table, as for `format`; `short` in a picture; `plain` in a line.
    """

    name: str
    axis: str
    form: str
    short: str
    plain: str


SUCCESS = ScoreKind("success", "success rate", ".1%", ".0%", ".2f")
SCORE = ScoreKind("score", "normalised score", ".1f", ".1f", ".1f")
RETURN = ScoreKind("return", "return", ",.1f", ",.0f", ".1f")
MEASURES = {measure.name: measure for measure in (SUCCESS, SCORE, RETURN)}


def measure_of(spec: EnvSpec) -> ScoreKind:
    """Success; where data record rewards, the normalised score, or, without reference returns, the return."""
    if not spec.recorded:
        return SUCCESS
    return RETURN if spec.score_range is None else SCORE


def normalised_score(
    returns: Float[np.ndarray, "*E"], score_range: tuple[float, float]
) -> Float[np.ndarray, "*E"]:
    """100 (R - low) / (high - low): 0 for the return of a random policy, 100 for that of an expert.

    Source: Fu et al. 2020 (D4RL), section 6.
    """
    low, high = score_range
    return np.asarray(100 * (returns - low) / (high - low))


def values(spec: EnvSpec, result: Episodes) -> Float[np.ndarray, "S tasks E"]:
    """The number by which each episode is judged."""
    if not spec.recorded:
        return np.asarray(result.success, np.float64)
    returns = np.asarray(result.episode_return, np.float64)
    return returns if spec.score_range is None else normalised_score(returns, spec.score_range)


def score_columns(spec: EnvSpec, mean_return: float) -> dict[str, Any]:
    """Returns further columns of a row of `eval.jsonl`: the kind of score, and the score."""
    measure = measure_of(spec)
    if measure is SUCCESS:
        return {}
    named = {"measure": measure.name}
    if spec.score_range is None:
        return named
    return named | {"score": float(normalised_score(np.asarray(mean_return), spec.score_range))}
