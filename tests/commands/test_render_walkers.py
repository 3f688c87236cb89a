"""Films of walkers: what is recorded, and what the pictures show."""

from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Key
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from envs_mjx.action_noise import with_action_noise
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.registry import make, parse
from experiments import render_video
from experiments.launch.saved_run import SavedRun
from experiments.video.vector_drawing import fit_width
from experiments.video.walker_video import (
    GOAL,
    PLAN,
    WalkerRecording,
    draw_walker,
    film_walker,
    returns,
    walker_caption,
)
from mac.algorithm import TrainState
from mac.data.normalize import Normalizer
from mac.errors import UserError
from mac.run.evaluate import evaluate, evaluation_keys
from tests.helpers.fixed_policy import ActsOnly


class East(ActsOnly):
    """Always pushes along the first axis."""

    def act(self, state: TrainState, obs: Any, goal: Any, key: Key[Array, ""]) -> Float[Array, "E 2 A"]:
        return jnp.zeros((len(obs), 2, self.env.action_dim)).at[:, :, 0].set(1.0)


class Plans(East):
    """Does that, but plans to go straight to the goal, in four steps."""

    def planned_states(self, state: TrainState, past: Any, obs: Any, goal: Any, key: Key[Array, ""]) -> Any:
        return jnp.linspace(obs, goal, 5, axis=1)


def played(name: str, policy: type[East] = East) -> tuple[MazeEnv | GymEnv, SavedRun]:
    """An environment, and a run of two seeds of that policy."""
    env = make(name)
    assert isinstance(env, MazeEnv | GymEnv)
    width = env.spec.obs_dim
    normalizer = Normalizer(jnp.full(width, 0.5), jnp.full(width, 3.0))
    values = {"seed": 0, "seeds": 2, "env": name, "task_id": parse(name), "algo": "east"}
    settings = cast(Any, type("Settings", (), values))
    state = TrainState({"w": jnp.zeros(2)}, None, None)
    return env, SavedRun(Path(), settings, policy(env=env.spec), normalizer, 0, state)


@pytest.fixture(scope="module")
def hopping() -> tuple[GymEnv, WalkerRecording]:
    env, run = played("hopper-medium-v2")
    assert isinstance(env, GymEnv)
    return env, film_walker(run, env, 1, draw=0)


def test_an_ended_walker_stands_and_its_reward_counts_once(hopping: tuple[GymEnv, WalkerRecording]):
    _, track = hopping
    assert track.target is None and track.done[-1].all() and not track.done[0].any()
    assert not track.success.any() and not track.reward[0].any()
    for s in range(2):
        last = int(track.t[-1, s])
        assert last < len(track.t)
        np.testing.assert_array_equal(
            track.qpos[last:, s], track.qpos[last:, s][:1].repeat(len(track.t) - last, 0)
        )
        assert returns(track)[-1, s] == pytest.approx(track.reward[1 : last + 1, s].sum(), rel=1e-5)


def test_a_film_with_noise_shows_the_evaluation_with_it(hopping: tuple[GymEnv, WalkerRecording]):
    env, run = played("hopper-medium-v2")
    assert isinstance(env, GymEnv)
    track = film_walker(run, env, 1, draw=0, noise=0.3)
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, 0)
    want = evaluate(run.policies, with_action_noise(env, 0.3), 1, keys, batch=0, tasks=(1,))
    np.testing.assert_array_equal(track.t[-1], want.length[:, 0, 0])
    np.testing.assert_allclose(returns(track)[-1], want.episode_return[:, 0, 0], rtol=1e-5)
    assert not np.allclose(returns(track)[-1], returns(hopping[1])[-1], rtol=1e-3)


def test_pictures_show_every_walker_where_it_is(hopping: tuple[GymEnv, WalkerRecording]):
    env, track = hopping
    frames = [0, len(track.t) - 1]
    first, last = draw_walker(env.walker, track, [3, 4], "a title", frames)
    assert first.dtype == np.uint8 and first.shape == last.shape and (first != last).any()
    text, _ = walker_caption(env.walker, track, frames[1], 0)
    assert text.split() == [
        f"{track.t[-1, 0] * 0.008:.2f}", "s", "return", f"{returns(track)[-1, 0]:,.1f}"
    ]  # fmt: skip


def test_a_maze_is_drawn_with_its_goal_and_the_way_so_far():
    env, run = played("pointmaze-medium-navigate-oraclerep-v0")
    env_spec = env.spec._replace(max_steps=20)
    object.__setattr__(env, "spec", env_spec)
    track = film_walker(run, env, 2, draw=1)
    assert track.qpos.shape == (21, 2, 2) and track.target is not None and track.target.shape == (2, 2)
    assert track.done[-1].all() and not track.success.any()
    (picture,) = draw_walker(env.walker, track, [0, 1], "a title", [20])
    near = np.abs(picture - 255 * (0.8 * np.asarray(to_rgb(GOAL)) + 0.2)).max(axis=-1) < 3
    assert near.sum() > 50
    assert walker_caption(env.walker, track, 20, 0)[0].endswith("failed")


def test_plan_that_is_followed_is_drawn_until_the_end():
    """A new one every second step, which is when the policy decides."""
    env, run = played("pointmaze-medium-navigate-oraclerep-v0", Plans)
    object.__setattr__(env, "spec", env.spec._replace(max_steps=6))
    track = film_walker(run, env, 2, draw=1)
    assert track.plans is not None and track.plans.shape == (7, 2, 5, 2) and track.target is not None
    for k in range(7):
        np.testing.assert_allclose(track.plans[k, :, 0], track.qpos[min(k // 2 * 2, 4)], atol=1e-4)
        np.testing.assert_allclose(track.plans[k, :, -1], track.target, atol=1e-4)
    during, after = draw_walker(env.walker, track, [0, 1], "a title", [3, 6])
    red = [int((np.abs(x - 255 * np.asarray(to_rgb(PLAN))).max(axis=-1) < 60).sum()) for x in (during, after)]
    assert red[0] > 20 and red[1] == 0


def test_films_of_walkers_are_drawn_and_of_our_engines(monkeypatch: pytest.MonkeyPatch):
    settings = played("hopper-medium-v2")[1].settings
    monkeypatch.setattr(render_video, "read_settings", lambda folder: settings)
    for flags in ({"engine": "ogbench"}, {"renderer": "mujoco", "engine": "c"}):
        with pytest.raises(UserError, match=r"on engine c, mjx or warp, by --renderer drawing"):
            render_video.view(render_video.Args(run=Path(), **flags))


def test_a_long_title_is_shrunk_to_the_picture():
    canvas = FigureCanvasAgg(Figure(figsize=(5.6, 2), dpi=100))
    sizes: list[Any] = []
    for length in (20, 80):
        text = canvas.figure.text(0.5, 0.5, "a" * length, ha="center", weight="bold")
        fit_width(text, canvas, 11)
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 > 0 and box.x1 < canvas.figure.bbox.width
        sizes.append(text.get_fontsize())
    assert sizes[0] == 11 > sizes[1] > 5
