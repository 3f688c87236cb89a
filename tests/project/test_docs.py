"""The documentation: links lead somewhere, commands exist with their flags, and the Python in it runs."""

import contextlib
import functools
import importlib
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from baselines import REGISTRY
from experiments.launch.dataset import generated_file
from experiments.launch.settings import DataConfig
from mac.run import mesh
from tests.helpers.command_line import SIZES, arrays

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("README.md", "CONTRIBUTING.md", "experiments/README.md", "experiments/results/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *DOCS]
COMMAND = re.compile(r"\bpython experiments/\w+\.py\b[^`#\n]*")
MOST_WORDS = 1000
"""Of README.md."""

TUTORIAL_SIZES = {
    "seeds=4": "seeds=2",
    "steps = 20_000": "steps = 4",
    "hidden=(128, 128, 128, 128)": "hidden=(8,)",
    "batch=128": "batch=8",
    "episodes=25": "episodes=1",
    "eval_every=5_000": "eval_every=4",
    "checkpoint_every=5_000": "checkpoint_every=4",
}
"""Settings of the tutorial's Python, and those that the test runs with."""
README_SIZES = {"batch=64, hidden=(64, 64)": "batch=4, hidden=(8,), rollout=2, flow_steps=2", "64": "4"}
SHELL_SIZES = {"--episodes 50": "--episodes 1"}
PLACEHOLDERS = ("NAME", "ENV", "td3bc", "point-v0")
"""Words that stand for any name in a command, and names that the example of a plug-in registers."""
RUN_SIZES = [*SIZES, "--steps", "5"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of each code block in one of `languages`, in order."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def commands(path: Path) -> list[str]:
    """Every documented command, without its comment."""
    return [line.strip() for line in COMMAND.findall(path.read_text().replace("\\\n", " "))]


def resized(text: str, sizes: dict[str, str]) -> str:
    for old, new in sizes.items():
        text = text.replace(old, new)
    return text


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as MkDocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@functools.cache
def known_flags(script: str, first: tuple[str, ...]) -> set[str]:
    """Flags that `--help` of a command prints, after the words `first` that decide which there are."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        importlib.import_module(f"experiments.{script}").main([*first, "--help"])
    assert not stop.value.code
    return {*re.findall(r"(?<![\w-])--[a-z][\w.-]*", said.getvalue()), "--help"}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(path: Path):
    shown = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", shown):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(found), f"{target} has no heading {anchor}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_documented_commands_exist_with_their_flags(path: Path):
    for command in commands(path):
        _, script, *words = shlex.split(command)
        assert (ROOT / script).is_file(), f"{script} does not exist"
        stem = Path(script).stem
        at = words.index("--") if "--" in words else len(words)
        words, for_runs = words[:at], words[at + 1 :]  # what follows `--` are flags of run.py
        assert flags_in(for_runs) <= known_flags("run", ()), f"{command}: unknown flags"
        first = tuple(words[:1]) if stem == "benchmark" and words and not words[0].startswith("-") else ()
        for at, word in enumerate(words):
            if stem == "run" and word in ("--algo", "--env") and words[at + 1] not in PLACEHOLDERS:
                first += (word, words[at + 1])
        assert flags_in(words) <= known_flags(stem, first), f"{command}: unknown flags"


def flags_in(words: Sequence[str]) -> set[str]:
    """The flags among words of a command line, without values."""
    return {word.split("=", 1)[0] for word in words if word.startswith("--")}


def test_commands_are_found_in_every_place():
    assert sum(len(commands(path)) for path in PAGES) > 40
    text = commands(ROOT / "docs" / "usage.md")
    assert "python experiments/run.py --dry-run" in text


def test_ci_runs_every_command_of_the_gpu_page():
    script = (ROOT / ".ci" / "run").read_text()
    lines = [line for _, text in blocks(ROOT / "docs" / "gpu.md", "sh") for line in text.splitlines()]
    assert len(lines) > 2
    for line in lines:
        assert line in script, f"{line} is not run"


def test_every_command_has_a_line_in_the_list():
    """`experiments/README.md` names each program of its folder."""
    listed = {Path(shlex.split(command)[1]).name for command in commands(ROOT / "experiments" / "README.md")}
    assert listed == {path.name for path in (ROOT / "experiments").glob("*.py")} - {"__init__.py"}


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {path.name for path in DOCS}


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= MOST_WORDS and len(text.splitlines()) <= 140


def test_readme_counts_the_algorithms():
    said = re.search(r"\*\*(\d+) algorithms", (ROOT / "README.md").read_text())
    assert said and int(said[1]) == len(REGISTRY)


def test_python_of_the_readme_runs():
    ((_, code),) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(resized(code, README_SIZES), "README.md", "exec"), names)
    chex.assert_tree_all_finite(names["metrics"])


def test_loader_on_the_integrations_page_is_the_file():
    shown = [text for _, text in blocks(ROOT / "docs" / "integrations.md", "python")]
    assert (ROOT / "experiments" / "policy_export" / "loader.py").read_text() in shown


def test_gymnasium_example_runs(capsys: pytest.CaptureFixture[str]):
    shown = [text for _, text in blocks(ROOT / "docs" / "integrations.md", "python")]
    (code,) = [text for text in shown if "make_vec" in text]
    exec(compile(code, "integrations.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(8, 2) (8, 2) ")


def test_example_of_a_saved_policy_runs(finished: Path):
    shown = [text for _, text in blocks(ROOT / "docs" / "integrations.md", "python")]
    (code,) = [text for text in shown if "mac.load" in text]
    sizes = {'"runs/NAME"': repr(str(finished)), "range(200)": "range(3)"}
    names: dict[str, Any] = {}
    exec(compile(resized(code, sizes), "integrations.md", "exec"), names)
    assert np.shape(names["obs"]) == (28,)
    (more,) = [text for text in shown if "policy.nets" in text]
    exec(compile(more, "integrations.md", "exec"), names)
    q = np.asarray(names["q"], np.float32)
    assert q.shape == (1,) and np.isfinite(q).all()


@pytest.mark.slow
def test_python_of_the_environments_page_runs(capsys: pytest.CaptureFixture[str]):
    ((_, code),) = blocks(ROOT / "docs" / "environments.md", "python")
    exec(compile(resized(code, {"64": "2"}), "environments.md", "exec"), {})
    assert capsys.readouterr().out == "(2, 99) (2, 20) (2,) (2,)\n"


@pytest.mark.slow
def test_tutorial_runs_from_its_first_block_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """At small sizes, on data that stand for the generated ones; installation is left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mesh, "use_cpu_devices", lambda seeds: None)  # JAX has started
    dataset = generated_file(DataConfig(rows=200_200), "cube-single-play-v0")
    dataset.parent.mkdir(parents=True)
    np.savez(dataset, **arrays())  # pyright: ignore[reportArgumentType]
    np.savez(dataset.with_name("cube-single-play-v0-val.npz"), **arrays(1))  # pyright: ignore[reportArgumentType]
    names: dict[str, object] = {"__name__": "tutorial"}
    text = (ROOT / "docs" / "tutorial.md").read_text()
    assert all(old in text for old in TUTORIAL_SIZES)
    for language, block in blocks(ROOT / "docs" / "tutorial.md", "python", "sh"):
        if language == "python":
            exec(compile(resized(block, TUTORIAL_SIZES), "tutorial.md", "exec"), names)
            continue
        for command in COMMAND.findall(resized(block, SHELL_SIZES)):
            _, script, *words = shlex.split(command)
            if Path(script).stem == "doctor":
                continue
            sizes = RUN_SIZES if Path(script).stem == "run" and "--resume" not in words else []
            main = importlib.import_module(f"experiments.{Path(script).stem}").main
            assert main([*words, *sizes]) == 0, command
    assert "reached update 4" in capsys.readouterr().out
    assert (tmp_path / "runs" / "comparison.png").stat().st_size > 0
