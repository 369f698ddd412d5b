"""The examples in the docstrings run, and every curvature has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hesse.constraints
import hesse.curvature
import hesse.solvers
from hesse.curvature import Curvature

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    module.name
    for package in (hesse.curvature, hesse.constraints, hesse.solvers)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.ispkg
]
CURVATURES = [
    value for value in vars(hesse.curvature).values() if inspect.isclass(value) and issubclass(value, Curvature)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name: str) -> None:
    module = importlib.import_module(name)
    names = {key: value for p in (hesse.curvature, hesse.constraints, hesse.solvers) for key, value in vars(p).items()}
    result = doctest.testmod(module, extraglobs=names, optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize("curvature", [c for c in CURVATURES if c is not Curvature], ids=lambda c: c.__name__)
def test_every_curvature_shows_an_example(curvature: type) -> None:
    assert ">>> " in inspect.getdoc(curvature)
