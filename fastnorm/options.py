"""What our modules have beside torch.nn's: keyword-only options, and a short way to their parameters.

For those who check types, the classes of torch.nn that they are made of are here with the constructors that they get.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.types import Device

from . import activations, ghost
from . import recompute as anew
from .activations import Activation
from .recompute import Recompute
from .tracing import OPTIONS, extras

KINDS = ("addend", "modulated", "channels_first")  # what a forward of its own makes of a LayerNorm or RMSNorm

C = TypeVar("C", bound=type)

if TYPE_CHECKING:

    class TorchLayerNorm(torch.nn.LayerNorm):
        def __init__(
            self,
            normalized_shape: int | Sequence[int],
            eps: float = 1e-5,
            elementwise_affine: bool = True,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            activation: Activation | None = None,
            recompute: Recompute | None = None,
        ) -> None: ...

    class TorchRMSNorm(torch.nn.RMSNorm):
        def __init__(
            self,
            normalized_shape: int | Sequence[int],
            eps: float | None = None,
            elementwise_affine: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            zero_centred: bool = False,
            activation: Activation | None = None,
            recompute: Recompute | None = None,
        ) -> None: ...

    class TorchGroupNorm(torch.nn.GroupNorm):
        def __init__(
            self,
            num_groups: int,
            num_channels: int,
            eps: float = 1e-5,
            affine: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            bias: bool = True,
            activation: Activation | None = None,
        ) -> None: ...

    class BatchNormMixin(torch.nn.modules.batchnorm._BatchNorm):
        def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            bias: bool = True,
            activation: Activation | None = None,
            channel_axis: int = 1,
            frozen: bool = False,
            virtual_batch_size: int | None = None,
            recompute: Recompute | None = None,
        ) -> None: ...

    class InstanceNormMixin(torch.nn.modules.instancenorm._InstanceNorm): ...

    class Mixin(torch.nn.Module): ...

else:
    TorchLayerNorm, TorchRMSNorm, TorchGroupNorm = torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm
    Mixin = BatchNormMixin = InstanceNormMixin = object  # they stand before torch.nn's classes


def with_options(*names: str) -> Callable[[C], C]:
    """A class decorator: torch.nn's constructor with keyword-only options, which become attributes; the class has defaults.

    What it makes of the constructors is declared above: who checks types does not see through it.
    """

    def decorate(cls: Any) -> Any:
        theirs = cls.__init__
        signature = inspect.signature(theirs)
        keyword = lambda name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(cls, name))

        @functools.wraps(theirs)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in names if name in kwargs}
            activations.parse(given.get("activation"))
            if given.get("virtual_batch_size") is not None:
                ghost.check(given["virtual_batch_size"])
            if given.get("recompute") is not None:
                if any(getattr(self, kind, False) for kind in KINDS):
                    raise ValueError(f"{type(self).__name__} keeps its input: it has no recompute={given['recompute']!r}")
                anew.check(given["recompute"], given.get("activation"), virtual_batch_size=given.get("virtual_batch_size"))
            for name, value in given.items():  # before torch's constructor resets the parameters, which may depend on them
                object.__setattr__(self, name, value)
            theirs(self, *args, **kwargs)

        cls.__init__ = __init__
        cls.__init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *map(keyword, names)])
        return cls

    return decorate


class Options(Mixin):
    """Options that torch.nn's classes do not have, and how they are shown."""

    activation: Activation | None = OPTIONS["activation"]
    zero_centred: bool = OPTIONS["zero_centred"]
    channel_axis: int = OPTIONS["channel_axis"]
    frozen: bool = OPTIONS["frozen"]
    virtual_batch_size: int | None = OPTIONS["virtual_batch_size"]
    recompute: Recompute | None = OPTIONS["recompute"]

    def extra_repr(self) -> str:
        given = [f"{name}={getattr(self, name)!r}" for name in extras(self) if name in vars(self)]
        return ", ".join([super().extra_repr(), *given])


def affine_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """weight, bias. `Module.__getattr__` costs 0.8 us for each; it is for what is no plain parameter (parametrized, pruned)."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return module.weight, module.bias
