"""TAP, the trajectory autoencoding planner (Jiang et al. 2023, arXiv 2208.10291): beam search over codes.

1. An autoencoder of windows of states, actions, rewards and values (the data's returns). It has one code of a
   codebook for three steps; the decoder is also given the window's first state.
2. A prior of the codes, given the first state.

To act, beam search looks for the codes with the highest return among those that the prior finds probable
enough, and takes the first action of what they decode to. Nothing is bootstrapped, and no policy is learned.

Networks see states, actions, rewards and values less the data's means, over their standard deviations, which
`prepare` puts into the state. Steps after an episode's end are 0 there and cost nothing.

As published, the prior is trained once the autoencoder is done, since the meaning of codes changes until
then. That this takes half of the run is this project's choice (`prior_share`; 0 trains both at once). Tasks
with goals are left out, as a window's return says nothing of a goal. A known bug of the authors' code is an
option: a mask that was meant for tokens hides steps of the window (`release_hidden_steps`).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Bool, Float, Int, Key

from mac.actor_critic import require_rewards
from mac.algorithm import TrainState
from mac.data.normalize import Normalizer
from mac.data.sampler import sample
from mac.nn.trajectory_autoencoder import BlockSizes, CodePrior, Decoder, Encoder
from mac.nn.transformer import Cache
from mac.nn.vector_quantizer import Codebook, perplexity
from mac.ops.code_search import Beam, likelihood_term, plan_return, search
from mac.ops.losses import Losses, cross_entropy, mse, sum_losses
from mac.ops.optimisers import at_some_updates, by_network
from mac.planning.sequence_model import AbstractSequencePlanner, SequenceConfig, join_batch
from mac.types import Batch, Metrics, Window

DIAGNOSED = 256
"""Windows on which a diagnosis looks at the autoencoder."""


class TAPConfig(SequenceConfig):
    """Hyperparameters of TAP; the defaults are the published ones for D4RL's gym tasks."""

    batch: int = 512
    """windows drawn from the data per update"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """width of each transformer block of encoder, decoder and prior, all equal"""
    lr: float = 2e-4
    """learning rate of AdamW"""
    window: int = 24
    """steps that the autoencoder reads"""
    stride: int = 3
    """steps per code"""
    codes: int = 512
    """codes in the codebook, K"""
    code_decay: float = 0.99
    """decay of the averages that codes are, per update, in (0, 1)"""
    commitment: float = 1.0
    """weight of the distance of encodings from their codes"""
    prior_share: float = 0.5
    """share of the run, at its end, in which the prior alone is trained; 0 trains it along with the rest"""
    beam: int = 64
    """plans that beam search keeps"""
    expand: int = 4
    """codes sampled to continue each of them"""
    likelihood_weight: float = 500.0
    """weight of a plan's log-likelihood, below that of codes of `probable` each"""
    probable: float = 0.05
    """probability per code of the horizon from which a plan is as good as any more probable one, in (0, 1)"""
    execute: int = 1
    """actions of a plan executed before planning anew"""
    release_hidden_steps: bool = False
    """a known bug of the authors' code: attention skips steps whose number is a multiple of their width"""

    ACTING: ClassVar[tuple[str, ...]] = (
        "horizon", "beam", "expand", "likelihood_weight", "probable", "execute",
    )  # fmt: skip
    STATIC: ClassVar[tuple[str, ...]] = (*SequenceConfig.STATIC, "prior_share")
    NEED_STEPS: ClassVar[tuple[str, ...]] = (*SequenceConfig.NEED_STEPS, "prior_share")

    def __check_init__(self):
        self._require_positive("stride", "codes", "beam", "expand")
        self._require("prior_share", 0 <= self.prior_share < 1, "must be in [0, 1)")
        self._require("code_decay", 0 < self.code_decay < 1, "must be in (0, 1)")
        self._require("probable", 0 < self.probable < 1, "must be in (0, 1)")
        self._require_at_least_0("commitment", "likelihood_weight")
        for name in ("window", "horizon"):
            rule = f"must be a multiple of --hp.stride={self.stride}"
            self._require(name, getattr(self, name) % self.stride == 0, rule)
        self._require("horizon", self.horizon <= self.window, f"must be at most --hp.window={self.window}")
        self._require("execute", 1 <= self.execute <= self.horizon, f"must be 1 to {self.horizon}")

    @property
    def sizes(self) -> BlockSizes:
        """Of the transformers."""
        return BlockSizes(self.hidden[0], len(self.hidden), self.heads, self.dropout)


class Nets(eqx.Module):
    """TAP's networks; a step is a state, an action, a reward, a value, and whether it is the last."""

    encoder: Encoder
    codebook: Codebook
    decoder: Decoder
    prior: CodePrior


class TAPTarget(NamedTuple):
    """What gradients do not train.

    Attributes:
        scale: means and standard deviations of the data's states, actions, rewards and values.
        prior_only: whether only the prior learns now; None where everything always learns.
    """

    scale: Normalizer
    prior_only: Bool[Array, ""] | None


