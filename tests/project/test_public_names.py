"""The names that `mac` offers: all exist, type checkers see the same, and importing it is cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mac

SOURCE = Path(mac.__file__ or "")


@pytest.mark.parametrize("name", mac.__all__)
def test_public_name_is_that_of_its_module(name: str):
    value = getattr(mac, name)
    assert value is getattr(importlib.import_module(mac._MODULE[name]), name) and name in dir(mac)


def test_type_checkers_see_the_same_names():
    """From the same modules as Python imports them."""
    found = {
        alias.name: node.module
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mac.")
        for alias in node.names
    }
    assert found == mac._MODULE and sorted(found) == sorted(mac.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mac.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_import_alone_does_not_import_jax():
    script = "import mac, sys; assert 'jax' not in sys.modules; mac.MAC; assert 'jax' in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=SOURCE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
