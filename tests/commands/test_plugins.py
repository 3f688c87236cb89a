"""Plug-ins: a package outside this project adds an algorithm and an environment to every command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mac import plugins
from mac.errors import UserError

ROOT = Path(__file__).parents[2]
SIZES = ["--seeds", "2", "--hp.batch", "8", "--hp.hidden", "8", "--run.segment", "5", "--eval.episodes", "2"]
COMMANDS = """
import sys
from experiments import evaluate, report, run
flags = sys.argv[1:]
assert run.main(["--list"]) == 0
assert run.main([*flags, "--out", "run", "--steps", "10"]) == 0
assert evaluate.main(["run", "--episodes", "1"]) == 0
assert evaluate.main(["run", "--engine", "ogbench"]) == 2
"""
MORE_COMMANDS = """
assert run.main(["--out", "run", "--resume", "--steps", "15"]) == 0
assert run.main([*flags, "--out", "swept", "--sweep", "hp.alpha=1,2", "--steps", "5"]) == 0
assert report.main(["run", "swept", "--out", "report.csv"]) == 0
"""


def documented(name: str) -> str:
    """The code block of docs/extending.md whose first line names the file."""
    text = (ROOT / "docs" / "extending.md").read_text()
    found = re.search(rf"^```\w+\n# {re.escape(name)}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def tutorial_algorithm() -> str:
    """The tutorial's algorithm."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)
    (code,) = [block for block in blocks if "class TD3BC(" in block]
    return code


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation's package as an installer leaves it, in a folder of PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    (site / "my_rl").mkdir()
    (site / "my_rl" / "__init__.py").write_text("")
    (site / "my_rl" / "td3bc.py").write_text(tutorial_algorithm())
    for name in ("my_rl/point.py", "my_rl/plugin.py"):
        (site / name).write_text(documented(name))
    project = documented("pyproject.toml")
    (group,) = re.findall(r'^\[project\.entry-points\."(.+)"\]$', project, re.MULTILINE)
    (entry,) = re.findall(r'^(\w+ = ".+")$', project.split(group)[1], re.MULTILINE)
    folder = site / "my_rl-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rl\nVersion: 0.1\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return site


def called(script: str, installed: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process in `folder` that calls the commands of `script` where the package is installed."""
    subprocess.run([sys.executable, "-c", documented("make_points.py")], cwd=folder, check=True)
    flags = ["--algo", "td3bc", "--env", "point-v0", "--data.path", "points.npz", *SIZES]
    path = os.pathsep.join([str(installed), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_package_from_outside_is_listed_trains_and_is_evaluated(installed: Path, tmp_path: Path):
    done = called(COMMANDS, installed, tmp_path)
    assert re.search(r"^td3bc +TD3\+BC \(Fujimoto and Gu 2021\), arXiv 2106\.06860, 2021$", done.stdout, re.M)
    assert "Environments of plug-ins: point-v0" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --engine ogbench: OGBench has no point-v0")
    (evaluated,) = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert [(row["task"], row["seed"]) for row in evaluated["rows"]] == [(1, 0), (1, 1)]


@pytest.mark.slow
def test_package_from_outside_resumes_sweeps_and_is_reported(installed: Path, tmp_path: Path):
    done = called(COMMANDS + MORE_COMMANDS, installed, tmp_path)
    assert "resumed from the checkpoint of update 10" in done.stdout
    assert {"alpha=1", "alpha=2"} <= {folder.name for folder in (tmp_path / "swept").iterdir()}
    assert "td3bc" in (tmp_path / "report.csv").read_text()


def test_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "broken-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (folder / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nbroken = broken_module_of_a_test\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._declared.cache_clear()
    try:
        for _ in range(2):  # it is tried again, and named again
            with pytest.raises(UserError, match="broken_module_of_a_test of package broken cannot"):
                plugins.load_plugins()
    finally:
        plugins._declared.cache_clear()
