"""The shapes that people norm: one table for the benchmark, and, cut short, for the numerics tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One norm of one model. Rows: the last dimension is normalised. Channels: (B, C) or (B, C, *)."""

    name: str
    kind: str  # "rows" or "channels"
    shape: tuple[int, ...]
    layout: str = "dense"  # or "channels_last", or "mT": (B, L, C) seen as (B, C, L)
    tiny: bool = False  # microseconds of work: the call itself is what is measured


def label(op: str, shape: tuple[int, ...], layout: str) -> str:
    """As tables have it: LN 512x768, BN 16x64x56x56 channels_last."""
    return f"{op} {'x'.join(map(str, shape))}" + ("" if layout == "dense" else f" {layout}")


MODELS = (
    Model("tutorial 8 x 64", "rows", (8, 64), tiny=True),
    Model("tutorial 32 x 10", "rows", (32, 10), tiny=True),
    Model("decode 1 x 4096", "rows", (1, 4096), tiny=True),
    Model("BERT-base 64 tokens", "rows", (64, 768)),
    Model("BERT-base 4 x 128", "rows", (512, 768)),
    Model("GPT-2 medium 2 x 1024", "rows", (2048, 1024)),
    Model("LLaMA-like 1024 tokens", "rows", (1024, 4096)),
    Model("ViT-B/16 8 images", "rows", (1576, 768)),
    Model("ConvNeXt-T stage 1", "rows", (12544, 96)),
    Model("per-head 64", "rows", (65536, 64)),
    Model("tabular 200000 x 10", "rows", (200000, 10)),
    Model("long rows 4 x 1M", "rows", (4, 1000000)),
    Model("GPT-2 medium 8 x 1024", "rows", (8192, 1024)),
    Model("tutorial 8 x 64", "channels", (8, 64), tiny=True),
    Model("tutorial 32 x 10", "channels", (32, 10), tiny=True),
    Model("MLP 64 x 64", "channels", (64, 64), tiny=True),
    Model("MLP 2048 x 512", "channels", (2048, 512)),
    Model("ResNet-50 stem", "channels", (4, 64, 112, 112)),
    Model("ResNet-50 stage 1", "channels", (16, 64, 56, 56)),
    Model("ResNet-50 stage 1", "channels", (16, 64, 56, 56), "channels_last"),
    Model("ResNet-50 stage 3", "channels", (64, 256, 14, 14)),
    Model("ResNet-50 stage 3", "channels", (64, 256, 14, 14), "channels_last"),
    Model("ResNet-50 stage 4", "channels", (64, 512, 7, 7)),
    Model("ResNet-50 stage 4", "channels", (64, 512, 7, 7), "channels_last"),
    Model("audio 16 x 128 x 1000", "channels", (16, 128, 1000)),
    Model("sequence 16 x 1000 x 128", "channels", (16, 128, 1000), "mT"),
    Model("image 2 x 3 x 480 x 640", "channels", (2, 3, 480, 640)),
    Model("video 2 x 32 x 8 x 40 x 40", "channels", (2, 32, 8, 40, 40)),
    Model("U-Net 32 x 64 x 64 x 64", "channels", (32, 64, 64, 64)),
)
