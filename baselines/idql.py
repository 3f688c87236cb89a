"""IDQL: implicit Q-learning as an actor-critic method with diffusion policies (Hansen-Estruch et al. 2023,
arXiv 2304.10573).

Values as in IQL; a diffusion policy that clones the data; while acting, the best of its samples under the
critics. Acting uses target networks of the policy and the critics; the policy's average is slower.
"""

from typing import Any

import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import Goal, Step
from mac.algorithm import TrainState
from mac.implicit_q import AbstractImplicit, ImplicitConfig, ImplicitNets
from mac.nn.diffusion_resnet import ResNet
from mac.ops.diffusion import denoise, diffusion_loss, vp_betas
from mac.ops.losses import Losses
from mac.ops.optimisers import polyak
from mac.types import Batch


class IDQLConfig(ImplicitConfig):
    """Hyperparameters of IDQL."""

    expectile: float = 0.7
    """expectile of Q that V is, in (0, 1): 0.5 is the mean over the data's actions, near 1 the best one"""
    candidates: int = 64
    """actions sampled per choice while acting"""
    diffusion_steps: int = 5
    """steps from noise to an action"""
    blocks: tuple[int, ...] = (256, 256, 256)
    """widths of the policy's residual blocks, all equal"""
    dropout: float = 0.1
    """dropout rate of a block's inputs in training, in [0, 1)"""
    tau_actor: float = 0.001
    """rate of the Polyak average of the target policy, per update, in (0, 1]"""

    ACTING = ("candidates",)
    STATIC = (*ImplicitConfig.STATIC, "dropout")

    def __check_init__(self):
        self._require_positive("candidates", "diffusion_steps")
        self._require("blocks", len(set(self.blocks)) == 1 and self.blocks[0] >= 1, "give equal widths")
        self._require("dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        self._require("tau_actor", 0 < self.tau_actor <= 1, "must be in (0, 1]")
        self._require_default("actor_norm", reason="blocks of the policy have LayerNorm always")


class IDQL(AbstractImplicit[IDQLConfig]):
    """Implicit Q-learning with a diffusion policy and best-of-N among its samples."""

    def actor_net(self, key: Key[Array, ""]) -> ResNet:
        cfg = self.cfg
        return ResNet(self.inputs, cfg.blocks, self.env.action_dim, dropout=cfg.dropout, key=key)

    def target_nets(self, nets: ImplicitNets) -> Any:
        return {"q": nets.q, "actor": nets.actor}

    def update_target(self, target: Any, online: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        del batch, step
        rates = {"q": self.cfg.tau_ema, "actor": self.cfg.tau_actor}
        return {name: polyak(target[name], online[name], rate) for name, rate in rates.items()}

    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        del target
        k_noise, k_dropout = jr.split(key)

        def denoiser(x: Array, time: Array) -> Array:
            return nets.actor(step.obs, step.actor_goal, x, time=time, key=k_dropout)

        betas = vp_betas(self.cfg.diffusion_steps)
        return {"policy/diffusion_loss": diffusion_loss(denoiser, step.action, betas, k_noise)}

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        k_start, k_steps = jr.split(key)
        target, betas = state.target, vp_betas(self.cfg.diffusion_steps)
        noise = jr.normal(k_start, (self.cfg.candidates, len(obs), self.env.action_dim))
        actions = denoise(lambda x, t: target["actor"](obs, goal, x, time=t), noise, betas, k_steps)
        return self.best_action(target["q"], obs, goal, actions)
