"""Classes are abstract or final, and a method with a body is overridden only where it says that it is a hook.

So whoever reads a class knows what runs: the method of the class itself, or the one that it inherits.
"""

import abc
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import baselines
import mac
from mac.config import CommonConfig

DECLARATIONS = {"__module__", "__doc__", "__annotations__", "__dict__", "__weakref__"}
"""What the namespace of a class holds that has neither methods nor values."""
SPECIAL = "__"
"""What methods begin with that Python or Equinox call; each class has its own."""


def found() -> Iterator[type[Any]]:
    """Every class of the two packages."""
    for package in (mac, baselines):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name:
                    yield value


CLASSES = sorted(set(found()), key=lambda cls: (cls.__module__, cls.__qualname__))


def bases(cls: type[Any]) -> list[type[Any]]:
    """The class and those of ours that it inherits from, in the order of resolution."""
    return [base for base in cls.__mro__ if base in CLASSES]


def name_of(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def may_have_subclasses(cls: type[Any]) -> bool:
    """Whether it is abstract, in methods or in fields, or only declares fields or names: hyperparameters."""
    declares = issubclass(cls, CommonConfig | Exception) or vars(cls).keys() <= DECLARATIONS
    return inspect.isabstract(cls) or bool(getattr(cls, "__abstractvars__", ())) or declares


def overridden(cls: type[Any]) -> Iterator[tuple[str, list[type[Any]]]]:
    """Names of methods with the classes that give them a body, where there are several; the default last."""
    for name in vars(cls):
        owners = [base for base in bases(cls) if name in vars(base) and has_body(vars(base)[name])]
        if len(owners) > 1 and owners[0] is cls and not name.startswith(SPECIAL):
            yield name, owners


def has_body(member: Any) -> bool:
    kinds = (property, classmethod, staticmethod)
    function = inspect.isroutine(member) or isinstance(member, kinds) or hasattr(member, "__wrapped__")
    return function and not getattr(member, "__isabstractmethod__", False)


def faults(cls: type[Any]) -> list[str]:
    wrong = []
    for base in bases(cls)[1:]:
        if not may_have_subclasses(base):
            wrong.append(f"{name_of(base)} is concrete")
    for name, owners in overridden(cls):
        default = vars(owners[-1])[name]
        if len(owners) > 2:
            wrong.append(f"{name} has several defaults: {[name_of(owner) for owner in owners[1:]]}")
        elif not (inspect.getdoc(default) or "").startswith("Hook: "):
            wrong.append(f"{name} of {name_of(owners[-1])} is no hook")
    return wrong


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_class_is_abstract_or_final(cls: type[Any]):
    assert not faults(cls)


class AbstractShape(abc.ABC):
    """Rules must catch what they forbid."""

    @abc.abstractmethod
    def area(self) -> float: ...

    def color(self) -> str:
        """Hook: the color; by default black."""
        return "black"

    def name(self) -> str:
        """The name."""
        return "shape"


class Square(AbstractShape):
    def area(self) -> float:
        return 1.0

    def color(self) -> str:
        return "red"


class Renamed(Square):
    def name(self) -> str:
        return "renamed"

    def color(self) -> str:
        return "blue"


def test_rules_catch_what_they_forbid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", [AbstractShape, Square, Renamed])
    assert not faults(Square)
    concrete, name, color = sorted(faults(Renamed), key=len)
    assert "Square is concrete" in concrete and "AbstractShape is no hook" in name
    assert color.startswith("color has several defaults")
