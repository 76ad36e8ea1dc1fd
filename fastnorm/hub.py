"""Registration with Hugging Face's `kernels` package, whose `kernelize(model)` replaces forwards by those of registered layers.

Nothing is fetched: the layers are here. `fastnorm.convert(model)` does the same and more; this is for code that kernelizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .nn import batch_norm_forward, layer_norm_forward

DEVICES = ("cpu", "cuda")
# Forwards with torch's own arguments, which need nothing of the module but what torch.nn's class has.
SERVED = {
    torch.nn.LayerNorm: layer_norm_forward,
    torch.nn.BatchNorm1d: batch_norm_forward,
    torch.nn.BatchNorm2d: batch_norm_forward,
    torch.nn.BatchNorm3d: batch_norm_forward,
}


@dataclass(frozen=True)
class _Layer:
    """What `kernels` takes for a repository: something that is hashable, can be loaded and has a name."""

    name: str
    layer: type

    def load(self) -> type:
        return self.layer

    def __str__(self) -> str:
        return f"fastnorm.{self.name}"


def register() -> None:
    """Let `kernels.kernelize` replace the forward of torch.nn.LayerNorm and torch.nn.BatchNorm1d/2d/3d by fastnorm's.

    Only modules of exactly these classes are replaced; a subclass, which may have a forward of its own, is not. It stays
    so for the whole process, also for models that exist already. Modules that fastnorm made or converted are left as they are.

    Raises:
        ImportError: the package `kernels` is not installed.
    """
    import kernels

    for cls, forward in SERVED.items():
        # kernelize wants layers without state and without other methods.
        members = {"forward": forward, "can_torch_compile": True, "__module__": __name__}
        layer = _Layer(cls.__name__, type(cls.__name__, (torch.nn.Module,), members))
        kernels.register_kernel_mapping({layer.name: dict.fromkeys(DEVICES, layer)})
        kernels.replace_kernel_forward_from_hub(cls, layer.name, condition=_exactly(cls))


def _exactly(cls: type) -> Callable[[torch.nn.Module], bool]:
    return lambda module: type(module) is cls
