"""The table of what PyTorch does with a norm layer: FEATURES x MODULES, each cell run on a backend by test_features.py.

Layer norm and batch norm, the MODULES, have every feature. The OTHERS have those that could differ: they share the machinery.

A feature is a program over a module and an input, which is run on ours and on torch.nn's twin with the same state: results,
their strides and dtypes, and the state afterwards have to agree, or both have to raise the same exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastnorm

from .columns import COLUMNS

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Module:
    """A column of the table. Torch's SyncBatchNorm refuses CPU tensors: its twin is the batch norm that it falls back to."""

    name: str
    ours: Callable
    theirs: Callable
    args: tuple
    shape: tuple[int, ...]
    training: bool = True
    strides: bool = True  # ours are torch.nn's; a sequence lays out its results as its last operator does

    def twins(self, device, dtype=F32, **kwargs):
        """Ours and torch.nn's with the same random state."""
        theirs = self.theirs(*self.args, device=device, dtype=dtype, **kwargs)
        generator = torch.Generator().manual_seed(len(self.name))
        for name, t in theirs.state_dict().items():
            if t.is_floating_point():
                value = torch.rand(t.shape, generator=generator, dtype=F64)
                t.copy_(value + 0.5 if name == "running_var" else value * 2 - 0.7)
        ours = self.ours(*self.args, device=device, dtype=dtype, **kwargs)
        ours.load_state_dict(theirs.state_dict())
        return ours.train(self.training), theirs.train(self.training)

    def input(self, device, dtype=F32):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator, dtype=F64) * 2 + 1
        return x.to(dtype).to(device).requires_grad_()


def _modules():
    yield Module("LayerNorm", fastnorm.LayerNorm, torch.nn.LayerNorm, (6,), (4, 6))
    yield Module("LayerNorm-2-dims", fastnorm.LayerNorm, torch.nn.LayerNorm, ([3, 4],), (3, 3, 4))
    yield Module("BatchNorm1d-with-length-training", fastnorm.BatchNorm1d, torch.nn.BatchNorm1d, (3,), (4, 3, 2))
    batch_norms = [("BatchNorm1d", (6, 3)), ("BatchNorm2d", (3, 3, 2, 3)), ("BatchNorm3d", (3, 3, 2, 1, 2))]
    if hasattr(fastnorm, "SyncBatchNorm"):
        batch_norms.append(("SyncBatchNorm", (3, 3, 2, 3)))
    for name, shape in batch_norms:
        theirs = torch.nn.BatchNorm2d if name == "SyncBatchNorm" else getattr(torch.nn, name)
        for training in (True, False):
            yield Module(
                f"{name}-{'training' if training else 'evaluation'}", getattr(fastnorm, name), theirs, (3,), shape, training
            )


MODULES = tuple(_modules())
OTHERS = tuple(Module(*column, strides=False) for column in COLUMNS)


def never(m, x):
    return False


def always(m, x):
    return True


def batch_norm(m):
    return isinstance(m, torch.nn.modules.batchnorm._BatchNorm)


def updates(m, x=None):
    """A batch norm that updates running statistics."""
    return batch_norm(m) and m.training


def by_cudnn(m, x):
    """A batch norm that torch hands to cudnn: on a GPU most of three or more dimensions, none of two."""
    if not batch_norm(m):
        return False
    tensors = (x, m.weight, m.bias, m.running_mean, m.running_var)
    return torch._C._select_batch_norm_backend(*tensors, m.training, m.eps) == torch._C._BatchNormBackend.Cudnn


@dataclass(frozen=True)
class Feature:
    name: str
    run: Callable
    dtype: torch.dtype
    refused: Callable  # of torch's module and its input: whether torch.nn itself raises, and ours has to raise the same
    beyond: bool  # torch.nn cannot: the check itself says what is right
    columns: Callable  # of one of MODULES: whether there is such a cell
    others: Callable  # the same of one of OTHERS
    heavy: bool  # many calls


FEATURES: list[Feature] = []


def any_column(column):
    return True


def with_a_twin(column):
    """Not where torch.nn.SyncBatchNorm itself differs from the batch norm that stands in for it here."""
    return not column.name.startswith("SyncBatchNorm")


def no_column(column):
    return False


every = any_column


def without(*names):
    """Not where the sequence of operators, or torch itself, is another thing."""
    return lambda column: column.name not in names


def feature(dtype=F32, refused=never, name=None, columns=any_column, heavy=False, others=no_column):
    """Registers program(module, x) -> results, which are torch.nn's."""

    def register(run):
        FEATURES.append(Feature(name or run.__name__.replace("_", " "), run, dtype, refused, False, columns, others, heavy))
        return run

    return register


def beyond(name=None, heavy=False, others=no_column):
    """Registers check(column, device): what fastnorm does and torch.nn does not."""

    def register(run):
        FEATURES.append(Feature(name or run.__name__.replace("_", " "), run, F32, never, True, any_column, others, heavy))
        return run

    return register


# Triton's interpreter takes tens of milliseconds for a call: these columns there, and those for what makes many calls.
EMULATED = ("LayerNorm", "BatchNorm1d-training", "BatchNorm1d-evaluation", "BatchNorm2d-training", "BatchNorm3d-training")
EMULATED = (*EMULATED, "SyncBatchNorm-training")
EMULATED_HEAVY = ("LayerNorm", "BatchNorm1d-training")


def cells(served):
    """(backend, device), feature, module: the table."""
    for backend, device in served:
        emulated = backend.name == "triton" and device == "cpu"
        for module in MODULES:
            for f in FEATURES:
                if f.columns(module) and (not emulated or module.name in (EMULATED_HEAVY if f.heavy else EMULATED)):
                    yield (backend, device), f, module
        # What is theirs is Python's, and test_fused_calls.py has their values on every backend.
        for module in OTHERS if (backend.name, device) == ("native", "cpu") else ():
            yield from (((backend, device), f, module) for f in FEATURES if f.others(module))


def cotangent(y):
    """A gradient of y's shape, the same for both twins."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator, dtype=F64).to(y.dtype).to(y.device)


def leaves(m, x):
    return [x, *m.parameters()]


def gradients(m, x, y, dy=None, **kwargs):
    return torch.autograd.grad(y, leaves(m, x), cotangent(y) if dy is None else dy, **kwargs)


def emulated(x):
    """Triton's interpreter is at work."""
    return x.device.type == "cpu" and fastnorm.dispatch.select("cpu").__name__ == "fastnorm.kernels"
