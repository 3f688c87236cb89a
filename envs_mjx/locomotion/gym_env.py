"""Hopper, walker2d and halfcheetah by the rules of D4RL's `-v2` datasets, and of Minari's `mujoco/` ones.

D4RL's environments are gym's version 2, whose rules are those of gymnasium's version 4; Minari's are
gymnasium's version 5. They terminate when a hopper or walker falls over (becomes unhealthy). In version 5 the
terminal step earns no healthy reward, and both feet of the walker have the same friction.

Source: Fu et al. 2020, "D4RL", and the behaviour of gymnasium 1.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics
from envs_mjx.locomotion.initial_state import random_start
from envs_mjx.locomotion.walkers import Walker
from mac.errors import UserError
from mac.types import EnvSpec

MAX_STEPS = 1000
SCORE_RANGE = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
}
"""Reference returns, 0 and 100 in D4RL's normalised score."""
_CONTROL_COST = {"hopper": 1e-3, "walker2d": 1e-3, "halfcheetah": 0.1}
_CLIPPED = 10.0
"""Bound of observed velocities of hopper and walker2d, m/s and rad/s."""


class GymState(EnvState):
    """State of a gym walker; `motion` is the walker, `success` is always False."""

    motion: WalkerPhysics


def hopper_is_terminal(obs: Float[Array, "*B D"]) -> Bool[Array, "*B"]:
    """Returns whether a hopper has fallen over, or is out of bounds."""
    height, rest = obs[..., 0], obs[..., 1:]
    healthy = (height > 0.7) & (jnp.abs(rest[..., 0]) < 0.2) & jnp.all(jnp.abs(rest) < 100.0, axis=-1)
    return ~healthy


def walker2d_is_terminal(obs: Float[Array, "*B D"]) -> Bool[Array, "*B"]:
    """Returns whether a walker2d has fallen over, or flies."""
    height, angle = obs[..., 0], obs[..., 1]
    return ~((height > 0.8) & (height < 2.0) & (jnp.abs(angle) < 1.0))


def never_terminal(obs: Float[Array, "*B D"]) -> Bool[Array, "*B"]:
    """Returns False: a halfcheetah may lie on its back."""
    return jnp.zeros(obs.shape[:-1], bool)


TERMINAL = {
    "hopper": hopper_is_terminal,
    "walker2d": walker2d_is_terminal,
    "halfcheetah": never_terminal,
}
"""Rules of gymnasium's versions 4 and 5, by kind of walker."""


class GymEnv(AbstractEnv[GymState]):
    """A walker on a plane that is rewarded for running along x.

    Reward of a step: mean velocity along x (m/s), minus a cost of the squared action, plus 1 while a hopper
    or walker2d is healthy. `done` at termination, and after 1000 steps.
    """

    spec: EnvSpec = eqx.field(static=True)
    walker: Walker = eqx.field(static=True)
    engine: AbstractWalkerEngine
    version: int = eqx.field(static=True)

    def __init__(self, name: str, walker: Walker, engine: AbstractWalkerEngine, *, version: int = 4):
        """Creates an environment of `walker`.

        Args:
            version: version of gymnasium's rules, 4 or 5; reference returns are published only for 4.
        """
        self.walker, self.engine, self.version = walker, engine, version
        model = walker.model
        self.spec = EnvSpec(
            name=name,
            obs_dim=int(model.nq - 1 + model.nv),
            action_dim=int(model.nu),
            goal_dim=None,
            tasks=(1,),
            max_steps=MAX_STEPS,
            control_dt=walker.control_dt,
            recorded=True,
            score_range=SCORE_RANGE[self.kind] if version == 4 else None,
            terminal=TERMINAL[self.kind],
        )

    @property
    def kind(self) -> str:
        """`hopper`, `walker2d` or `halfcheetah`."""
        return self.walker.body.removesuffix("-v5")

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> GymState:
        """Starts an episode; there is one task, so `task` is not read."""
        motion = self.engine.load(*random_start(self.walker, key, self.engine.touches))
        return GymState(motion=motion, obs=self.observe(motion), goal=None, dropped=motion.dropped)

    def step(self, state: GymState, action: Float[Array, " A"]) -> GymState:
        """Advances one control step, as in `AbstractEnv`."""
        action, finite = self.check_action(action)
        motion = self.engine.step(state.motion, action, ~state.done)
        healthy = self.healthy(motion)
        reward = motion.seen[0] - _CONTROL_COST[self.kind] * jnp.sum(action**2)
        if self.kind != "halfcheetah":
            # Version 4 gives the healthy reward in the terminal step too.
            reward += 1.0 if self.version == 4 else healthy.astype(jnp.float32)
        after = dataclasses.replace(
            state,
            motion=motion,
            obs=self.observe(motion),
            reward=reward,
            done=~healthy,
            dropped=motion.dropped,
        )
        return self.end_step(state, after, finite)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Refuses: rewards are recorded in the dataset.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"rewards of {self.spec.name} cannot be computed from observations: "
            "read those that the dataset records"
        )

    def observe(self, motion: WalkerPhysics) -> Float[Array, " D"]:
        """Returns positions without x, and velocities."""
        qvel = motion.qvel if self.kind == "halfcheetah" else jnp.clip(motion.qvel, -_CLIPPED, _CLIPPED)
        return jnp.concatenate([motion.qpos[1:], qvel])

    def healthy(self, motion: WalkerPhysics) -> Bool[Array, ""]:
        """Returns whether the walker is not in a terminal state; a halfcheetah never is."""
        return ~TERMINAL[self.kind](jnp.concatenate([motion.qpos[1:], motion.qvel]))
