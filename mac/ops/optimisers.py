"""Optimisers of several networks, learning rates, and Polyak averages."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from mac.types import Number

Rate = Number | optax.Schedule


def polyak(target: Any, online: Any, rate: Number) -> Any:
    """`rate * online + (1 - rate) * target`, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - rate) * t + rate * o, target, online)


def linear_cooldown(lr: Number, steps: int, share: float) -> optax.Schedule:
    """Constant `lr`, which falls linearly to 0 over the last `share` of `steps` updates."""
    falling = max(round(share * steps), 1)
    return optax.linear_schedule(lr, 0.0, falling, transition_begin=steps - falling)


def adam_by_network(rates: dict[str, Rate], other: Rate) -> optax.GradientTransformation:
    """Adam with a learning rate of its own for the networks named in `rates`, and `other` for the rest."""
    return by_network({name: optax.adam(rate) for name, rate in rates.items()}, optax.adam(other))


def by_network(
    own: Mapping[str, optax.GradientTransformation], other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser of its own for each network named in `own`, and `other` for the rest."""

    def names(params: Any) -> Any:
        label = lambda path, _: path[0].name if path[0].name in own else ""  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, params)

    return optax.multi_transform({**own, "": other}, names)


def at_some_updates(
    inner: optax.GradientTransformation, active: Callable[[Int[Array, ""]], Bool[Array, ""]], *, coast: bool
) -> optax.GradientTransformationExtraArgs:
    """`inner`, fed with gradients at some updates only; its `update` needs the update's number as `step`.

    The state is that of `inner`. (`optax.conditionally_mask` counts updates itself, and cannot coast.)

    Args:
        active: whether the update of that number is one of them.
        coast: at the other updates `inner` sees gradients of 0, so that momentum moves the weights on;
            otherwise it rests, and neither weights nor its state change.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        is_active = active(extra["step"])

        def if_active(then: Any, otherwise: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(is_active, x, y), then, otherwise)

        zeros = jax.tree.map(jnp.zeros_like, updates)
        if coast:
            return inner.update(if_active(updates, zeros), state, params, **extra)
        moves, new_state = inner.update(updates, state, params, **extra)
        return if_active(moves, zeros), if_active(new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)
