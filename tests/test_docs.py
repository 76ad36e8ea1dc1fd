"""The reference is what stands in docstrings: each public name has one, and its examples are run."""

import doctest
import importlib.util
import inspect
import os
import re

import pytest
import torch
from test_dispatch import ROOT

import fastnorm

os.environ.setdefault("KERAS_BACKEND", "torch")

NAMES = [name for name in fastnorm.__all__ if name not in ("__version__", "functional")]
# What torch has nothing like.
ALONE = ("config", "convert", "lint", "revert", "use_backend")


def docstring(name):
    return inspect.getdoc(getattr(fastnorm, name)) or ""


def test_every_public_name_is_told_of():
    told = [name for name in NAMES if "Equivalent to: " in docstring(name)]
    assert sorted({*NAMES} - {*told}) == sorted(ALONE)
    assert {*fastnorm.functional.__all__} < {*NAMES}


@pytest.mark.parametrize("name", [name for name in NAMES if name.islower() and name not in (*ALONE, "fold", "from_keras")])
def test_functions_say_what_they_take_and_raise(name):
    """By the names of their parameters; one that is another's says so."""
    function, text = getattr(fastnorm, name), docstring(name)
    assert ".. math::" in text
    if "whose arguments, results and errors it has" in text:
        return
    assert all(section in text for section in ("Args:\n", "Returns:\n", "Raises:\n"))
    arguments = text.partition("Args:\n")[2].partition("Returns:\n")[0]
    named = [line.partition(":")[0] for line in arguments.splitlines() if re.match(r" {4}\S", line)]
    assert sorted(p for line in named for p in line.strip().split(", ")) == sorted(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    thing = getattr(fastnorm, name)
    thing = thing if callable(thing) else type(thing)  # fastnorm.config is an object
    if name == "from_keras" and importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not installed: pip install keras")
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, extraglobs={"torch": torch})
    assert sum(len(example.examples) for example in examples) > 0
    for example in examples:
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0  # what differs is in the captured output


@pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").is_file(), reason="only a checkout has it")
def test_the_house_is_drawn_as_it_stands():
    """Every module has its place in CONTRIBUTING.md, and every path in there is one of a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    house = text.split("```")[1]
    assert not [p.name for p in ROOT.glob("fastnorm/*.py") if p.name not in house and not p.name.startswith("heuristics_")]
    paths = re.findall(r"`((?:fastnorm|kernels|csrc|tests)/[\w./*]+)`", text)
    assert len(paths) > 10
    assert not [path for path in paths if not list(ROOT.glob(path))]


@pytest.mark.skipif(not (ROOT / "CHANGELOG.md").is_file(), reason="only a checkout has it")
def test_the_version_has_its_changes():
    assert f"\n## [{fastnorm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
