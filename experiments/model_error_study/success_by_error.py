"""Success of trained policies, compared with the error of the models that they were trained in."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from experiments import evaluate
from experiments.benchmarks.harness import write_csv
from experiments.launch import saved_run
from experiments.model_error_study.figures import draw_policies
from experiments.model_error_study.open_loop import check_horizon, held_out, network_of, open_loop_errors
from experiments.model_error_study.rows import PolicyRow
from mac.run.io.logger import EVAL, read_rows
from mac.run.report.stats import Curve, check_rows, learning_curve
from mac.run.report.table import print_tables


def compare_policies(
    folders: Sequence[Path], horizon: int, trajectories: int, seed: int, out: Path, command: Sequence[str]
) -> None:
    """Measures the newest checkpoint of every run; writes `success.csv` and `success.png` to `out`.

    Success is that of the run's own evaluation of that checkpoint. A checkpoint without one is evaluated.

    Raises:
        UserError: a folder holds no run with a dynamics model, or its dataset is missing or too short.
    """
    rows = [row for folder in folders for row in policy_rows(folder, horizon, trajectories, seed)]
    envs = ", ".join(dict.fromkeys(row.env for row in rows))
    title = f"success and model error after {horizon} steps, {envs}"
    data = "; ".join(dict.fromkeys(row.data for row in rows))
    write_csv(out / "success.csv", rows, command, data=data)
    draw_policies(rows, out / "success.png", title=title, data=data)
    print_tables(policy_table(rows, title, data))
    print(f"  {out / 'success.csv'}\n  {out / 'success.png'}")


def policy_rows(folder: Path, horizon: int, trajectories: int, seed: int) -> list[PolicyRow]:
    """Returns the rows of one run, one per seed."""
    run = saved_run.open_run(folder)
    network, chunk = network_of(run.state.nets, run.title), run.algo.sample.chunk
    store = saved_run.open_dataset(folder, run.settings, run.algo.env)
    real = held_out(store, run.normalizer)
    check_horizon(f"{folder}: --horizon", horizon, chunk, store)
    errors = open_loop_errors(network, real, chunk, horizon, trajectories, seed, run.algo)
    scores = success_of(run)
    return [
        PolicyRow(
            run=str(folder),
            algo=run.settings.algo,
            env=run.settings.env,
            chunk=chunk,
            rollout=chunk * getattr(run.settings.hp, "rollout", 0),
            step=run.step,
            seed=number,
            success=float(scores.scores[-1, scores.seeds.index(number)].mean()),
            episodes=scores.episodes,
            horizon=horizon,
            error=float(errors.model[i, -1].mean()),
            still=float(errors.still[-1].mean()),
            data=store.provenance.label,
        )
        for i, number in enumerate(run.numbers)
    ]


def success_of(run: saved_run.SavedRun) -> Curve:
    """Returns the success rates of the run's policies; evaluates them if there is no evaluation."""
    path = run.folder / EVAL
    rows = list(read_rows(path)) if path.exists() else []
    check_rows(rows, str(path))
    rows = [row for row in rows if row["step"] == run.step]
    if not rows:
        evaluate.evaluate_again(evaluate.Args(run.folder, step=run.step))
        rows = list(read_rows(run.folder / evaluate.EVALUATIONS))[-1]["rows"]
    return learning_curve(rows)


def policy_table(rows: Sequence[PolicyRow], title: str, data: str) -> Table:
    """Returns a table with one line per seed, and the origin of the data."""
    shown = Table(title=title, title_justify="left", caption=f"data: {data}", caption_justify="left")
    for name in ("run", "chunk", "seed", "success", "error", "constant state"):
        shown.add_column(name, justify="left" if name == "run" else "right")
    for r in rows:
        shown.add_row(
            Path(r.run).name,
            str(r.chunk),
            str(r.seed),
            f"{r.success:.1%}",
            f"{r.error:.3g}",
            f"{r.still:.3g}",
        )
    return shown
