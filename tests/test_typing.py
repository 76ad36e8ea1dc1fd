"""Annotations: mypy --strict lets right uses of the package pass and names wrong ones, and all that is public is annotated."""

import ast
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from test_dispatch import ROOT

import fastnorm
from fastnorm import activations, dispatch, nn, options, recompute, settings, sync

# A line that ends in `# error: x` is to be reported with the code x, and no other line at all.
PROGRAM = """
import torch
from torch import Tensor

import fastnorm
from fastnorm.activations import Activation

end: Activation = ("leaky_relu", 0.2)
x, weight = torch.randn(4, 3, 8), torch.ones(8)
y: Tensor = fastnorm.layer_norm(x, [8], weight, activation=end, residual=x, lengths=torch.tensor([1, 2, 3, 3]))
y = fastnorm.rms_norm(x, x.shape[-1:], eps=None, recompute="output")
y = fastnorm.batch_norm(x, None, None, training=True, activation="gelu")
y, h = fastnorm.add_layer_norm(x, y, (8,), dropout=0.1, residual_in_fp32=True)
h = fastnorm.group_norm(fastnorm.instance_norm(h), 3, activation="silu")
h = fastnorm.ghost_batch_norm(h, None, None, training=True, virtual_batch_size=2)
h = fastnorm.channels_first_layer_norm(h)
y, h = fastnorm.functional.add_rms_norm(y, h, (8,), row_scale=torch.ones(4))
h = fastnorm.modulated_layer_norm(h, (8,), x, x)
norm = fastnorm.LayerNorm(8, activation=("elu", 1), dtype=torch.bfloat16, device="cpu")
rows: Tensor = norm.forward(x, mask=torch.ones(4, 3, dtype=torch.bool))
stream = fastnorm.AddRMSNorm((3, 8), drop_path=0.1, layer_scale=1e-5, zero_centred=True)
y, h = stream.forward(x, x)
model = torch.nn.Sequential(
    fastnorm.BatchNorm1d(8, momentum=None, frozen=True, recompute="output"),
    fastnorm.BatchNorm2d(8, channel_axis=-1, virtual_batch_size=32),
    fastnorm.GroupNorm(4, 8, activation="tanh", bias=False),
    fastnorm.SyncBatchNorm(8, process_group=None),
    fastnorm.LayerNorm2d(96, activation="gelu_tanh"),
    fastnorm.InstanceNorm3d(8, affine=True),
    fastnorm.ModulatedLayerNorm(8, elementwise_affine=False),
)
names: dict[str, type] = fastnorm.convert(model).changed
model = fastnorm.fold(model.eval())
rules: list[str] = [finding.rule for finding in fastnorm.lint(model, batch_size=8, input=x)]
first: str = fastnorm.lint(model)[0].wrong
with fastnorm.use_backend("native"), fastnorm.config.patch(compile="fastnorm"):
    fastnorm.config.autocast_keeps_dtype = True
version: str = fastnorm.__version__

fastnorm.layer_norm(x)  # error: call-arg
fastnorm.layer_norm(x, 8)  # error: arg-type
fastnorm.layer_norm(x, (8,), activation="swish")  # error: arg-type
fastnorm.layer_norm(x, (8,), activation=("relu", 0.5))  # error: arg-type
fastnorm.layer_norm(x, (8,), activation=torch.relu)  # error: arg-type
fastnorm.layer_norm(x, (8,), None, None, 1e-5, "relu")  # error: misc
fastnorm.layer_norm(x, (8,), recompute=True)  # error: arg-type
fastnorm.layer_norm(x, (8,)).no_such_method()  # error: attr-defined
fastnorm.batch_norm(x, weight, weight, training="yes")  # error: arg-type
fastnorm.ghost_batch_norm(x, None, None, training=True)  # error: call-arg
fastnorm.group_norm(x, 2.0)  # error: arg-type
z: Tensor = fastnorm.add_layer_norm(x, x, (8,))  # error: assignment
fastnorm.LayerNorm(8, activation="swish")  # error: arg-type
fastnorm.LayerNorm("8")  # error: arg-type
fastnorm.RMSNorm(8, bias=True)  # error: call-arg
fastnorm.AddLayerNorm(8, dropout="0.1")  # error: arg-type
fastnorm.AddLayerNorm(8).forward(x)  # error: call-arg
fastnorm.BatchNorm2d()  # error: call-arg
fastnorm.BatchNorm2d(8, virtual_batch_size=0.5)  # error: arg-type
fastnorm.GroupNorm(8)  # error: call-arg
fastnorm.SyncBatchNorm(8, activation="relu")  # error: call-arg
fastnorm.convert([model])  # error: arg-type
fastnorm.fold("model")  # error: type-var
fastnorm.lint(model, batch_size="8")  # error: arg-type
fastnorm.use_backend("cuda")  # error: arg-type
fastnorm.config.compile = "inductor"  # error: assignment
fastnorm.norms  # error: attr-defined
"""


