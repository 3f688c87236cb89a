"""ONNX models of policies, by jax2onnx; checked in onnxruntime.

A model's inputs are observations, goals where there are any, and the policy's noise (`split_noise`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import kstest

from experiments.policy_export.artefact import Actor, header_of
from experiments.policy_export.split_noise import Split, split_noise
from mac.atomic_files import replace_file
from mac.errors import UserError, one_line
from mac.nn.frozen import Numerics


def acting(policy: Actor, batch: int) -> tuple[Callable[..., Any], Any, list[Any]]:
    """Returns `act(key, state, obs, [goal])`, the state, and shapes of the other arguments.

    Observations and goals are in the environment's units; the key serves all rows.
    """
    run = policy.run
    algo = run.algo.with_numerics(Numerics("float32", "plain"))
    state = jax.tree.map(lambda x: jnp.asarray(x[run.numbers.index(policy.seed)]), run.state)
    columns = algo.env.goal_columns

    def act(key: Any, state: Any, obs: Any, *goal: Any) -> Any:
        goals = run.normalizer.part(columns).apply(goal[0]) if goal else None
        found = algo.with_hparams(state.swept).act(state, run.normalizer.apply(obs), goals, key)
        return jnp.clip(found, -1, 1)

    return act, state, policy.arguments(batch)[:-3]


def separated(policy: Actor, batch: int) -> tuple[Split, Any, list[Any]]:
    """The policy with its noise as an argument, its state, and the shapes of observations and goals.

    Raises:
        UserError: it draws noise in a loop, so that its input would be a key.
    """
    act, state, shapes = acting(policy, batch)
    found = split_noise(act, jax.random.key(0), state, *shapes)
    noise = jax.eval_shape(found.draw, jax.random.key(0))
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in noise):
        raise UserError(
            f"{policy.run.settings.algo} draws random numbers in a loop, which ONNX cannot express; "
            "use --format jax"
        )
    return found, state, shapes


def distributions(draw: Callable[[Any], list[Any]], noise: list[Any]) -> list[str]:
    """Names the distribution of each array of noise, as far as a test of some thousand draws can tell."""
    repeats = max((-(-4000 // x.size) for x in noise), default=0)
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), repeats)) if noise else []
    laws = {"standard normal": "norm", "uniform in [0, 1)": "uniform"}
    found = []
    for values in draws:
        sample = np.asarray(values).ravel()
        fits = [name for name, law in laws.items() if kstest(sample, law).pvalue > 1e-4]  # pyright: ignore
        found.append(fits[0] if fits else "other")
    return found


def write_onnx(policy: Actor, out: Path, batch: int) -> tuple[dict[str, Any], float]:
    """Writes the model; returns its header and the largest difference from the policy's actions.

    Raises:
        UserError: a package is missing, or an operation has no counterpart in ONNX.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--format onnx needs jax2onnx ({one_line(error)}); pip install -e '.[onnx]', then "
            "pip install --no-deps 'jax2onnx>=0.17'"
        ) from error
    found, state, shapes = separated(policy, batch)
    noise = [np.asarray(x) for x in found.draw(jax.random.key(0))]

    def model(*arguments: Any) -> Any:
        given, drawn = arguments[: len(shapes)], list(arguments[len(shapes) :])
        return found.call(drawn, state, *given)

    inputs = [*shapes, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in noise)]
    names = ["obs", "goal"][: len(shapes)] + [f"noise{i}" for i in range(len(noise))]
    try:
        converted = jax2onnx.to_onnx(model, inputs=inputs, input_names=names, output_names=["actions"])
    except Exception as error:  # jax2onnx raises what it meets
        raise UserError(
            f"{policy.run.settings.algo} cannot be converted to ONNX ({one_line(error)}); use --format jax"
        ) from error
    chunk = jax.eval_shape(model, *inputs).shape[1]
    drawn = zip(names[len(shapes) :], noise, distributions(found.draw, noise), strict=True)
    described = {name: {"shape": list(x.shape), "distribution": law} for name, x, law in drawn}
    header = header_of(policy, batch, chunk) | {"noise": described}
    for name, value in header.items():
        converted.metadata_props.add(key=name, value=str(value))
    replace_file(out, lambda file: file.write(converted.SerializeToString()))
    return header, _difference(policy, out, batch)


def _difference(policy: Actor, out: Path, batch: int) -> float:
    """The largest difference of onnxruntime's actions from those of `act`, over 20 keys."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    act, state, shapes = acting(policy, batch)
    found, worst, own = split_noise(act, jax.random.key(0), state, *shapes), 0.0, jax.jit(act)
    rng, normalizer, env = np.random.default_rng(0), policy.run.normalizer, policy.run.algo.env
    for number in range(20):
        unit = rng.uniform(-1, 1, (batch, env.obs_dim))
        obs = (np.asarray(normalizer.center) + np.asarray(normalizer.width) * unit).astype(np.float32)
        given = [obs, *([] if env.goal_dim is None else [obs[::-1][:, list(env.goal_columns)]])]
        key = jax.random.key(number)
        arrays = [*given, *map(np.asarray, found.draw(key))]
        feed = dict(zip((x.name for x in session.get_inputs()), arrays, strict=True))
        actions = session.run(None, feed)[0]
        worst = max(worst, float(np.abs(actions - np.asarray(own(key, state, *given))).max()))
    return worst


def session_call(policy: Actor, out: Path, obs: Any, goal: Any) -> tuple[Callable[[], Any], int]:
    """One call of the model in onnxruntime, and the actions of a chunk."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found, _, _ = separated(policy, len(obs))
    given = [np.asarray(obs, np.float32), *([] if goal is None else [np.asarray(goal, np.float32)])]
    arrays = [*given, *map(np.asarray, found.draw(jax.random.key(0)))]
    feed = dict(zip((x.name for x in session.get_inputs()), arrays, strict=True))
    return lambda: session.run(None, feed), np.asarray(session.run(None, feed)[0]).shape[1]
