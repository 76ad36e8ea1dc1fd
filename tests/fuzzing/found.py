"""What random calls have found, each named for what was wrong."""

import torch

from .calls import Call, Held
from .wrecks import Wreck

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

FOUND = {
    "a masked half's tanh, whose slope torch makes of a rounded result": Call(
        "layer_norm", x=Held((2, 5), F16, grad=True), dims=2, activation="tanh", mask=(2,), seed=1
    ),
    "parameters of another dtype beside a small input": Call(
        "group_norm", x=Held((2, 1), F64, grad=True), weight=Held((1,), grad=True)
    ),
    "parameters of another dtype beside a strided input": Call(
        "group_norm", x=Held((2, 4, 3), F16, strides=(12, 1, 4), grad=True), weight=Held((4,), BF16, grad=True), groups=2
    ),
    "gradients of a half's weight that were rounded for each instance": Call(
        "instance_norm", x=Held((4, 1, 7, 17), F16), weight=Held((1,), F16, grad=True), dy=Held((4, 1, 7, 17), F16)
    ),
    "running statistics that were rounded for each instance": Call("instance_norm", x=Held((2, 1, 1, 2)), running=F16, seed=1),
}
FOUND_WRECKS = {
    "instance_norm raised batch_norm's words for a momentum": Wreck(
        Call("instance_norm", x=Held((1, 1, 2)), small=False), 6, "a list"
    ),
    "instance_norm raised batch_norm's words for an eps": Wreck(
        Call("instance_norm", x=Held((1, 1, 2)), small=False), 7, "a list"
    ),
}
