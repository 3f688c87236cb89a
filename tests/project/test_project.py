"""The project's own habits: short functions, declared dependencies, documented commands that CI runs."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mac", "envs_mjx", "baselines", "experiments")
SOURCES = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def distribution(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


QUESTIONS = ("What", "How", "Where", "Whether", "Which", "By what")


def docstrings() -> dict[str, str]:
    """First docstring of each module that is not empty."""
    texts = {relative(path): path.read_text() for path in SOURCES}
    return {name: ast.get_docstring(ast.parse(text)) or "" for name, text in texts.items() if text}


def test_module_docstrings_name_the_thing():
    questions = tuple(f"{word} " for word in QUESTIONS)
    assert not [name for name, text in docstrings().items() if not text or text.startswith(questions)]


def test_functions_are_short():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [
        f"{relative(path)}: {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions) and (node.end_lineno or 0) - node.lineno >= 80
    ]


def test_names_of_tests_are_short():
    """They state a fact and fit a line of pytest's summary."""
    assert not [
        f"{relative(path)}: {name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        if len(name) > 60
    ]


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """Names of the installed distributions that provide each top-level module."""
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_declared_dependencies(package: str):
    extras = PROJECT["optional-dependencies"]
    used = ("warp", "video", "tensorboard", "wandb", "trackio", "export", "onnx", "slurm")
    optional = [*(requirement for name in used for requirement in extras[name]), "jax2onnx"]
    declared = {distribution(requirement) for requirement in (*PROJECT["dependencies"], *optional)}
    owners = distributions()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top in PACKAGES:
                    continue
                names = {name.lower().replace("_", "-") for name in owners.get(top, [top.replace("_", "-")])}
                assert names & declared, f"{relative(path)} imports {top}, which pyproject.toml does not list"


def test_lock_file_fits_the_dependencies():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (ours,) = [package for package in packages if package["name"] == PROJECT["name"]]
    locked = {
        (entry["name"], entry.get("specifier", ""))
        for entry in ours["metadata"]["requires-dist"]
        if "extra ==" not in entry.get("marker", "")
    }
    declared = {
        (
            distribution(requirement),
            ",".join(sorted(re.findall(r"[<>=!~]=?[^,]+", requirement), reverse=True)),
        )
        for requirement in PROJECT["dependencies"]
    }
    normal = {(name, ",".join(sorted(specifier.split(","), reverse=True))) for name, specifier in locked}
    assert normal == declared, "run `uv lock`"


def test_constraints_are_those_of_the_lock_file():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {(p["name"], p["version"]) for p in packages if p["name"] != PROJECT["name"]}
    written = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(written) == locked, "run the command in the head of constraints.txt"


def test_versions_agree():
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    assert PROJECT["version"] in {p["version"] for p in packages if p["name"] == PROJECT["name"]}
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == PROJECT["version"]


def test_readme_commands_are_run_by_ci():
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^\s*(?:\$ )?(pip install -e .*&& .*)$", readme, re.MULTILINE)
    tests = [command for command in commands if "pytest" in command]
    assert tests, "README.md states how to install and test"
    for step in tests[0].split(" && "):
        assert step.strip() in script


def test_no_path_of_one_machine_is_left():
    machine = re.compile(r"(?<![\w.])/(?:work|home/\w+|root)/[\w.]")
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yml"} or path.name == "run":
            assert not machine.search(path.read_text()), f"{relative(path)} names a folder of one machine"


def test_nothing_large_is_tracked():
    assert not [relative(path) for path in tracked() if path.stat().st_size > 2_000_000]


def test_workflow_runs_the_pairs_of_the_ci_script():
    script, workflow = (ROOT / ".ci" / "run").read_text(), (ROOT / ".github/workflows/ci.yml").read_text()
    (pairs,) = re.findall(r"^PAIRS=\((.*?)\)", script, re.MULTILINE)
    ours = re.findall(r'"(\S+) (\S+)"', pairs)
    assert re.findall(r'python: "(\S+)", jax: "(\S+)"', workflow) == ours and len(ours) > 2


def test_hooks_lint_with_the_version_of_the_dev_extra():
    (version,) = [each for each in PROJECT["optional-dependencies"]["dev"] if each.startswith("ruff")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r'"(ruff\S+)"', hooks)) == {version}
