"""Every algorithm of the registry at sizes at which it compiles fast, and the baselines at a batch."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from baselines import REGISTRY, algorithms, get_algorithm
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.sampler import sample
from mac.errors import UserError
from mac.types import Batch
from tests.helpers.numpy_ablations import MODES
from tests.helpers.numpy_baselines import LOSSES as MODEL_FREE
from tests.helpers.numpy_baselines import data
from tests.helpers.numpy_leq import leq
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.numpy_model_based import MODEL_BASED
from tests.helpers.numpy_planners import PLANNERS
from tests.helpers.numpy_tap import tap
from tests.helpers.numpy_tt import tt
from tests.helpers.toy_env import window

LOSSES = MODEL_FREE | MODEL_BASED | {"leq": leq, "tap": tap, "tt": tt} | PLANNERS
LR, TAU, TAU_ACTOR = 1e-2, 0.1, 0.05
GOALS_ONLY = ("nsac_bc", "sharsa", "diffuser", "hd_da")
REWARD_ONLY = ("tap", "tt")
TARGETLESS = ("flow_bc", "tap", "tt")
"""Without target networks, whose rate they refuse."""
GOALS_TOO = ("gciql", "mac_fql", "mopo", "mobile")
"""Tested with goals, though they can do without."""
IMAGINED = {"rollout": 2, "members": 3, "rollout_starts": 6, "rollout_every": 3, "rollouts_kept": 2}
PLANS = {
    "hidden": (8, 16), "diffusion_steps": 4, "execute": 1, "ema_start": 1, "ema_every": 1,
    "action_weight": 3.0, "discount": 0.99,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "mac": {"chunk": 2, "rollout": 2, "candidates": 4, "candidates_test": 4, "flow_steps": 3},
    "mac_gaussian": {"chunk": 2, "rollout": 2, "candidates": 4, "candidates_test": 4},
    "mac_fql": {"chunk": 2, "rollout": 2, "flow_steps": 3},
    "mac_nodistill": {"chunk": 2, "rollout": 2, "candidates": 4, "candidates_test": 4},
    "flow_bc": {"flow_steps": 4},
    "fql": {"flow_steps": 3, "alpha": 10.0},
    "ifql": {"flow_steps": 4, "candidates": 4},
    "idql": {"diffusion_steps": 4, "candidates": 4, "blocks": (8, 8), "tau_actor": TAU_ACTOR},
    "rebrac": {"alpha_actor": 1.0, "alpha_critic": 0.1},
    "nsac_bc": {"n_step": 4, "alpha": 1.0},
    "sharsa": {"n_step": 4, "candidates": 4, "flow_steps": 4},
    "fmpc": {"chunk": 3, "policy_chunk": 2, "candidates": 4, "flow_steps": 3},
    "leq": {"rollout": 3, "members": 3, "expectile": 0.3, "lam": 0.95, "imagined_weight": 0.6},
    "cql": {"samples": 3, "alpha": 1.0, "actor_lr": LR},
    "mopo": IMAGINED,
    "mobile": IMAGINED | {"samples": 4},
    "diffuser": PLANS | {"horizon": 7},
    "hd_da": PLANS | {"horizon": 10, "jump": 3, "low_diffusion_steps": 3},
    "tap": {
        "heads": 2,
        "dropout": 0.0,
        "window": 6,
        "codes": 4,
        "horizon": 6,
        "beam": 4,
        "expand": 2,
        "prior_share": 0.0,
        "weight_decay": 0.0,
        "clip": 1e9,
    },
    "tt": {
        "heads": 2,
        "dropout": 0.0,
        "window": 3,
        "context": 3,
        "bins": 9,
        "weight_decay": 0.0,
        "clip": 1e6,
        "warmup": 0.0,
        "beams": 4,
        "horizon": 2,
        "action_top": 1,
    },
}
POLICY = ("policy/awr_loss", "policy/q_loss", "policy/bc_loss", "policy/sac_loss", "policy/diffusion_loss")
WORLD = ("dynamics", "reward", "success", "termination", "decay")
METRICS = {
    "v": ("value/loss",),
    "q": ("critic/loss", "critic/gap_loss", "critic/imagined_loss", "critic/target_loss"),
    "actor": (*POLICY, "policy/flow_loss"),
    "flow": ("policy/flow_loss",),
    "model": ("model/flow_loss", *(f"model/{part}_loss" for part in WORLD), "model/token_loss"),
    "policy": ("policy/distil_loss", "policy/q_loss"),
    "high": ("policy/high_loss", "planner/high_loss"),
    "low": ("policy/low_loss", "planner/low_loss"),
    "planner": ("planner/diffusion_loss",),
    "log_weight": ("policy/entropy_loss",),
    "encoder": ("decoder/step_loss", "decoder/end_loss", "encoder/commitment_loss"),
    "decoder": ("decoder/step_loss", "decoder/end_loss"),
    "codebook": ("codebook/average_loss",),
    "prior": ("prior/loss",),
}
"""Losses that train each network; an algorithm has some of the networks, and some losses of each."""


def make(name: str, mode: str, steps: int = 0, **changes: Any) -> AbstractAlgorithm:
    """An algorithm for the point of `tests.helpers.toy_env`, in the mode "reward" or "goals".

    A registered algorithm of someone else gets those of the sizes and `changes` that its configuration has.
    """
    entry = get_algorithm(name)
    values = {"batch": 8, "hidden": (8,), "discount": 0.9} | SIZES.get(name, {}) | changes
    if name not in REGISTRY:
        known = {field.name for field in dataclasses.fields(entry.config)}
        values = {field: value for field, value in values.items() if field in known}
    return entry.algorithm(entry.config(**values), MODES[mode], steps)


def mode_of(name: str) -> str:
    """The mode in which an algorithm is tested; "goals" where it cannot do without."""
    if name in GOALS_TOO:
        return "goals"
    try:
        make(name, "reward")
    except UserError:
        return "goals"
    return "reward"


def registered(quick: Iterable[str]) -> list[Any]:
    """Parameters: every algorithm that is registered, this project's marked `slow` but those in `quick`."""
    slow = set(REGISTRY) - set(quick)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in algorithms()]


