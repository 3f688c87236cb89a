"""LEQ: lower expectile Q-learning (Park and Lee 2024, arXiv 2407.00699).

A deterministic policy and one critic learn from rollouts of H imagined steps that start at the batch's
states. The target of each step is a mixture of returns: Q itself, and what 1, 2, ... imagined steps bring
before a later Q. A low expectile of these targets, over what the models may do, is a cautious value; the
default, 0.5, is their mean.

The policy's gradient at step i is that of the step's own mixture with respect to its action, through the
model and through the policy's later actions. States count as given.

The defaults are those of the code of Park et al. 2025 (MAC): models are trained along with the policy, λ is 1
(LEQ's own code: 0.95), the imagined loss has the weight 0.95 (0.25), and τ is 0.5 (tuned, below 0.5).
LEQ's own code continues states of the data by a few imagined steps under the policy with noise, and keeps
what it visits; rollouts then start there (`expansion`). The code of MAC's authors has two known bugs, off
here: `release_critic` and `release_members`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import Goal, Step, one_step
from mac.algorithm import TrainState
from mac.model_based import (
    AbstractModelBased,
    AbstractModelBasedNets,
    ModelBasedConfig,
    ModelBasedTarget,
    Start,
    StateScale,
    WorldModel,
    data_steps,
    model_drift,
    state_scale,
)
from mac.nn.critics import Critics, q_values
from mac.nn.gaussian_policy import HEAD_VARIANCE
from mac.nn.mlp import MLP, value_net
from mac.ops.losses import expectile_loss, mse, sum_losses
from mac.ops.replay import ReplaySpec
from mac.ops.returns import lambda_mixture, mixture_shares
from mac.types import Batch, Metrics, SampleSpec, Window


class LEQConfig(ModelBasedConfig):
    """Hyperparameters of LEQ."""

    rollout: int = 10
    """imagined steps per rollout, H"""
    expectile: float = 0.5
    """expectile of imagined returns that Q learns and the policy maximizes, τ; below 0.5 is cautious"""
    lam: float = 1.0
    """weight of each longer return in the mixture, against the one before it, λ in [0, 1]"""
    imagined_weight: float = 0.95
    """weight of imagined steps in the critic's losses, in [0, 1]; the data's steps have the rest"""
    expansion: int = 0
    """steps by which states of the data are continued, before rollouts start; 0 = they start in the data"""
    norm_first: bool = False
    """whether the critic's LayerNorm stands before its activations (LEQ's own code) instead of after"""
    symlog: bool = False
    """whether critic and policy read the symmetric logarithm of their inputs (LEQ's own code)"""
    release_critic: bool = False
    """a known bug of the authors' code: no gradient passes from imagined steps to the critic"""
    release_members: bool = False
    """a known bug of the authors' code: each entry of an imagined state is of a random model of its own"""

    def __check_init__(self):
        self._require("expectile", 0 < self.expectile < 1, "must be in (0, 1)")
        self._require("lam", 0 <= self.lam <= 1, "must be in [0, 1]")
        self._require("imagined_weight", 0 <= self.imagined_weight <= 1, "must be in [0, 1]")
        self._require_at_least_0("expansion")


class Nets(AbstractModelBasedNets):
    """LEQ's networks."""

    model: WorldModel
    q: Critics  # s, g, a -> value; there is one
    actor: MLP  # s, g -> a before the tanh


class Rollout(NamedTuple):
    """Imagined steps 0 to H, the last of which is not executed.

    `reward`, `mask` and `alive` are of the first H; `alive` is 0 after the return ended, or the probability
    that it goes on. `ret` is the mixture of returns of each step.
    """

    obs: Float[Array, "H1 B D"]
    action: Float[Array, "H1 B A"]
    q: Float[Array, "H1 B"]
    reward: Float[Array, "H B"]
    mask: Float[Array, "H B"]
    alive: Float[Array, "H B"]
    ret: Float[Array, "H1 B"]


class LEQ(AbstractModelBased[LEQConfig, Nets]):
    """Lower expectile Q-learning."""

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        return data_steps(steps, self.env)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_model, k_q, k_actor = jr.split(key, 3)
        cfg, (*given, action) = self.cfg, self.inputs
        critic = cfg.critic_style._replace(norm_first=cfg.norm_first, symlog=cfg.symlog)
        actor = cfg.actor_style._replace(symlog=cfg.symlog)
        return Nets(
            model=WorldModel(cfg, self.env, k_model),
            q=(value_net(self.inputs, cfg.hidden, key=k_q, style=critic),),
            actor=MLP(given, cfg.hidden, action, key=k_actor, style=actor, variance=HEAD_VARIANCE),
        )

    def target_nets(self, nets: Nets) -> ModelBasedTarget:
        unknown = StateScale(jnp.zeros(self.env.obs_dim), jnp.ones(self.env.obs_dim))
        return super().target_nets(nets)._replace(scale=unknown if self.cfg.termination == "rule" else None)

    def prepare(self, state: TrainState, window: Window) -> TrainState:
        """Notes how the data's states are normalised, if a rule of termination needs to know."""
        if state.target.scale is None:
            return state
        return dataclasses.replace(state, target=state.target._replace(scale=state_scale(window)))

    # 1. Expand the data.

    @property
    def replay(self) -> ReplaySpec | None:
        cfg = self.cfg
        if not cfg.expansion:
            return None
        rows = cfg.rollout_starts * cfg.expansion
        return ReplaySpec(rows, cfg.rollouts_kept, cfg.rollout_every, cfg.batch, first=cfg.pretrain)

    def imagined_row(self) -> Start:
        goal = None if self.env.goal_dim is None else jnp.zeros(self.env.goal_dim)
        return Start(jnp.zeros(self.env.obs_dim), goal, goal)

    def rollout(
        self, state: TrainState, window: Window, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Start, Int[Array, ""]]:
        """States that the policy, with noise of deviation 1 before the tanh, visits from states of the data.

        The first are the data's. Rollouts do not stop at terminations, as in LEQ's own code.
        """
        del step
        k_start, k_steps = jr.split(key)
        nets = self.trusted(state.nets, state.target.record)
        start, g, g_actor = self.draw_starts(window, k_start)

        def one(s: Array, key: Key[Array, ""]) -> tuple[Array, Start]:
            k_action, k_model = jr.split(key)
            logits = nets.actor(s, g)
            a = jnp.tanh(logits + jr.normal(k_action, logits.shape))
            return nets.model.imagine(s, g, a, k_model).next_obs, Start(s, g, g_actor)

        _, visited = jax.lax.scan(one, start, jr.split(k_steps, self.cfg.expansion))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), visited)
        return rows, jnp.asarray(len(rows.obs), jnp.int32)

    def starts(self, step: Step, imagined: Start | None) -> Start:
        """The states that rollouts of an update start in."""
        if self.replay is None:
            return Start(step.obs, step.goal, step.actor_goal)
        if imagined is None:
            raise TypeError("this method needs a batch with imagined states (`AbstractAlgorithm.replay`)")
        return imagined

    # 2. Imagine and learn.

    def loss(
        self, nets: Nets, target: ModelBasedTarget, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_actor, k_critic = jr.split(key)
        step, cfg, fixed = one_step(batch), self.cfg, self.trusted(sg(nets), target.record)
        start = self.starts(step, batch.imagined)
        with jax.named_scope("model"):
            losses = self.model_losses(nets, target.record, step)

        with jax.named_scope("policy"):
            s, g = start.obs, start.actor_goal
            slope, tau = self.action_gradients(fixed, s, g, k_actor, scale=target.scale)
            # The last state's return is its Q, so no expectile tells high from low there.
            weight = jnp.where(tau.ret > tau.q, cfg.expectile, 1 - cfg.expectile).at[-1].set(0.5)
            action = jnp.tanh(nets.actor(tau.obs, g))
            gain = weight * jnp.sum(slope * action, axis=-1)
            losses["policy/q_loss"] = -jnp.sum(jnp.mean(gain, axis=-1))

        with jax.named_scope("critic"):
            real, imagined = 1 - cfg.imagined_weight, cfg.imagined_weight
            next_action = jnp.tanh(fixed.actor(step.next_obs, step.goal))
            next_q = q_values(fixed.q, step.next_obs, step.goal, next_action)[0]
            q, target_q = (q_values(each, step.obs, step.goal, step.action)[0] for each in (nets.q, target.q))
            error = step.reward + cfg.discount * step.mask * next_q - q
            losses["critic/loss"] = real * expectile_loss(error, 0.5)

            if start.goal is not None:  # without goals the rollout is the policy's
                tau = self.imagine(fixed, start.obs, start.goal, k_critic, scale=target.scale)
            critic = fixed.q if cfg.release_critic else nets.q
            states, actions, g = tau.obs[:-1], tau.action[:-1], start.goal
            q_rollout, target_rollout_q = (
                q_values(each, states, g, actions)[0] for each in (critic, target.q)
            )
            # Later steps count less, and those after a termination not at all; squares undo the root.
            discounts = cfg.discount ** jnp.arange(cfg.rollout, dtype=float)
            loss_weight = jnp.broadcast_to(discounts[:, None], tau.alive.shape) * tau.alive
            error, lag = (jnp.sqrt(loss_weight) * (x - q_rollout) for x in (tau.ret[:-1], target_rollout_q))
            losses["critic/imagined_loss"] = imagined * expectile_loss(error, cfg.expectile)
            losses["critic/target_loss"] = real * mse(q, target_q) + imagined * jnp.mean(jnp.square(lag))
        logged = {"imagined__reward": tau.reward, "imagined__alive": tau.alive, "imagined__return": tau.ret}
        return sum_losses(losses, critic__q_mean=q, **logged)

    def imagine(
        self,
        nets: Nets,
        s: Float[Array, "B D"],
        g: Goal,
        key: Key[Array, ""],
        nudge: Float[Array, "H1 B A"] | None = None,
        *,
        scale: StateScale | None = None,
    ) -> Rollout:
        """H steps under the policy.

        Args:
            nudge: is added to the actions (`action_gradients`).
            scale: how states are normalised, where the environment's rule terminates; None: a network does.
        """
        cfg, shares = self.cfg, mixture_shares(self.cfg.lam, self.cfg.rollout)
        if nudge is None:
            nudge = jnp.zeros((cfg.rollout + 1, len(s), self.env.action_dim))

        def one(carry: tuple[Array, Array], given: Any) -> tuple[tuple[Array, Array], Any]:
            (s, alive), (nudge, share, key) = carry, given
            a = jnp.tanh(nets.actor(s, g)) + nudge
            after = nets.model.imagine(s, g, a, key, by_entry=cfg.release_members)
            if scale is not None:
                after = after._replace(mask=self.goes_on(after.next_obs, scale))
            goes_on = (alive > 0).astype(s.dtype)
            reward, mask = goes_on * after.reward, goes_on * after.mask
            next_s = scale_gradient(after.next_obs, share * cfg.discount * mask)
            return (next_s, alive * sg(mask)), (s, a, reward, mask, alive)

        each = nudge[:-1], shares, jr.split(key, cfg.rollout)
        (s, _), (obs, action, reward, mask, alive) = jax.lax.scan(one, (s, jnp.ones_like(s[:, 0])), each)
        obs = jnp.concatenate([obs, s[None]])
        action = jnp.concatenate([action, (jnp.tanh(nets.actor(s, g)) + nudge[-1])[None]])
        q = q_values(nets.q, obs, g, action)[0]
        ret = lambda_mixture(q, reward, mask, discount=cfg.discount, shares=shares)
        return Rollout(obs, action, q, reward, mask, alive, ret)

    def action_gradients(
        self,
        nets: Nets,
        s: Float[Array, "B D"],
        g: Goal,
        key: Key[Array, ""],
        *,
        scale: StateScale | None = None,
    ) -> tuple[Float[Array, "H1 B A"], Rollout]:
        """Gradient of each step's mixture with respect to the step's own action, and the rollout.

        It takes one reverse pass, where a Jacobian takes H + 1. Steps after i enter `ret[i]` only by
        `c_i γ m_i ret[i + 1]` (`lambda_mixture`). So `ret[i]` lets no gradient into `ret[i + 1]`, and the
        state between the two scales its gradient by that factor instead. What comes back to it from all
        later steps together is then the gradient of `ret[i + 1]`.
        """

        def total(nudge: Float[Array, "H1 B A"]) -> tuple[Float[Array, ""], Rollout]:
            tau = self.imagine(nets, s, g, key, nudge, scale=scale)
            return jnp.sum(tau.ret), tau

        # Zeros of a constant would be alike on all devices, and `shard_map` would sum their gradient.
        still = jnp.zeros_like(nets.actor(s, g))
        return jax.grad(total, has_aux=True)(jnp.stack([still] * (self.cfg.rollout + 1)))

    # 3. Act.

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal))

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        model = self.trusted(state.nets, state.target.record).model
        return model_drift(model, window, self.cfg.rollout, key)


def scale_gradient(x: Float[Array, "B D"], factor: Float[Array, " B"]) -> Float[Array, "B D"]:
    """`x`, whose gradient is multiplied by `factor`."""
    return sg(x) + jnp.broadcast_to(sg(factor)[:, None], x.shape) * (x - sg(x))
