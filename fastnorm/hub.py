"""Registration with Hugging Face's `kernels` package, whose `kernelize(model)` replaces forwards by those of registered layers.

Nothing is fetched: the layers are here. `fastnorm.convert(model)` does the same and more; this is for code that kernelizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .convert import OURS

DEVICES = ("cpu", "cuda")
# The forward of SyncBatchNorm needs more of its class than kernelize takes along.
SERVED = {cls: ours for cls, ours in OURS.items() if cls is not torch.nn.SyncBatchNorm}


@dataclass(frozen=True)
class _Layer:
    """What `kernels` takes for a repository: something that is hashable, can be loaded and has a name."""

    name: str
    layer: type

    def load(self):
        return self.layer

    def __str__(self):
        return f"fastnorm.{self.name}"


def register():
    """Let `kernels.kernelize` replace the forward of torch.nn.LayerNorm and torch.nn.BatchNorm1d/2d/3d by fastnorm's.

    Only modules of exactly these classes are replaced; a subclass, which may have a forward of its own, is not. It stays
    so for the whole process, also for models that exist already. Modules that fastnorm made or converted are left as they are.

    Raises:
        ImportError: the package `kernels` is not installed.
    """
    import kernels

    for cls, ours in SERVED.items():
        # kernelize wants layers without state and without other methods.
        members = {"forward": ours.forward, "can_torch_compile": True, "__module__": __name__}
        layer = _Layer(cls.__name__, type(cls.__name__, (torch.nn.Module,), members))
        kernels.register_kernel_mapping({layer.name: dict.fromkeys(DEVICES, layer)})
        kernels.replace_kernel_forward_from_hub(cls, layer.name, condition=_exactly(cls))


def _exactly(cls):
    return lambda module: type(module) is cls
