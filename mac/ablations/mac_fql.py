"""MAC (FQL): MAC whose policy maximizes Q instead of best-of-N sampling (Park et al. 2025, arXiv
2512.08108, table 3; the extraction is that of flow Q-learning, Park et al. 2025, arXiv 2502.02538).

The one-step policy learns on all imagined states: to stay near the flow policy, and to raise Q. One
sample of it, without best-of-N, acts in rollouts and in the environment. It shows the gain of rejection
sampling: a policy trained on Q finds the actions at which Q and the model are wrong.

Chunks have 10 actions, as table 8 says of MAC; the authors' configuration has 5 (`--hp.chunk 5`).

The Q loss is divided by the mean of |Q|. The authors' implementation averages over the rollout before
it takes the absolute value, which is the same while Q has one sign. Where the environment has goals the
paper has no such runs; the policy then learns for the goal of the rollout.
"""

import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.config import Config
from mac.mac import MAC, AbstractChunkPolicy, Goal, Nets, States, flow_and_student, integrate_flow
from mac.nn.mlp import MLP, scalar
from mac.ops.flow import flow_matching_loss
from mac.ops.losses import Losses, mse
from mac.ops.rollout import Trajectory
from mac.types import EnvSpec, Number


class MACFQLConfig(Config):
    """Hyperparameters of MAC, with one candidate, and those of the policy's loss."""

    candidates: int = 1
    """chunks sampled per choice while training, N; 1 = no choice"""
    candidates_test: int = 1
    """chunks sampled per choice while acting, N; 1 = no choice"""
    alpha: float = 1.0
    """weight of staying near the flow policy, against raising the normalised Q; at least 0"""
    release_discount: bool = False
    """a known bug of the authors' code: V's returns are discounted as if a chunk were one step"""

    def __check_init__(self):
        self._require_default("flow_steps_test", reason="the policy that is trained on Q acts, not the flow")
        self._require_at_least_0("alpha")


class QMaximizingFlow(AbstractChunkPolicy[MACFQLConfig]):
    """A flow that clones the data's chunks, and a one-step policy near it that maximizes Q."""

    def nets(
        self, cfg: MACFQLConfig, sizes: tuple[int, int | None, int], key: Key[Array, ""]
    ) -> tuple[MLP, MLP]:
        return flow_and_student(cfg, sizes, key)

    def behavior_loss(
        self, cfg: MACFQLConfig, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]
    ) -> Losses:
        """Loss of the flow, to which `policy_loss` ties the one-step policy."""
        del cfg
        return {"policy/flow_loss": flow_matching_loss(lambda x, t: nets.flow(s, g, x, t), a, key)}

    def chunks(
        self, cfg: MACFQLConfig, nets: Nets, s: States, g: Goal, noise: Float[Array, "n B A"], *, acting: bool
    ) -> Float[Array, "n B A"]:
        del cfg, acting
        return nets.policy(s, g, noise)

    def policy_loss(
        self, cfg: MACFQLConfig, nets: Nets, tau: Trajectory, g: Goal, key: Key[Array, ""]
    ) -> Losses:
        """`alpha` times the distance to the flow policy, and minus Q over its mean size.

        With values of the kind "bce" Q is its network's output, a logit.
        """
        noise = jr.normal(key, tau.action.shape)
        frozen, unroll = self.numerics.freeze(nets.flow), self.numerics.unrolls()
        teacher = integrate_flow(frozen, tau.obs, g, noise, cfg.flow_steps, unroll=unroll)
        chunk = nets.policy(tau.obs, g, noise)
        q = scalar(sg(nets.q), tau.obs, g, jnp.clip(chunk, -1, 1))
        q_loss = -jnp.mean(q) / sg(jnp.mean(jnp.abs(q)))
        distil_loss = cfg.alpha * mse(chunk, jnp.clip(teacher, -1, 1))
        return {"policy/distil_loss": distil_loss, "policy/q_loss": q_loss}

    def value_discount(self, cfg: MACFQLConfig) -> Number:
        return cfg.discount if cfg.release_discount else cfg.discount**cfg.chunk


def mac_fql(cfg: MACFQLConfig, env: EnvSpec, steps: int = 0) -> MAC:
    """MAC with a one-step policy trained on Q; the arguments are those of `MAC`."""
    return MAC(cfg, env, steps, QMaximizingFlow())
