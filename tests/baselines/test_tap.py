"""TAP: the data's scale, plans against all plans, the two phases of training, and what it cannot do."""

import dataclasses
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.tap import TAP, Nets, TAPConfig, fit_scale
from mac.algorithm import TrainState
from mac.data.sampler import sample
from mac.errors import UserError
from mac.nn.transformer import matmul_weights
from mac.ops.code_search import plan_return
from mac.types import Batch
from tests.helpers.numpy_mac import perturb
from tests.helpers.toy_env import FALL_SPEC, GOAL_SPEC, SPEC, falling_window, window

STEPS = 10
"""Length of a run in updates."""


def tap(**changes: Any) -> TAP:
    sizes: dict[str, Any] = {
        "batch": 8, "hidden": (8,), "heads": 2, "dropout": 0.0, "window": 6, "codes": 4, "horizon": 6,
        "beam": 4, "expand": 2, "prior_share": 0.0, "lr": 1e-2,
    }  # fmt: skip
    return TAP(TAPConfig(**sizes | changes), SPEC, STEPS)


def fresh(algo: TAP) -> TrainState:
    state = jax.jit(algo.init)(jr.key(0))
    return dataclasses.replace(state, nets=perturb(state.nets, 1))


def draw(algo: TAP) -> Batch:
    return jax.jit(sample, static_argnums=1)(window(), algo.sample, jr.key(2))


def first_update(algo: TAP, grads: Nets, nets: Nets) -> tuple[Any, Any]:
    """What the optimiser adds to networks, and its state after it."""
    optimiser: Any = algo.optimiser()
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(optimiser.update)(grads, jax.jit(optimiser.init)(nets), nets)


