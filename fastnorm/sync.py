"""SyncBatchNorm: batch norm over the batches of all ranks of a process group, on GPUs (NCCL) and on CPUs (gloo)."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy
from torch.nn.parallel import DistributedDataParallel
from torch.types import Device

from . import collective, functional, reference
from .dispatch import DTYPES, select
from .nn import _batch_norm, _BatchNorm
from .options import Options
from .tracing import Scriptable, extras, leaf

TorchBatchNorm = torch.nn.modules.batchnorm._BatchNorm


class SyncBatchNorm(_BatchNorm, torch.nn.SyncBatchNorm):
    """Batch normalization of ``(B, C, *)`` inputs over the batches of all ranks, on fused kernels.

    Equivalent to: ``torch.nn.SyncBatchNorm(num_features, eps, momentum, affine, track_running_stats, process_group)``

    In training each rank normalises its batch with the mean and the biased variance of all ranks' batches together, and every
    rank updates its running statistics alike. One collective forward, one backward, no wait for the device. In evaluation, for
    one rank, and without torch.distributed it is batch norm. See `fastnorm.functional.batch_norm` for the formula.

    What torch.nn.SyncBatchNorm does not do: CPU tensors, double backward, float32 statistics for bfloat16 and float16 inputs of
    every rank. Batches may differ in size and be empty. Fewer than two values per channel on all ranks together have no
    variance: such a batch leaves the running statistics as they are (torch's become NaN).

    Every rank has to call forward, and then backward if any rank does; the gradients of weight and bias are those of this
    rank's batch, which DistributedDataParallel averages. Differentiating a backward (``create_graph=True``) takes one more
    collective, and then the inputs of all ranks, empty ones too, have to require gradients alike.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch.nn.BatchNorm1d's.
        process_group: the ranks whose batches are one; default: all of them.

    Shape: ``(B, C)`` or ``(B, C, *)`` to the same, in the input's dtype and memory format.

    Raises:
        ValueError: the input has fewer than two dimensions or no channels; one rank has only one value per channel.
        RuntimeError, NotImplementedError: torch's own, for sizes, devices and dtypes that do not fit; before any collective
            and with nothing updated.

    >>> SyncBatchNorm(1)(torch.tensor([[1.0], [3.0]])).detach()  # of one rank
    tensor([[-1.0000],
            [ 1.0000]])
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            momentum: float | None = 0.1,
            affine: bool = True,
            track_running_stats: bool = True,
            process_group: dist.ProcessGroup | None = None,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            bias: bool = True,
        ) -> None: ...

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = self._synchronised_group()
        if group is None:
            return _batch_norm(self, input, self.training)
        running_mean, running_var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        named = {"running_mean": running_mean, "running_var": running_var, "weight": self.weight, "bias": self.bias}
        _check(input, named)
        tensors = (input, self.weight, self.bias, running_mean, running_var)
        tracked = self.num_batches_tracked if self.track_running_stats else None
        momentum: float | Tensor | None = self.momentum
        if momentum is None:  # cumulative average, without reading the counter on the host
            momentum = 0.0 if tracked is None else (tracked.double() + 1).reciprocal()
        backend = (select(input.device.type) if collective.fused(*tensors) else None) or reference
        return functional.counted(tracked, collective.sync_batch_norm, *tensors, momentum, self.eps, group, backend)

    def _synchronised_group(self) -> Any:
        """The process group to synchronise with; None where there is nobody to synchronise with, and in evaluation."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: dist.ProcessGroup | None = None) -> torch.nn.Module:
        """Replaces the batch norms of a model by `fastnorm.SyncBatchNorm`.

        Equivalent to: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)``

        Replaced are torch.nn's and fastnorm's BatchNorm1d/2d/3d and SyncBatchNorm. A new module holds the same parameters,
        buffers, hooks and attributes (training flag, qconfig) as the old one, and a module that stands in two places stays
        one module. A batch norm that does more than torch's (a forward, children, a parametrization or an FSDP wrapper of its
        own) is left as it is, with a warning where it does not synchronise by itself.

        Args:
            module: the model.
            process_group: the ranks to synchronise with; default: all of them.

        Returns:
            The model, changed in place; a new module if ``module`` itself is a batch norm.
        """
        return _convert(module, process_group, {})


def _check(x: Tensor, named: dict[str, Tensor | None]) -> None:
    """torch's own exceptions, before any rank enters a collective."""
    if x.dtype not in DTYPES:
        raise NotImplementedError(f'"batch_norm" not implemented for {x.dtype}')
    for name, t in named.items():
        if t is None:
            continue
        if t.numel() != x.shape[1]:
            raise RuntimeError(f"{name} should contain {x.shape[1]} elements not {t.numel()}")
        if t.device != x.device:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} is on {t.device}, not {x.device}")


FORWARDS = (TorchBatchNorm.forward, torch.nn.SyncBatchNorm.forward, _BatchNorm.forward, SyncBatchNorm.forward)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a SyncBatchNorm does all that this batch norm does, but for the synchronisation."""
    bases = (cls for cls in type(module).__mro__ if not issubclass(cls, torch.nn.Module))
    return (
        type(module).forward in FORWARDS
        and "forward" not in vars(module)  # a forward of this instance's own
        and not module._modules  # an activation, a parametrization
        and not extras(module)
        and all(cls in (_BatchNorm, Options, Scriptable, object) for cls in bases)  # not lazy, not FSDP's
    )


def _convert(
    module: torch.nn.Module, process_group: dist.ProcessGroup | None, done: dict[int, torch.nn.Module]
) -> torch.nn.Module:
    """`done` maps id(module) to the module that stands for it, so that a shared one is converted once."""
    if id(module) in done:
        return done[id(module)]
    new = module
    if isinstance(module, TorchBatchNorm):
        if _is_plain(module):
            new = _synchronised(module, process_group)
        elif not isinstance(module, torch.nn.SyncBatchNorm):
            what = f"{type(module).__name__} is not synchronised: it does more than torch.nn's batch norm does"
            warnings.warn(f"{what}, which fastnorm.SyncBatchNorm would drop", stacklevel=3)
    done[id(module)] = new
    for name, child in list(module._modules.items()):
        if child is not None:
            converted = _convert(child, process_group, done)
            if converted is not child:
                module.add_module(name, converted)
    return new


def _synchronised(module: torch.nn.Module, process_group: dist.ProcessGroup | None) -> SyncBatchNorm:
    """A SyncBatchNorm over the same parameters, buffers and hooks; handles that remove hooks remove them from both."""
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    vars(new).update(vars(module))
    new._parameters, new._buffers, new._modules = dict(module._parameters), dict(module._buffers), {}
    new.process_group = process_group
    return new


def _admit_to_ddp() -> None:
    """DistributedDataParallel refuses every torch.nn.SyncBatchNorm on the CPU; ours works there. torch's own stays refused."""
    refuse = getattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", None)
    if refuse is None:
        return

    @functools.wraps(refuse)
    def check(ddp: DistributedDataParallel, module: torch.nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        if ddp.device_type != "cpu" or not all(isinstance(m, SyncBatchNorm) for m in norms):
            refuse(ddp, module)

    DistributedDataParallel._passing_sync_batchnorm_handle = check  # type: ignore[method-assign]


_admit_to_ddp()
