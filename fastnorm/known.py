"""Norms of other libraries that have a forward of their own and are torch.nn's all the same; no library is imported for it.

A value is the forward to use instead, or None: their own forward stays, and the `super().forward()` in it reaches ours.
Compared with the forwards of timm 1.0.31, torchvision 0.29.2 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable

from . import functional
from .channels_first import channels_first_layer_norm


def _rows(self, x):
    return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _channels_first(self, x):
    if self.normalized_shape != x.shape[1:2]:  # torch says what is wrong
        return _rows(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return channels_first_layer_norm(x, self.weight, self.bias, self.eps)


FORWARDS: dict[str, Callable | None] = {
    "timm.layers.norm.LayerNorm": _rows,
    "timm.layers.norm.LayerNorm2d": _channels_first,
    "torchvision.models.convnext.LayerNorm2d": _channels_first,
}

_AROUND_TORCHS = {  # transformers.models.*.modeling_*: channels first or last, or a cast of the result
    "convnext": "ConvNextLayerNorm",
    "convnextv2": "ConvNextV2LayerNorm",
    "deepseek_ocr2": "DeepseekOcr2SamLayerNorm",
    "deepseek_vl_hybrid": "DeepseekVLHybridLayerNorm",
    "dinov3_convnext": "DINOv3ConvNextLayerNorm",
    "edgetam": "EdgeTamLayerNorm",
    "edgetam_video": "EdgeTamVideoLayerNorm",
    "esmc": "EsmcLayerNorm",
    "got_ocr2": "GotOcr2LayerNorm",
    "lw_detr": "LwDetrLayerNorm",
    "pp_formulanet": "PPFormulaNetLayerNorm",
    "rf_detr": "RfDetrLayerNorm",
    "sam": "SamLayerNorm",
    "sam2": "Sam2LayerNorm",
    "sam2_video": "Sam2VideoLayerNorm",
    "sam3_tracker": "Sam3TrackerLayerNorm",
    "sam3_tracker_video": "Sam3TrackerVideoLayerNorm",
    "sam_hq": "SamHQLayerNorm",
    "seggpt": "SegGptLayerNorm",
    "slanext": "SLANeXtLayerNorm",
    "unlimited_ocr": "UnlimitedOcrSamLayerNorm",
}
FORWARDS |= {f"transformers.models.{file}.modeling_{file}.{name}": None for file, name in _AROUND_TORCHS.items()}


def name_of(thing):
    """Of a class or a function, with the module it is in."""
    return f"{thing.__module__}.{thing.__qualname__}"


def knows(forward):
    """Whether `forward` is the one of a class in the table, inherited or not."""
    return name_of(forward).removesuffix(".forward") in FORWARDS


def replacement(forward):
    return FORWARDS.get(name_of(forward).removesuffix(".forward"))


def refusal(module):
    """Why a module with a known forward is not served."""
    if getattr(module, "_fast_norm", False) and knows(type(module).forward):
        return "timm's fast norm is on"
    return None
