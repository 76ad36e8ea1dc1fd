"""fastnorm: fused batch-norm and layer-norm for PyTorch."""

from . import functional
from .channels_first import channels_first_layer_norm
from .convert import convert, revert
from .dispatch import use_backend
from .fold import fold
from .functional import add_layer_norm, add_rms_norm, batch_norm, layer_norm, modulated_layer_norm, rms_norm
from .ghost import ghost_batch_norm
from .group import group_norm
from .instance import instance_norm
from .keras import from_keras
from .lint import lint
from .nn import (
    AddLayerNorm,
    AddRMSNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    ModulatedLayerNorm,
    RMSNorm,
)
from .settings import config
from .sync import SyncBatchNorm
from .version import __version__

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "ModulatedLayerNorm",
    "RMSNorm",
    "SyncBatchNorm",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "channels_first_layer_norm",
    "config",
    "convert",
    "fold",
    "from_keras",
    "functional",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "lint",
    "modulated_layer_norm",
    "revert",
    "rms_norm",
    "use_backend",
]
