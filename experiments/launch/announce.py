"""Announces a run: its algorithm, environment, data and device, and what it will cost."""

import jax

from baselines import get_algorithm
from envs_mjx.datagen.dataset_parts import is_unfinished
from experiments.deviceless.cards import CardName, all_cards
from experiments.launch import cost_estimate, dataset, device_estimate, sweep
from experiments.launch.job import Launch
from mac.cgroup_limits import cores
from mac.data.provenance import Provenance
from mac.errors import UserError
from mac.formatting import counted
from mac.nn.frozen import Numerics
from mac.run import hosts
from mac.run.io.run_metadata import cpu_model


def describe_precision(numerics: Numerics, platform: str) -> str:
    """Precision of matmuls on a platform, in a few words."""
    precision, on_cpu = numerics.resolved(platform).precision, platform == "cpu"
    why = " (auto)" if numerics.precision == "auto" else ""
    if precision == "float32" or (precision == "tf32" and not on_cpu):
        return precision + why
    others = "float32" if on_cpu else "tf32"
    return f"{precision}{', emulated,' if on_cpu else ''} in networks without gradient, {others} elsewhere"


def describe_noise(evaluated: float, made: Provenance | None) -> str:
    """Noise on the actions of evaluations and, where it is known, of the data; empty without any."""
    recorded = float(made.facts.get("action_noise", 0.0)) if made and made.kind == "generated" else 0.0
    if evaluated == recorded:
        return f"{evaluated:g} on executed actions, in the data and in evaluations" if evaluated else ""
    return (
        f"the data record {recorded:g} on executed actions, evaluations have {evaluated:g}: success is that "
        f"of a shifted environment, unless --eval.noise {recorded:g}"
    )


def announce(launch: Launch, reason: str) -> None:
    """Says in a few lines what will happen, and what it will cost."""
    settings, spec = launch.settings, launch.env.spec
    known, choice = launch.known, launch.choice
    rows, held = dataset.windows(settings.data, known)
    count = len(sweep.variants(settings))
    lanes = settings.seeds * count
    device = jax.devices()[0]
    where = f"{cpu_model()}, {counted(cores(), 'core')}" if device.platform == "cpu" else device.device_kind
    left = max(settings.steps - (launch.reached or 0), 0)
    evaluations = 0 if launch.finished else -(-left // settings.run.eval_every)
    episodes = lanes * settings.eval.episodes * len(spec.tasks)
    done = "" if launch.reached is None else f", {launch.reached:,} of them done"
    print(f"algorithm    {get_algorithm(settings.algo).title}")
    if spec.tasks:
        print(f"environment  {settings.env}, evaluated on engine {launch.engine}")
    else:
        widths = f"{spec.obs_dim} observation and {spec.action_dim} action columns"
        print(f"environment  none, data alone ({widths}): diagnostics, no evaluation")
    print(f"preset       {settings.preset} ({reason})")
    print(f"device       {missing_card(settings.device) if settings.device else where}")
    if hosts.count() > 1:
        each_has = counted(jax.local_device_count(), "device")
        print(f"processes    {hosts.count()} with {each_has} each")
    platform = "gpu" if settings.device else jax.default_backend()
    print(f"precision    {describe_precision(launch.algo.numerics, platform)}")
    each = f" of each of {count} configurations" if settings.sweep else ""
    print(f"seeds        {settings.seeds} ({settings.seed} to {settings.seed + settings.seeds - 1}){each}")
    print(f"updates      {settings.steps:,} of each seed{done}")
    print(f"data         {choice.path} ({dataset.describe_rows(settings.data, known)}{choice.describe()})")
    if note := cost_estimate.data_note(settings.preset, spec, known.rows, dataset.larger(launch.task_id)):
        print(f"note         {note}")
    if is_unfinished(choice.path):
        print("note         this dataset is unfinished: its other files are to be made by generate_data.py")
    made = dataset.dataset_provenance(choice.path) if choice.found else None
    if made:
        print(f"source       {made.label}")
    if spec.tasks and (line := describe_noise(settings.eval.noise, made)):
        print(f"noise        {line}")
    print(f"results      {launch.folder}")
    if settings.device:
        announce_device(launch, settings.device, lanes, left)
        return
    sizes = cost_estimate.make_plan(launch.algo, spec, rows, lanes, known.dtype, held)
    if not spec.tasks and settings.dry_run:
        print("\n".join(cost_estimate.cost_lines(sizes, launch.algo, spec, rows)))
        return
    parts = {
        "data": cost_estimate.seconds_to_collect(round(1.1 * known.rows))
        if choice.how == "generate"
        else 0.0,
        "training": cost_estimate.seconds_to_train(sizes, left * lanes),
        "evaluation": cost_estimate.seconds_to_evaluate(evaluations, episodes, spec),
    }
    print(f"time         {cost_estimate.describe_time(parts)}", flush=True)
    if settings.dry_run:
        print("\n".join(cost_estimate.cost_lines(sizes, launch.algo, spec, rows)))
        print(cost_estimate.describe_evaluation(launch.env, episodes, settings.eval.batch))


def missing_card(name: CardName) -> str:
    """Describes the card that a run is compiled for."""
    return f"{all_cards()[name].name}, for which it is compiled here and not run (jax {jax.__version__})"


def announce_device(launch: Launch, card: CardName, lanes: int, updates: int) -> None:
    """Says what the run's programs cost on a card that is not here, as each is compiled.

    Raises:
        UserError: the evaluation is asked for on an engine that cannot be compiled.
    """
    if "evaluate" in launch.settings.device_programs and launch.engine != "mjx":
        raise UserError(
            f"--device-programs evaluate: engine {launch.engine} is not compiled by XLA; take "
            "--eval.engine mjx, or leave evaluate out"
        )
    settings, (rows, held) = launch.settings, dataset.windows(launch.settings.data, launch.known)
    intervals = (settings.run.segment, settings.run.eval_every, settings.run.checkpoint_every)
    run = device_estimate.RunShapes(
        algo=launch.algo,
        env=launch.env,
        rows=rows,
        dtype=launch.known.dtype,
        lanes=lanes,
        swept=tuple(sweep.variants(settings)[0].values),
        updates=device_estimate.segment_updates(*intervals, settings.steps),
        episodes=settings.eval.episodes,
        batch=settings.eval.batch,
    )
    programs = settings.device_programs
    for line in device_estimate.device_lines(run, card, programs, updates, held):
        print(line, flush=True)