def equal(x: Any, y: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def test_scale_is_that_of_all_transitions():
    """Final states, whose actions have no meaning, do not count; a value excludes its step's own reward."""
    data, rows = falling_window(), []
    assert data.reward is not None and data.return_to_go is not None
    obs, action = np.asarray(data.obs[:], np.float64), np.asarray(data.action[:], np.float64)
    for first, steps in zip(np.asarray(data.episodes.first), np.asarray(data.episodes.steps), strict=True):
        for row in range(first, first + steps):
            returns = [data.reward[row], data.return_to_go[row + 1]]
            rows.append([*obs[row], *action[row], *returns])
    algo = TAP(tap().cfg, FALL_SPEC, STEPS)
    scale = jax.jit(algo.prepare)(fresh(algo), data).target.scale
    np.testing.assert_allclose(scale.center, np.mean(rows, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale.half_range, np.std(rows, axis=0), rtol=1e-4, atol=1e-5)


def test_scale_of_a_million_rows_of_a_narrow_column():
    """A joint that hardly moves. Its mean was eleven deviations off, where rows were added up in turn."""
    rows = np.random.default_rng(0).normal(-1.5708, 2e-4, (1_000_000, 1)).astype(np.float32)
    valid = np.arange(len(rows)) % 5 > 0
    scale = jax.jit(fit_scale)(jnp.asarray(rows), jnp.asarray(valid))
    wanted = rows[valid].astype(np.float64)
    assert abs(float(scale.center[0]) - wanted.mean()) < 0.01 * wanted.std()
    assert float(scale.half_range[0]) == pytest.approx(wanted.std(), rel=0.01)


def test_episodes_that_fill_a_window_up_count_for_nothing():
    data = falling_window()
    index, fill = data.episodes, lambda x, value: jnp.concatenate([x, jnp.full(3, value, x.dtype)])
    assert index.terminated is not None
    longer = dataclasses.replace(
        index,
        first=fill(index.first, 0),
        steps=fill(index.steps, 0),
        starts_before=fill(index.starts_before, index.n_starts),
        steps_before=fill(index.steps_before, index.n_steps),
        terminated=fill(index.terminated, False),
    )
    algo = TAP(tap().cfg, FALL_SPEC, STEPS)
    state = fresh(algo)
    got = algo.prepare(state, dataclasses.replace(data, episodes=longer)).target.scale
    want = algo.prepare(state, data).target.scale
    np.testing.assert_allclose(got.center, want.center, rtol=1e-6)
    np.testing.assert_allclose(got.half_range, want.half_range, rtol=1e-6)


def test_padding_changes_no_loss_but_that_of_the_end():
    algo = tap()
    state, batch = fresh(algo), draw(algo)
    assert batch.valid is not None and batch.states is not None and batch.rewards is not None
    ended = batch.valid == 0
    assert np.any(ended)
    noise = jr.normal(jr.key(3), batch.rewards.shape)
    other = dataclasses.replace(
        batch,
        actions=batch.actions + jnp.where(ended, noise, 0.0)[..., None],
        rewards=batch.rewards + jnp.where(ended, noise, 0.0),
    )
    loss = jax.jit(algo.loss)
    got, want = (loss(state.nets, state.target, x, jr.key(4))[1] for x in (other, batch))
    assert equal(got, want)


@pytest.mark.parametrize("seed", range(3))
def test_action_is_that_of_the_best_of_all_plans(seed: int):
    """4 codes and 2 of them in a plan: 16 plans, decoded as a whole; nearly surely all are drawn."""
    algo = tap(beam=3000, expand=1, probable=0.3)
    cfg, state = algo.cfg, fresh(algo)
    scale = perturb(state.target.scale, 4)
    state = dataclasses.replace(state, target=state.target._replace(scale=scale))
    obs = jr.normal(jr.key(seed), (2,))
    s = (obs - scale.center[:2]) / scale.width[:2]
    plans = jnp.asarray(list(itertools.product(range(cfg.codes), repeat=2)))
    told = jnp.broadcast_to(s, (len(plans), 2))
    log_probs = jax.nn.log_softmax(state.nets.prior(told, plans[:, :1]))
    log_prob = jnp.sum(jnp.take_along_axis(log_probs, plans[..., None], axis=-1)[..., 0], axis=1)
    steps = scale.invert(state.nets.decoder(told, state.nets.codebook.vectors[plans])[..., :-1])
    likely = cfg.likelihood_weight * jnp.minimum(log_prob, 2 * np.log(cfg.probable))
    best = steps[jnp.argmax(plan_return(steps[..., -2], steps[..., -1], cfg.discount) + likely)]
    got = jax.jit(algo.act)(state, obs[None], None, jr.key(5))
    np.testing.assert_allclose(got[0, 0], jnp.clip(best[0, 2:4], -1, 1), rtol=1e-4, atol=1e-5)


def test_several_steps_of_a_plan_may_be_executed():
    algo = tap(execute=4)
    state, obs = fresh(algo), jr.normal(jr.key(1), (3, 2))
    got = jax.jit(algo.act)(state, obs, None, jr.key(2))
    one = jax.jit(tap().act)(state, obs, None, jr.key(2))
    assert got.shape == (3, 4, 2) and np.all(np.abs(got) <= 1)
    np.testing.assert_allclose(got[:, :1], one, rtol=1e-6)
    assert np.abs(np.diff(got, axis=1)).max() > 1e-3


def test_prior_learns_when_the_autoencoder_is_done():
    """Of 10 updates the first 6 train the autoencoder; then only the prior changes."""
    algo = tap(prior_share=0.4)
    state, batch, update = fresh(algo), draw(algo), jax.jit(algo.update)
    for step in range(STEPS):
        after, metrics = update(state, batch, jnp.asarray(step, jnp.int32), jr.key(step))
        changed = {
            name for name, net in vars(after.nets).items() if not equal(net, getattr(state.nets, name))
        }
        assert changed == ({"encoder", "codebook", "decoder"} if step < 6 else {"prior"}), step
        assert (metrics["prior/loss"] > 0) == (step >= 6) != (metrics["decoder/step_loss"] > 0)
        state = after


def test_prior_of_the_second_phase_has_the_loss_of_the_joint_one():
    joint, phases = tap(), tap(prior_share=0.4)
    nets, batch = fresh(joint).nets, draw(joint)
    target = phases.target_nets(nets)._replace(prior_only=jnp.ones((), bool))
    got = jax.jit(phases.loss)(nets, target, batch, jr.key(0))[1]
    want = jax.jit(joint.loss)(nets, joint.target_nets(nets), batch, jr.key(0))[1]
    np.testing.assert_allclose(got["prior/loss"], want["prior/loss"], rtol=1e-5)
    assert got["codebook/perplexity"] == want["codebook/perplexity"] and got["decoder/step_loss"] == 0


def test_weights_of_matmuls_alone_decay():
    """Zero gradients move nothing but them; a step of AdamW takes `lr * weight_decay` of each."""
    algo = tap(weight_decay=0.5)
    nets = fresh(algo).nets
    zero = jax.tree.map(jnp.zeros_like, nets)
    moves, _ = first_update(algo, zero, nets)
    for name in ("encoder", "decoder", "prior"):
        net, move, decays = (getattr(tree, name) for tree in (nets, moves, matmul_weights(nets)))
        for x, y, decay in zip(*map(jax.tree.leaves, (net, move, decays)), strict=True):
            np.testing.assert_allclose(y, -0.005 * x if decay else 0 * x, rtol=1e-5, atol=1e-9)


def test_gradients_are_clipped_but_the_priors_apart():
    """First moments of Adam are a tenth of the clipped gradients."""
    algo = tap(clip=1e-3)
    state, batch = fresh(algo), draw(algo)
    grads, _ = jax.jit(jax.grad(algo.loss, has_aux=True))(state.nets, state.target, batch, jr.key(0))
    _, after = first_update(algo, grads, state.nets)
    for label, nets in (("", ("encoder", "decoder")), ("prior", ("prior",))):
        mu = after.inner_states[label].inner_state[1][0].mu
        own = [x for name in nets for x in jax.tree.leaves(getattr(grads, name))]
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in own))
        got = [x for name in nets for x in jax.tree.leaves(getattr(mu, name))]
        for x, y in zip(got, own, strict=True):
            np.testing.assert_allclose(x, 1e-4 * y / norm, rtol=1e-4, atol=1e-10)


