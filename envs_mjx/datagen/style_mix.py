"""Datasets whose episodes are of several styles: `play=0.5,noisy=0.3,random=0.2` are shares of episodes.

The style of an episode follows from its number alone, so that a dataset of more episodes begins with those of
a smaller one. Up to every number the counts follow the shares.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx import experts
from envs_mjx.datagen.data_policy import AbstractDataPolicy, ExpertDecision, TargetEvents
from envs_mjx.datagen.dataset_spec import episode_rows
from envs_mjx.locomotion.walkers import MAZES
from envs_mjx.registry import STYLES, maze_styles, parse
from mac.errors import UserError

RANDOM = "random"
"""The style of uniform random actions."""
_SUM_ERROR = 1e-6


class StyleMix(NamedTuple):
    """Styles, and the share of episodes of each."""

    styles: tuple[str, ...]
    shares: tuple[float, ...]

    def place_of(self, index: int) -> int:
        """Returns the place in `styles` of the style of episode number `index`."""
        return _places(self.shares, 1 << index.bit_length())[index]


@functools.cache
def _places(shares: tuple[float, ...], count: int) -> list[int]:
    """Places of the first `count` episodes: each time the style that is furthest behind its share."""
    made, found = [0] * len(shares), []
    for index in range(count):
        behind = [share * (index + 1) - n for share, n in zip(shares, made, strict=True)]
        place = behind.index(max(behind))
        made[place] += 1
        found.append(place)
    return found


def read_mix(text: str, dataset: str, flag: str = "--mix") -> StyleMix:
    """Reads shares of styles for a dataset, whose own style only names its files.

    Raises:
        UserError: in one line, which begins with `flag`: an unknown style, one that is named twice, episodes
            of other lengths, or shares that are not positive or do not sum to 1.
    """
    known = possible_styles(dataset)
    pairs = [part.partition("=") for part in text.split(",")]
    names = tuple(name.strip() for name, _, _ in pairs)
    for name in names:
        if name not in known:
            raise UserError(f"{flag}={text}: {dataset} cannot have style {name!r}; choose {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"{flag}={text}: names {name} twice; add up its shares")
    try:
        shares = tuple(float(share) for _, _, share in pairs)
    except ValueError:
        raise UserError(f"{flag}={text}: write STYLE=SHARE,..., such as {known[0]}=0.8,random=0.2") from None
    if not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > _SUM_ERROR:
        raise UserError(f"{flag}={text}: shares must be positive and sum to 1; these sum to {sum(shares):g}")
    return StyleMix(names, shares)


def possible_styles(dataset: str) -> tuple[str, ...]:
    """Returns the styles whose episodes are as long as those of a dataset, and `random`."""
    task_id = parse(dataset)
    if task_id.family not in MAZES:
        return (*(style for style in STYLES if style in experts.STYLES), RANDOM)
    family, rows = task_id.family, episode_rows(dataset)
    return (*(s for s in maze_styles(family) if episode_rows(f"{family}-{s}-v0") == rows), RANDOM)


class RandomDataPolicy(AbstractDataPolicy):
    """Uniform random actions in the environment of another data policy, whose expert is not listened to."""

    inner: AbstractDataPolicy
    rows: int = eqx.field(static=True)

    def __init__(self, inner: AbstractDataPolicy):
        self.inner, self.rows = inner, inner.rows

    @property
    def engine(self) -> str:
        return self.inner.engine

    @property
    def widths(self) -> dict[str, int]:
        return self.inner.widths

    def begin(self, world_key: Key[Array, ""], expert_key: Key[Array, ""]) -> Any:
        return self.inner.begin(world_key, expert_key)

    def decide(self, state: Any, key: Key[Array, ""]) -> ExpertDecision:
        k_expert, k_action = jr.split(key)
        found = self.inner.decide(state, k_expert)
        action = jr.uniform(k_action, jnp.shape(found.row.actions), minval=-1.0, maxval=1.0)
        return found._replace(row=found.row._replace(actions=action), done=jnp.asarray(False))

    def advance(
        self,
        state: Any,
        action: Float[Array, " A"],
        done: Bool[Array, ""],
        active: Bool[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[Any, TargetEvents]:
        state, _ = self.inner.advance(state, action, done, active, key)
        return state, TargetEvents(jnp.asarray(False), jnp.asarray(False))

    def dropped(self, state: Any) -> Int[Array, "..."]:
        return self.inner.dropped(state)