def test_mypy_knows_right_uses_from_wrong_ones(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--no-error-summary",
        "--hide-error-context",
    ]
    command += ["--python-version=3.10", "--config-file=", "--cache-dir=/dev/null", str(program)]
    path = {} if ROOT.name.endswith("-packages") else {"MYPYPATH": str(ROOT)}  # an editable install is none that mypy finds
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | path, check=False)
    found = re.findall(r"^program\.py:(\d+): error: .*\[([a-z-]+)\]$", run.stdout, re.MULTILINE)
    lines = enumerate(PROGRAM.splitlines(), 1)
    expected = [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error: " in line]
    assert found == expected, run.stdout + run.stderr


def public():
    """(name, function) of all that a user calls: functions, and methods of our classes that their bases do not have."""
    for name in fastnorm.__all__:
        thing = getattr(fastnorm, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            own = (cls for cls in thing.__mro__ if cls.__module__.startswith("fastnorm."))
            found = {method: f for cls in own for method, f in vars(cls).items() if inspect.isfunction(f)}
            yield from ((f"{name}.{method}", f) for method, f in found.items() if not hasattr(f, "__wrapped__"))


@pytest.mark.parametrize(("name", "function"), [pytest.param(name, f, id=name) for name, f in public()])
def test_annotations_are_whole_and_can_be_evaluated(name, function):
    parameters = list(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function)
    assert set(hints) == {*parameters, "return"} - {"self", "cls"}


def declared():
    """name of a class, and its constructor as it is declared for those who check types alone."""
    for module in (options, nn, sync):
        for cls in ast.walk(ast.parse(Path(module.__file__).read_text())):
            for f in ast.walk(cls) if isinstance(cls, ast.ClassDef) else ():
                if isinstance(f, ast.FunctionDef) and f.name == "__init__" and ast.unparse(f.body) == "...":
                    namespace = dict(vars(module))
                    exec(compile(ast.Module([f], []), module.__file__, "exec"), namespace)
                    yield cls.name.removeprefix("Torch"), namespace["__init__"]


def parameters_of(cls):
    """Those of its constructor, with those that it passes on to the class that it stands before."""
    own = dict(inspect.signature(cls.__init__).parameters)
    if "args" not in own:
        return own
    passed_on = inspect.signature(cls.__mro__[2].__init__).parameters
    return {name: p for name, p in (passed_on | own).items() if name not in ("args", "kwargs", "recompute")}


def test_declared_constructors_are_those_of_the_classes():
    """Names, kinds, defaults, and the order of what has one. `bias` of some is younger than the oldest torch that is served."""
    classes = {"BatchNormMixin": (fastnorm.BatchNorm1d, fastnorm.BatchNorm2d, fastnorm.BatchNorm3d)}
    seen = []
    for name, init in declared():
        for cls in classes.get(name) or [getattr(fastnorm, name)]:
            seen.append(cls.__name__)
            theirs, ours = parameters_of(cls), dict(inspect.signature(init).parameters)
            if "bias" not in theirs and name in ("BatchNormMixin", "GroupNorm", "SyncBatchNorm"):
                del ours["bias"]
            about = [[(p.name, p.kind, p.default) for p in ps.values()] for ps in (ours, theirs)]
            order = [[p[0] for p in ps if p[1] is not inspect.Parameter.KEYWORD_ONLY] for ps in about]
            assert sorted(map(str, about[0])) == sorted(map(str, about[1])), cls
            assert order[0] == order[1], cls
    rows = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
    assert sorted(seen) == sorted([*rows, "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "SyncBatchNorm"])


def test_names_for_type_checkers_are_those_of_the_tables():
    assert typing.get_args(activations.Name) == tuple(activations.ACTIVATIONS)
    with_number = typing.get_args(typing.get_args(activations.Activation)[1])[0]
    assert typing.get_args(with_number) == tuple(name for name, f in activations.ACTIVATIONS.items() if f.alpha)
    assert typing.get_args(dispatch.Name) == dispatch.NAMES
    hints = typing.get_type_hints(settings.Config)
    assert typing.get_args(hints["compile"]) == settings._CHOICES["compile"]
    assert list(hints) == list(settings._CHOICES)
    for value in typing.get_args(recompute.Recompute):
        recompute.check(value, None)