def test_dropout_is_for_training_only():
    algo = tap(dropout=0.5)
    state, batch, loss = fresh(algo), draw(algo), jax.jit(algo.loss)
    first, second = (loss(state.nets, state.target, batch, jr.key(i))[0] for i in (0, 1))
    assert first != second
    obs = jnp.ones((1, 2))
    np.testing.assert_array_equal(
        algo.act(state, obs, None, jr.key(0)), algo.act(state, obs, None, jr.key(0))
    )


def test_diagnosis_is_the_decoders_error_in_deviations():
    algo = tap()
    found = jax.jit(algo.diagnose)(fresh(algo), window(), jr.key(0))
    assert found.keys() == {f"diagnostics/{part}_error" for part in ("state", "action", "reward", "value")}
    assert all(np.isfinite(x) and x > 0 for x in found.values())
    assert algo.diagnose(fresh(algo), dataclasses.replace(window(), reward=None), jr.key(0)) == {}


def test_recorded_terminations_have_a_reward_of_their_own():
    cfg = tap().cfg
    assert TAP(cfg, FALL_SPEC, STEPS).sample.terminal_reward == -100
    assert TAP(cfg, SPEC, STEPS).sample.terminal_reward is None
    kept = dataclasses.replace(cfg, terminal_reward=0.0)
    assert TAP(kept, FALL_SPEC, STEPS).sample.terminal_reward is None


def test_tasks_with_goals_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^--algo=tap: toy-point-goals has goals; take .*$"):
        TAP(tap().cfg, GOAL_SPEC, STEPS)


def test_phases_need_the_length_of_the_run():
    with pytest.raises(UserError, match=r"--hp\.prior-share=0\.5 needs the length of the run"):
        TAP(dataclasses.replace(tap().cfg, prior_share=0.5), SPEC)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("hidden", (8, 16), "give equal widths"),
        ("heads", 3, "must divide the width 8"),
        ("window", 7, "must be a multiple of --hp.stride=3"),
        ("horizon", 9, "must be at most --hp.window=6"),
        ("execute", 7, "must be 1 to 6"),
        ("prior_share", 1.0, r"must be in \[0, 1\)"),
        ("probable", 0.0, r"must be in \(0, 1\)"),
        ("code_decay", 1.0, r"must be in \(0, 1\)"),
        ("clip", 0.0, "must be positive and finite"),
        ("terminal_reward", float("nan"), "must be finite"),
    ],
)
def test_impossible_hyperparameter_is_named(field: str, value: Any, rule: str):
    with pytest.raises(UserError, match=f"^--hp.{field.replace('_', '-')}=.*: {rule}"):
        tap(**{field: value})


def test_networks_of_the_paper_have_the_sizes_it_gives():
    """Blocks of width 512: 12 512² + 13 512 weights each, four in each of three transformers."""
    algo = TAP(TAPConfig(), FALL_SPEC._replace(obs_dim=11, action_dim=3), STEPS)
    nets = jax.eval_shape(algo.nets, jr.key(0))
    for net in (nets.encoder, nets.decoder, nets.prior):
        sizes = [sum(x.size for x in jax.tree.leaves(block)) for block in net.blocks.blocks]
        assert sizes == [12 * 512**2 + 13 * 512] * 4
    assert nets.codebook.total.shape == (512, 512) and nets.prior.position.shape == (8, 512)
    assert nets.encoder.inner.weight.shape == (17, 512) and nets.decoder.outer.weight.shape == (512, 17)
    assert eqx.filter_eval_shape(
        algo.act, jax.eval_shape(algo.init, jr.key(0)), jnp.zeros((2, 11)), None, jr.key(0)
    ).shape == (2, 1, 3)