def first_gradients(opt_state: Any) -> Any:
    """Returns the gradient of the whole loss from the moments of Adam's first update, a tenth of it."""

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    def missing(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    means = [x.mu for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    return jax.tree.map(lambda *x: next(y for y in x if not missing(y)) / 0.1, *means, is_leaf=missing)


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm with perturbed weights, so that no bias, scale or target network is trivial."""

    name: str
    algo: Any
    state: TrainState
    batch: Batch
    key: jax.Array
    metrics: dict[str, jax.Array]
    grads: Any
    after: TrainState

    @property
    def names(self) -> list[str]:
        """Returns the networks of the algorithm."""
        return list(vars(self.state.nets))

    def by_hand(self, nets: Any) -> dict[str, float]:
        """Returns each network's own loss, at float64 networks `nets`."""
        frozen, target = double(self.state.nets), double(self.state.target)
        with jax.numpy_rank_promotion("allow"):
            return LOSSES[self.name](
                nets, frozen, target, data(self.batch), self.algo.cfg, self.key, self.batch
            )


def imagined_steps(algo: Any) -> Any:
    """Rows of the form of an algorithm's memory, as many as a batch holds; masks are 0 or 1."""
    rng, count = np.random.default_rng(6), algo.replay.batch
    rows = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(count, *x.shape)), jnp.float32), algo.imagined_row()
    )
    if not hasattr(rows, "mask"):  # states alone
        return rows
    action, mask = jnp.tanh(rows.action), (rows.mask > -0.5).astype(jnp.float32)
    return rows._replace(action=action, mask=mask)


def rate_of_targets(name: str, rate: float) -> dict[str, float]:
    """The hyperparameter that is the rate of target networks, of a method that has some."""
    return {} if name in TARGETLESS else {"tau_ema": rate}


def make_case(name: str, mode: str, **changes: Any) -> Case:
    algo: Any = make(name, mode, **{"lr": LR} | rate_of_targets(name, TAU) | changes)
    state = jax.jit(algo.init)(jr.key(0)).without_memory()
    state = dataclasses.replace(state, nets=perturb(state.nets, 1), target=perturb(state.target, 4))
    batch = jax.jit(sample, static_argnums=1)(window(algo.sample.chunk), algo.sample, jr.key(2))
    if batch.rewards is not None:  # other than -1 and 0
        rewards = np.random.default_rng(3).normal(size=batch.rewards.shape)
        batch = dataclasses.replace(batch, rewards=jnp.asarray(rewards, jnp.float32))
    if algo.replay:
        batch = dataclasses.replace(batch, imagined=imagined_steps(algo))
    # The second update, which is the first of ReBRAC's policy.
    after, metrics = jax.jit(algo.update)(state, batch, jnp.ones((), jnp.int32), jr.key(5))
    if name == "tap":  # whose codebook has no moments of Adam
        grads = jax.jit(jax.grad(algo.loss, has_aux=True))(state.nets, state.target, batch, jr.key(5))[0]
    else:
        grads = first_gradients(after.opt_state)
    return Case(name, algo, state, batch, jr.key(5), metrics, grads, after)
