"""`fastnorm.convert(model)` and `fastnorm.revert(model)`: the class of each norm changes, the object stays.

So parameters, buffers, hooks, modes, tied weights, shared modules, and the optimizers and averages that hold on to them, stay.
A subclass gets a class of its own, made from it and from ours: where its method resolution order reached torch.nn's `forward`,
it now reaches ours, and nothing else is different. `torch_class.forward` and ours give the same result, so this is right for
every subclass; but one that has a forward of its own is left alone, because nothing says that it gets to torch.nn's.
"""

from __future__ import annotations

import abc
import copyreg
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import known
from .nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from .sync import SyncBatchNorm
from .tracing import counterpart, extras

_NEWOBJ: Any = vars(copyreg)["__newobj__"]
BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
CLASSES = (LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, *BATCH_NORMS)
OURS = {counterpart(cls): cls for cls in CLASSES}
NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm, _BatchNorm, _InstanceNorm)


@dataclass(frozen=True)
class Skipped:
    """A norm that was left alone: its name in the model, its class and the reason."""

    name: str
    cls: type
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({_label(self.cls)}): {self.reason}"


@dataclass(frozen=True, repr=False)
class Report:
    """What `convert` or `revert` did; `print` it.

    Attributes:
        changed: name in the model -> the class (of torch.nn or of a library) that was, or is again, the module's.
        unchanged: how many norms were what they should be already.
        skipped: the norms that were left alone, each with the reason.
    """

    action: str
    changed: dict[str, type]
    unchanged: int
    skipped: tuple[Skipped, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many modules changed, per class."""
        return Counter(map(_label, self.changed.values()))

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        parts = [f"{len(self.changed)} {self.action}{f' ({kinds})' if kinds else ''}"]
        if self.unchanged:
            parts.append(f"{self.unchanged} already {self.action}")
        if self.skipped:
            parts.append(f"{len(self.skipped)} left alone:")
        return "\n  ".join((", ".join(parts), *map(str, self.skipped)))

    __repr__ = __str__


def convert(model: nn.Module) -> Report:
    """Make every norm of `model` fastnorm's, in place: torch.nn's LayerNorm, RMSNorm, GroupNorm,
    InstanceNorm1d/2d/3d, BatchNorm1d/2d/3d and SyncBatchNorm, and subclasses of them.

    A subclass is changed when it has torch.nn's forward, or one that fastnorm knows (`fastnorm.known`: torchvision's, timm's
    and transformers'); otherwise it is left alone and named in the report. So is a module whose forward was replaced on the
    instance (accelerate's hooks, kernelize), one that fully_shard wraps (convert first), and scripted, quantised and lazy ones.
    Modules stay the same objects; a model that is compiled already compiles once more; converting twice changes nothing.
    `torch.ao.quantization` fuses by exact type: `fastnorm.revert(model)` first.

    Args:
        model: any torch.nn.Module; it may itself be a norm.

    Returns:
        A `Report`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))
    >>> convert(model)
    2 converted (1 torch.nn.LayerNorm, 1 torch.nn.BatchNorm1d)
    >>> type(model[1]).__module__
    'fastnorm.nn'
    """
    return _change(model, "converted", _served)


def revert(model: nn.Module) -> Report:
    """Give every norm of `model` the class it had before `convert`, in place; `fastnorm.LayerNorm` is torch.nn.LayerNorm then.

    Args:
        model: any torch.nn.Module; it may itself be a norm.

    Returns:
        A `Report`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.

    >>> model = nn.Sequential(LayerNorm(8), LayerNorm(8, activation="relu"))
    >>> revert(model)
    1 reverted (1 torch.nn.LayerNorm), 1 left alone:
      1 (fastnorm.nn.LayerNorm): has an option that torch.nn's has not: activation
    """
    return _change(model, "reverted", _original)


def _change(model: nn.Module, action: str, goal: Callable[[nn.Module, type], type | str | None]) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is {action} in place, not an object of type {type(model).__name__}")
    changed: dict[str, type] = {}
    skipped: list[Skipped] = []
    unchanged = 0
    for name, module in model.named_modules():
        cls = type_before_parametrizations(module) if isinstance(module, NORMS) else type(module)
        new = goal(module, cls)
        if isinstance(new, str):
            skipped.append(Skipped(name, type(module), new))
        elif new is cls:
            unchanged += 1
        elif new is not None:
            _become(module, new)
            changed[name] = counterpart(cls)
    return Report(action, changed, unchanged, tuple(skipped))


def _become(module: nn.Module, new: type) -> None:
    cls: Any = type(module)
    if is_parametrized(module):
        # torch made a class for this module, which its deep copies share: they are not ours to change.
        members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        new = type(cls)(cls.__name__, (new,), members)
    module.__class__ = new


def _served(module: nn.Module, cls: type) -> type | str | None:
    """The class of ours for a module of class `cls`, a reason to leave it alone, or None if it is no norm."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit" if module.original_name in {c.__name__ for c in OURS} else None
    if not isinstance(module, NORMS):
        return None
    if isinstance(module, CLASSES):
        return cls
    if options := extras(module):
        return f"has an attribute that fastnorm's norms would take for an option: {', '.join(options)}"
    return _reason_against(module) or OURS.get(cls) or known.refusal(module) or _subclass(cls)


def _original(module: nn.Module, cls: type) -> type | str | None:
    """The same for the way back."""
    if not isinstance(module, NORMS):
        return None
    if not isinstance(module, CLASSES):
        return cls
    if counterpart(cls) is cls and not _wrapped(module):
        return "is a subclass of fastnorm's class"
    if options := extras(module):
        return f"has an option that torch.nn's has not: {', '.join(options)}"
    return _reason_against(module) or counterpart(cls)


def _wrapped(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _reason_against(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if _wrapped(module):
        return "is wrapped by fully_shard, which comes after the conversion"
    if isinstance(module, LazyModuleMixin):
        return "is lazy: convert after the first call"
    return None


def _subclass(cls: Any) -> type | str:
    """The class made of `cls` and ours, or the reason why there is none."""
    torch_class = next((base for base in cls.__mro__ if base in OURS), None)
    if torch_class is None:
        return "fastnorm has no such norm"
    if cls.forward is not torch_class.forward and not known.knows(cls.forward):
        return "has a forward of its own"
    if type(cls) not in (type, abc.ABCMeta) or any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1]):
        return "its class takes notice of subclasses, and converting makes one"
    return _made_of(cls, OURS[torch_class])


@functools.cache
def _made_of(cls: Any, ours: type) -> type:
    """A subclass that goes by the name of `cls`, under which pickle would find only `cls`: so it is made anew when loaded."""

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
        make, arguments, *rest = super(made, self).__reduce_ex__(max(protocol, 2))
        return (_new, (cls, *arguments[1:]), *rest) if make is _NEWOBJ else (make, arguments, *rest)

    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"_stands_for": cls, "__reduce_ex__": __reduce_ex__}
    if forward := known.replacement(cls.forward):
        members["forward"] = forward
    made = type(cls)(cls.__name__, (cls, ours), members)
    return made


def _new(cls: Any, *arguments: Any) -> Any:
    made = _subclass(cls)
    return cls.__new__(made if isinstance(made, type) else cls, *arguments)


def _label(cls: type) -> str:
    return f"torch.nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.modules.") else known.name_of(cls)
