"""fastnorm: fused batch-norm and layer-norm for PyTorch."""

from . import functional
from .convert import convert, revert
from .dispatch import use_backend
from .fold import fold
from .functional import batch_norm, layer_norm
from .lint import lint
from .nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, LayerNorm
from .settings import config
from .sync import SyncBatchNorm
from .version import __version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LayerNorm",
    "SyncBatchNorm",
    "__version__",
    "batch_norm",
    "config",
    "convert",
    "fold",
    "functional",
    "layer_norm",
    "lint",
    "revert",
    "use_backend",
]