class TAP(AbstractSequencePlanner[TAPConfig, Nets]):
    """Planning with codes of trajectories; it predicts no return, as a plan's has rewards of its own."""

    def __check_init__(self):
        require_rewards("tap", self.env)

    def nets(self, key: Key[Array, ""]) -> Nets:
        cfg, obs, sizes = self.cfg, self.env.obs_dim, self.cfg.sizes
        channels, length = obs + self.env.action_dim + 3, cfg.window // cfg.stride
        k = jr.split(key, 4)
        return Nets(
            encoder=Encoder(channels, cfg.window, cfg.stride, sizes, key=k[0]),
            codebook=Codebook(cfg.codes, sizes.width, key=k[1]),
            decoder=Decoder(obs, channels, cfg.window, cfg.stride, sizes, key=k[2]),
            prior=CodePrior(obs, cfg.codes, length, sizes, key=k[3]),
        )

    # 1. The data.

    def target_nets(self, nets: Nets) -> TAPTarget:
        del nets
        channels = self.env.obs_dim + self.env.action_dim + 2
        phases = jnp.zeros((), bool) if self.cfg.prior_share else None
        return TAPTarget(Normalizer(jnp.zeros(channels), jnp.ones(channels)), phases)

    def prepare(self, state: TrainState, window: Window) -> TrainState:
        """Means and standard deviations of all transitions of the data."""
        target = state.target._replace(scale=fit_scale(*self.all_transitions(window)))
        return dataclasses.replace(state, target=target)

    def steps_of(self, scale: Normalizer, batch: Batch) -> Float[Array, "B T C"]:
        """The windows of a batch as networks see them; a value excludes the reward of its own step."""
        assert batch.masks is not None and batch.valid is not None
        x = scale.apply(join_batch(batch))
        x = x * jnp.broadcast_to(batch.valid[..., None], x.shape)
        return jnp.concatenate([x, 1 - batch.masks[..., None]], axis=-1)

    @property
    def hidden(self) -> Bool[Array, " T"] | None:
        """Steps that later ones do not see."""
        if not self.cfg.release_hidden_steps:
            return None
        width = self.env.obs_dim + self.env.action_dim + 2
        return jnp.arange(self.cfg.window) % width == width - 1

    # 2. Learn.

    def loss(
        self, nets: Nets, target: TAPTarget, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_auto, k_prior = jr.split(key)
        steps = self.steps_of(target.scale, batch)
        state, zero = steps[:, 0, : self.env.obs_dim], 0 * sg(nets.codebook.count[0])

        def autoencoder() -> tuple[Losses, Int[Array, "B L"]]:
            return self.autoencoder_losses(nets, steps, batch, k_auto)

        def learn_autoencoder() -> tuple[Losses, Int[Array, "B L"]]:
            losses, code = autoencoder()
            return losses | {"prior/loss": zero}, code

        def learn_prior() -> tuple[Losses, Int[Array, "B L"]]:
            code = nets.codebook(sg(nets.encoder(steps, self.hidden))).code
            rest = dict.fromkeys(jax.eval_shape(autoencoder)[0], zero)
            return rest | {"prior/loss": prior_loss(nets.prior, state, code, k_prior)}, code

        if target.prior_only is None:
            losses, code = autoencoder()
            losses["prior/loss"] = prior_loss(nets.prior, state, code, k_prior)
        else:
            losses, code = jax.lax.cond(target.prior_only, learn_prior, learn_autoencoder)
        return sum_losses(losses, codebook__perplexity=perplexity(code, self.cfg.codes))

    def autoencoder_losses(
        self, nets: Nets, steps: Float[Array, "B T C"], batch: Batch, key: Key[Array, ""]
    ) -> tuple[Losses, Int[Array, "B L"]]:
        """Losses of encoder, decoder and codebook, and the codes of the windows."""
        assert batch.valid is not None
        k_encoder, k_decoder = jr.split(key)
        obs, action = self.env.obs_dim, self.env.action_dim
        weight = jnp.ones(steps.shape[-1] - 1).at[obs : obs + action].set(self.cfg.action_weight)
        encoded = nets.encoder(steps, self.hidden, k_encoder)
        found = nets.codebook(encoded)
        decoded = nets.decoder(steps[:, 0, :obs], found.passed, self.hidden, k_decoder)
        error = jnp.square(decoded[..., :-1] - steps[..., :-1])
        error = error * jnp.broadcast_to(weight, error.shape)
        losses = {
            "decoder/step_loss": jnp.mean(error * jnp.broadcast_to(batch.valid[..., None], error.shape)),
            "decoder/end_loss": cross_entropy(decoded[..., -1], steps[..., -1]),
            "encoder/commitment_loss": self.cfg.commitment * mse(encoded, found.vector),
            "codebook/average_loss": nets.codebook.average_loss(encoded, found.code),
        }
        return losses, found.code

    def update_target(
        self, target: TAPTarget, online: TAPTarget, batch: Batch, step: Int[Array, ""]
    ) -> TAPTarget:
        del online, batch
        if target.prior_only is None:
            return target
        return target._replace(prior_only=target.prior_only | (step + 1 >= self.first_of_prior))

    @property
    def first_of_prior(self) -> int:
        """Number of the first update in which only the prior is trained."""
        return round((1 - self.cfg.prior_share) * self.steps)

    def optimiser(self) -> optax.GradientTransformation:
        cfg, first = self.cfg, self.first_of_prior
        codebook = optax.sgd(1 - cfg.code_decay)
        autoencoder, prior = cfg.adamw(self.rate), cfg.adamw(self.rate_of(cfg.lr, first))
        if cfg.prior_share:
            codebook, autoencoder = (
                at_some_updates(each, lambda step: step < first, coast=False)
                for each in (codebook, autoencoder)
            )
            prior = at_some_updates(prior, lambda step: step >= first, coast=False)
        return by_network({"codebook": codebook, "prior": prior}, autoencoder)

    # 3. Act.

    def act(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E n A"]:
        del goal
        nets, scale, width = state.nets, state.target.scale, self.env.obs_dim
        vectors = nets.codebook.vectors
        see = scale.part(range(width))
        steps = jax.vmap(lambda s, k: self.plan(nets, scale, vectors, s, k))(
            see.apply(obs), jr.split(key, len(obs))
        )
        actions = steps[:, : self.cfg.execute, width : width + self.env.action_dim]
        return jnp.clip(actions, -1, 1)

    def plan(
        self,
        nets: Nets,
        scale: Normalizer,
        vectors: Float[Array, "K W"],
        state: Float[Array, " D"],
        key: Key[Array, ""],
    ) -> Float[Array, "T C"]:
        """Steps of the best plan from a standardised state, in the units of batches."""
        cfg, depth = self.cfg, self.cfg.horizon // self.cfg.stride
        hidden = None if self.hidden is None else self.hidden[: cfg.horizon]

        def propose(code: Int[Array, " N"] | None, cache: Cache, number: int) -> tuple[Array, Cache]:
            return nets.prior.extend(state[None], code, cache, number)

        def decode(code: Int[Array, " N"], cache: Cache, number: int) -> tuple[Array, Cache]:
            steps, cache = nets.decoder.extend(state[None], vectors[code], cache, number, hidden)
            return scale.invert(steps[..., :-1]), cache

        def score(plans: Beam) -> Float[Array, " N"]:
            weight, probable = cfg.likelihood_weight, cfg.probable
            likely = likelihood_term(plans.log_prob, weight=weight, probable=probable, depth=depth)
            return plan_return(plans.steps[..., -2], plans.steps[..., -1], cfg.discount) + likely

        begin = Beam(
            code=None,
            log_prob=jnp.zeros(1),
            steps=jnp.zeros((1, 0, len(scale.center))),
            prior=nets.prior.blocks.empty_cache((1,), depth),
            decoder=nets.decoder.blocks.empty_cache((1,), cfg.horizon),
        )
        return search(begin, propose, decode, score, key, depth=depth, beam=cfg.beam, expand=cfg.expand)

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        """Root-mean-square errors of decoded states, actions, rewards and values, in standard deviations."""
        if window.reward is None or window.return_to_go is None:
            return {}
        obs, action, nets = self.env.obs_dim, self.env.action_dim, state.nets
        batch = sample(window, self.sample._replace(batch=DIAGNOSED), key)
        assert batch.valid is not None
        steps = self.steps_of(state.target.scale, batch)
        codes = nets.codebook(nets.encoder(steps, self.hidden)).vector
        decoded = nets.decoder(steps[:, 0, :obs], codes, self.hidden)
        error = jnp.square(decoded - steps)[..., :-1]
        share = batch.valid / jnp.sum(batch.valid)
        square = jnp.sum(error * jnp.broadcast_to(share[..., None], error.shape), axis=(0, 1))
        parts = {
            "state": square[:obs],
            "action": square[obs : obs + action],
            "reward": square[-2:-1],
            "value": square[-1:],
        }
        return {f"diagnostics/{name}_error": jnp.sqrt(jnp.mean(x)) for name, x in parts.items()}


def fit_scale(rows: Float[Array, "N C"], valid: Bool[Array, " N"]) -> Normalizer:
    """Means and standard deviations of the rows that count."""
    count = jnp.sum(valid, dtype=jnp.int32).astype(rows.dtype)

    def mean_of(x: Float[Array, "N C"]) -> Float[Array, " C"]:
        # A sum, which is pairwise. XLA adds up a product one row after another: at a million rows the mean
        # of a narrow column was eleven deviations off.
        return jnp.sum(jnp.where(valid[:, None], x, 0), axis=0) / count

    mean = mean_of(rows)
    return Normalizer(mean, jnp.sqrt(mean_of(jnp.square(rows - jnp.broadcast_to(mean, rows.shape)))))


def prior_loss(
    prior: CodePrior, state: Float[Array, "B D"], code: Int[Array, "B L"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """Mean cross-entropy of the codes of windows, given their first states."""
    logits = prior(state, code[:, :-1], key)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, code))
