"""Layers: what each part of the project may import, read from the source, so that no import can hide."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mac", "envs_mjx", "baselines", "experiments")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

BASICS = ("mac.types", "mac.errors", "mac.target_platform", "mac.batch_axis")
ON_DISK = (*BASICS, "mac.atomic_files", "mac.cgroup_limits", "mac.formatting")
NETWORKS = (*BASICS, "mac.nn", "mac.ops")
LOSSES = (*NETWORKS, "mac.algorithm", "mac.config")
"""Of what learns by a loss of networks."""

# What a module may import of ours, by the longest matching prefix of its own name. A package may always
# import from itself, except where it is listed in `APART`.
ALLOWED = {
    "mac": (),
    "mac.errors": (),
    "mac.formatting": (),
    "mac.types": (),
    "mac.target_platform": (),
    "mac.batch_axis": (),
    "mac.atomic_files": ("mac.errors",),
    "mac.free_memory": ("mac.cgroup_limits", "mac.card_memory"),
    "mac.card_memory": (),
    "mac.cgroup_limits": (),
    "mac.plugins": ("mac.errors",),
    "mac.nn": BASICS,
    "mac.ops": BASICS,
    "mac.algorithm": (*NETWORKS, "mac.config"),
    "mac.config": BASICS,
    "mac.chunk_dynamics": (*NETWORKS, "mac.config"),
    "mac.mac_diagnostics": (*NETWORKS, "mac.config", "mac.data", "mac.chunk_dynamics"),
    "mac.mac": (*LOSSES, "mac.mac_diagnostics", "mac.chunk_dynamics"),
    "mac.ablations": (*NETWORKS, "mac.config", "mac.mac"),
    "mac.ablations.dynamics_only": (*LOSSES, "mac.chunk_dynamics"),
    "mac.actor_critic": LOSSES,
    "mac.implicit_q": (*LOSSES, "mac.actor_critic"),
    "mac.model_based": (*LOSSES, "mac.data", "mac.mac_diagnostics", "mac.actor_critic", "mac.pretraining"),
    "mac.pretraining": NETWORKS,
    "mac.mbpo": (*LOSSES, "mac.data", "mac.model_based", "mac.actor_critic"),
    "mac.planning": (*LOSSES, "mac.data"),
    "mac.data": (*ON_DISK, "mac.free_memory"),
    "mac.run": (*ON_DISK, "mac.algorithm", "mac.data", "mac.nn.frozen", "mac.ops.replay"),
    "envs_mjx": (*ON_DISK, "mac.plugins"),
    "baselines": (
        *LOSSES,
        "mac.data",
        "mac.mac",
        "mac.ablations",
        "mac.actor_critic",
        "mac.implicit_q",
        "mac.model_based",
        "mac.mbpo",
        "mac.planning",
        "mac.plugins",
    ),
    "experiments": ("mac", "envs_mjx", "baselines"),
}
APART = ("mac", "mac.ablations", "baselines")
"""Whose modules are apart: only the `__init__.py` of `mac` and of `baselines` see all of them."""
FOREIGN = {
    "ogbench",
    "dm_control",
    "warp",
    "gymnasium",
}  # for tests only: heavy, and the peers we are measured by


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, in functions and under TYPE_CHECKING too."""
    name = name_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = ROOT.joinpath(*module.split("."), alias.name)
                known = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{module}.{alias.name}" if known else module


def may_import(name: str, target: str) -> bool:
    rule = max((prefix for prefix in ALLOWED if is_within(name, prefix)), key=len)
    if name in ("mac", "baselines") and is_within(target, name):
        return True  # `__init__.py`
    own = rule not in APART and is_within(target, rule)
    return own or any(is_within(target, allowed) for allowed in ALLOWED[rule])


def test_modules_import_only_lower_layers():
    wrong = {
        f"{name_of(path)} imports {target}"
        for path in FILES
        for target in imports(path)
        if target.split(".")[0] in PACKAGES and not may_import(name_of(path), target)
    }
    assert not wrong


def test_modules_import_no_reference_package():
    found = {name_of(path): {target.split(".")[0] for target in imports(path)} & FOREIGN for path in FILES}
    # A process of its own, for those who ask for the original environment; and an adapter, imported by name.
    assert {name: packages for name, packages in found.items() if packages} == {
        "experiments.ogbench_eval.worker": {"ogbench", "gymnasium"},
        "envs_mjx.gymnasium_env": {"gymnasium"},
    }


def jits(path: Path) -> list[int]:
    """Lines that name a `jit` of any kind."""
    tree = ast.parse(path.read_text())
    names = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id.endswith("jit")}
    return sorted(
        names | {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.endswith("jit")}
    )


def test_baselines_compile_nothing():
    """The training loop compiles; an algorithm is plain functions."""
    assert not [name_of(path) for path in FILES if is_within(name_of(path), "baselines") and jits(path)]


def test_only_the_loop_compiles():
    found = {name_of(path): len(jits(path)) for path in FILES if is_within(name_of(path), "mac")}
    # Copies to all hosts; init, prepare and segment; evaluate, a saved policy, the diagnosis, and the check
    # of states to be saved.
    assert {name: count for name, count in found.items() if count} == {
        "mac.run.mesh": 1,
        "mac.run.segment": 3,
        "mac.run.evaluate": 1,
        "mac.run.policy": 1,
        "mac.run.seed_diagnostics": 1,
        "mac.run.train": 1,
    }


def test_rules_are_for_modules_that_exist():
    known = {name_of(path) for path in FILES}
    named = {*ALLOWED, *APART, *(target for targets in ALLOWED.values() for target in targets)}
    assert named <= known


def test_rules_catch_what_they_forbid():
    assert not may_import("mac.nn.mlp", "mac.ops.flow")
    assert not may_import("mac.run.train", "mac.mac")
    assert not may_import("mac.run.train", "envs_mjx.base")
    assert not may_import("mac.mac", "mac.ablations.gaussian")
    assert not may_import("baselines.iql", "baselines.fql")
    assert not may_import("envs_mjx.manipulation.env", "mac.data.store")
    assert not may_import("mac.types", "experiments.run")
    assert may_import("baselines", "baselines.fql") and may_import("mac.run.train", "mac.run.io.logger")
