"""The picture shows the numbers of `eval.jsonl`, says what they are, and is written whole."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from mac.errors import UserError
from mac.run.report import plot
from mac.run.report.stats import learning_curve, summarise
from mac.run.report.table import comparison_table, diagnostics_tables, print_tables, results_table


def make_rows(seeds: int, tasks: int = 1, steps: int = 4) -> list[dict]:
    rng = np.random.default_rng(0)
    cells = itertools.product(range(steps), range(seeds), range(1, tasks + 1))
    return [
        {"step": 1000 * i, "seed": s, "task": t, "success": rng.binomial(20, i / steps) / 20, "episodes": 20}
        for i, s, t in cells
    ]


def drawn(rows: list[dict]):
    axes = Figure().add_subplot()
    plot._draw(axes, learning_curve(rows))
    return axes


def test_curve_shows_mean_seeds_and_interval():
    rows = make_rows(seeds=4, tasks=3)
    curve, axes = learning_curve(rows), drawn(rows)
    *seeds, mean = [line.get_ydata() for line in axes.lines]
    np.testing.assert_allclose(mean, curve.scores.mean(axis=(1, 2)))
    np.testing.assert_allclose(np.transpose(seeds), curve.scores.mean(axis=2))
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    last = summarise(curve.scores[-1], reps=2000).mean
    assert any(np.isclose(heights, last.low)) and any(np.isclose(heights, last.high))


def test_axes_and_legend_say_what_is_shown():
    axes = drawn(make_rows(seeds=4, tasks=3))
    assert axes.get_xlabel() == "gradient updates"
    assert axes.get_ylabel() == "success rate\n(3 tasks × 20 episodes per seed)"
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"mean of 4 seeds", "one seed", "95% interval over seeds"}


def test_single_seed_has_no_band():
    axes = drawn(make_rows(seeds=1))
    assert not axes.collections and len(axes.lines) == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed 0"]


@pytest.mark.parametrize("steps", [1, 4])
def test_png_has_the_stated_size(tmp_path: Path, steps: int):
    path = tmp_path / "new" / "curve.png"
    plot.plot_learning_curve(make_rows(seeds=2, steps=steps), path, title="MAC on a task")
    assert imread(path).shape == (600, 960, 4)
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]


def test_unwritable_picture_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        plot.plot_learning_curve(make_rows(2), tmp_path / "file" / "curve.png", title="")


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, mac.run.report.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def printed(rows: list[dict]) -> str:
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(results_table(learning_curve(rows), title="MAC"))
    return capture.get()


def test_table_states_mean_iqm_and_intervals():
    rows = make_rows(seeds=4, tasks=2)
    text, last = printed(rows), summarise(learning_curve(rows).last())
    for interval in (last.mean, last.iqm):
        assert f"{interval.value:.1%}" in text and f"{interval.low:.1%} to {interval.high:.1%}" in text
    assert "at 3,000 updates" in text and "last 3 evaluations" in text and "task 2" in text
    assert "4 seeds, 20 episodes per seed and task" in text


def test_tables_cut_no_number_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    curve = learning_curve(make_rows(seeds=4, tasks=2))
    end = summarise(curve.last()).mean
    print_tables(results_table(curve, title="MAC"))
    print_tables(comparison_table({"mac": curve}, title="MAC"))
    text = capsys.readouterr().out
    assert text.count(f"{end.low:.1%} to {end.high:.1%}") >= 2 and "…" not in text and "–" not in text


@pytest.mark.parametrize(("width", "together"), [(20, 1), (70, 2), (500, 5)])
def test_diagnostics_of_many_runs_fit_the_terminal(width: int, together: int, capsys):
    runs = {f"run number {i}": {"drift_5": np.asarray([0.125, 0.5]) + i} for i in range(5)}
    print_tables(*diagnostics_tables(runs, title="at the end", width=width))
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "drift_5" in line]
    assert rows[0].count(" to ") == together
    assert len(rows) == -(-5 // together) and " ".join(rows).count(" to ") == 5
    assert all(f"({0.125 + i:.3g} to {0.5 + i:.3g})" in text and f"run number {i}" in text for i in range(5))
    if together > 1:
        assert max(map(len, text.splitlines())) <= width


def test_table_of_one_seed_says_why_it_has_no_interval():
    assert "intervals need two seeds" in printed(make_rows(seeds=1))
