"""The rules of `fastnorm.lint`: what each says (`TEXTS`), and generators of (rule, names of modules, values of the text)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .activations import parse
from .ghost import shares
from .order import Call, is_per_sample, option

# The variance of 16 normal values is off by sqrt(2 / 15) = 37 %, their mean by a quarter of their deviation.
FEW_ROWS = 16
# ResNet-50 on ImageNet, error for 32, 16, 8, 4, 2 images per device: 23.6, 23.7, 24.8, 27.3, 34.7 % (Wu and He, 2018).
FEW_SAMPLES = 8

TEXTS = {  # rule, or rule:case -> severity, what is wrong, what to change
    "one-value": (
        "warning",
        "one value per channel: its variance is 0, and torch raises ValueError in training",
        "a larger batch, drop_last=True in the data loader, or a LayerNorm",
    ),
    "one-value:ghost": (
        "warning",
        "one value per channel of a ghost batch: its variance is 0, and torch raises ValueError in training",
        "a larger virtual_batch_size",
    ),
    "small-batch": (
        "warning",
        "statistics of a batch of {0}, fewer than {1} {2}: noise in training, and others than in evaluation",
        "a larger batch, or a norm of each sample: LayerNorm or, for images, GroupNorm",
    ),
    "small-batch:ghost": (
        "warning",
        "statistics of ghost batches of {0}, fewer than {1} {2}: noise in training, and others than in evaluation",
        "a larger virtual_batch_size, unless so much noise is meant",
    ),
    "unsynchronised": (
        "warning",
        "statistics of a batch of {0} on each rank, fewer than {1} {2}, though the ranks together have {3}",
        "fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)",
    ),
    "momentum": (
        "warning",
        "momentum={0}: the running statistics are those of the last batch or two",
        "momentum={1:.3g}, if it is from Keras, where it is the weight of the old statistics, and here of the new",
    ),
    "momentum:zero": (
        "warning",
        "momentum=0: the running statistics never change",
        "momentum=0.1, or None for the average of all batches",
    ),
    "dropout-before-batch-norm": (
        "warning",
        "dropout before a batch norm: the running variance is that of dropped values, and evaluation drops none",
        "dropout after the batch norm",
    ),
    "norm-after-norm": (
        "warning",
        "a norm of what a norm has just normalised",
        "one of the two",
    ),
    "mixed-norms": (
        "note",
        "batch norm and a norm of each sample on one path: results depend on the batch after all",
        "one kind, unless both are meant, as for a transformer on a convolutional net",
    ),
    "norm-before-activation:dense": (
        "note",
        "linear, norm, activation: what the next layer reads is not normalised, which a common rule for dense nets asks for",
        "try the norm after the activation and keep the better; a batch norm folds only as it is now (fastnorm.fold)",
    ),
    "norm-before-activation:convolution": (
        "note",
        "convolution, norm, activation: the usual order (ResNet), though what the next layer reads is not normalised",
        "nothing: in this order a batch norm folds into the convolution (fastnorm.fold)",
    ),
    "bias-before-batch-norm": (
        "note",
        "a bias that the batch norm's mean takes away again: {0} parameters without effect",
        "bias=False in the layer: the batch norm has a bias of its own",
    ),
    "batch-norm-after-recurrent": (
        "note",
        "statistics over all steps of the sequences: padding, if there is any, counts as values",
        "nothing where nothing is padded; else a LayerNorm of each step",
    ),
    "shared-batch-norm": (
        "note",
        "called {0} times in a forward: each call has its own statistics, the running ones are a mixture",
        "a batch norm for each place, unless all places see the same distribution",
    ),
    "no-running-statistics": (
        "note",
        "in evaluation, too, a result depends on what else is in the batch",
        "track_running_stats=True, unless it is meant",
    ),
}

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
RESHAPES = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "to", "float"}
TRANSPOSES = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "T", "mT"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
PER_SAMPLE = {"layer_norm", "group_norm", "instance_norm", "rms_norm"}
ACTIVATIONS = {name for name in nn.modules.activation.__all__ if name != "MultiheadAttention" and "Softm" not in name}
ACTIVATION_CLASSES = tuple(getattr(nn, name) for name in sorted(ACTIVATIONS))
ACTIVATION_NAMES = {name.lower() for name in ACTIVATIONS} | {"leaky_relu"}


@dataclass(frozen=True)
class Seen:
    """What the rules look at; `example` is the batch size of the input, where the model has run on one."""

    model: nn.Module
    calls: list[Call]
    batch_size: int | None
    example: int | None

    def batch_norms(self):
        """The first call of each."""
        firsts = {}
        for call in self.calls:
            if isinstance(call.module, _BatchNorm):
                firsts.setdefault(call.module, call)
        return firsts.values()


def violations(seen):
    for rule in RULES:
        yield from rule(seen)


# ---------------------------------------------------------------- what a call is, and what is before and after it


def _is(call, names, *classes) -> bool:
    return isinstance(call.module, classes) or (call.kind == "function" and call.name in names)


def _is_reshape(call):
    return _is(call, RESHAPES | TRANSPOSES, nn.Identity, nn.Flatten, nn.Unflatten)


def _is_activation(call):
    return _is(call, ACTIVATION_NAMES, *ACTIVATION_CLASSES)


def _is_dropout(call):
    return _is(call, DROPOUTS, _DropoutNd) and getattr(call.module, "p", 1) > 0


def _family(call):
    """ "batch" or "sample" where the call is a norm."""
    if _is(call, {"batch_norm"}, _BatchNorm):
        return "batch"
    return "sample" if _is(call, PER_SAMPLE) or is_per_sample(call.module) else None


def _source(call, *past):
    """The call whose result this one reads, past those of the given kinds; None where several results come together."""
    while len(reads := _inputs(call)) == 1:
        (call,) = reads
        if not any(kind(call) for kind in past):
            return call
    return None


def _inputs(call):
    """What it reads, but for parameters and what a norm adds after it has normalised."""
    reads = [read for read in call.reads if read.kind != "parameter"]
    return reads[:1] if _family(call) and not option(call.module, "addend") else reads


def _is_activated(call) -> bool:
    """Whether an activation is part of a norm, or reads its result."""
    if parse(option(call.module, "activation"))[0] != "identity":
        return True
    return any(_is_activation(reader) or (_is_reshape(reader) and _is_activated(reader)) for reader in call.readers)


# ---------------------------------------------------------------- the rules


def _batch_sizes(seen):
    for call in seen.batch_norms() if seen.batch_size else ():
        if option(call.module, "frozen") or (seen.model.training and not call.module.training):
            continue
        ranks = _ranks(call.module)
        together = seen.batch_size * ranks
        batch = together if isinstance(call.module, nn.SyncBatchNorm) else seen.batch_size
        ghost = _ghost_batch_size(call.module, batch)
        batch, case = (batch, "") if ghost is None else (ghost, ":ghost")
        values = _values_per_sample(seen, call)
        few, what = (FEW_ROWS, "rows") if values == 1 else (FEW_SAMPLES, "samples")
        if values is not None and batch * values <= 1:
            yield f"one-value{case}", [call.name]
        elif batch < few <= together and not case:
            yield "unsynchronised", [call.name], batch, few, what, together
        elif batch < few:
            yield f"small-batch{case}", [call.name], batch, few, what


def _ghost_batch_size(norm, batch):
    """That of the smallest ghost batch; None where the batch is one."""
    n = None if isinstance(norm, nn.SyncBatchNorm) else option(norm, "virtual_batch_size")
    return None if n is None or batch < 2 * n else shares(batch, n)[-1][0]


def _ranks(norm) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(getattr(norm, "process_group", None))


def _values_per_sample(seen, call):
    """How many values of a channel a sample has; None where that is not known."""
    if seen.example and call.shape is not None and len(call.shape) > 1:
        return call.shape.numel() / call.shape[option(call.module, "channel_axis")] / seen.example
    source = _source(call, _is_activation, _is_dropout, _family)
    if not isinstance(call.module, nn.BatchNorm1d) or source is None:
        return None
    flat = _is(source, {"flatten"}, nn.Flatten)
    return 1 if flat or (isinstance(source.module, nn.Linear) and _is_per_channel(source.module, call)) else None


def _momentum(seen):
    for call in seen.batch_norms():
        momentum = call.module.momentum
        if call.module.track_running_stats and momentum is not None and not 0 < momentum <= 0.5:
            yield ("momentum", [call.name], momentum, 1 - momentum) if momentum else ("momentum:zero", [call.name])


def _dropout(seen):
    for call in seen.batch_norms():
        source = _source(call, _is_reshape, _is_activation)
        if source is not None and _is_dropout(source):
            yield "dropout-before-batch-norm", [source.name, call.name] if source.module else [call.name]


def _norm_after_norm(seen):
    for call in seen.calls:
        source = _source(call, _is_reshape)
        if _family(call) and source is not None and _family(source) and len(source.readers) == 1:
            yield "norm-after-norm", [source.name, call.name]


def _mixed(seen):
    """The first pair: the later ones follow from it."""
    above = {}
    for call in seen.calls:
        families = {family: norm for read in call.reads for family, norm in above[read].items()}
        family = _family(call)
        other = families.get({"batch": "sample", "sample": "batch"}.get(family))
        if other is not None and other is not _source(call, _is_reshape):
            yield "mixed-norms", [other.name, call.name]
            return
        above[call] = families | {family: call} if family else families


def _placement(seen):
    for call in seen.calls:
        source = _source(call, _is_reshape)
        if _family(call) and source is not None and isinstance(source.module, LAYERS) and _is_activated(call):
            yield f"norm-before-activation:{'dense' if isinstance(source.module, nn.Linear) else 'convolution'}", [call.name]


def _bias(seen):
    biases = {}
    for call in seen.batch_norms():
        source = _source(call, lambda c: isinstance(c.module, nn.Identity))
        layer = source.module if source is not None and len(source.readers) == 1 else None
        if isinstance(layer, LAYERS) and layer.bias is not None and _is_per_channel(layer, call):
            biases[source.name] = layer.bias.numel()
    if biases:
        yield "bias-before-batch-norm", biases, sum(biases.values())


def _is_per_channel(layer, call) -> bool:
    """Whether the layer's outputs are the norm's channels. Those of a Linear are the last dimension."""
    last = option(call.module, "channel_axis") == -1
    if not isinstance(layer, nn.Linear):
        return not last
    rows = isinstance(call.module, (nn.BatchNorm1d, nn.SyncBatchNorm)) and (call.shape is None or len(call.shape) == 2)
    return (rows or last) and layer.out_features == call.module.num_features


def _recurrent(seen):
    for call in seen.batch_norms():
        source, transposed = call, False  # sequences are, for a batch norm; a last state is not
        while source.reads and (source is call or _keeps_steps(source)):
            source = source.reads[0]
            transposed |= _is(source, TRANSPOSES)
        if transposed and isinstance(source.module, nn.RNNBase):
            yield "batch-norm-after-recurrent", [source.name, call.name]


def _keeps_steps(call) -> bool:
    kept = _is(call, {"getitem", "pad_packed_sequence", "index_select"})  # the last two where packed sequences are unpacked
    return kept or _is_reshape(call) or _is_activation(call) or _is_dropout(call)


def _shared(seen):
    times = Counter(call.module for call in seen.calls)
    for call in seen.batch_norms():
        if times[call.module] > 1:
            yield "shared-batch-norm", [call.name], times[call.module]


def _no_statistics(seen):
    for call in seen.batch_norms():
        if not call.module.track_running_stats:
            yield "no-running-statistics", [call.name]


RULES = (
    _batch_sizes,
    _momentum,
    _dropout,
    _norm_after_norm,
    _mixed,
    _placement,
    _bias,
    _recurrent,
    _shared,
    _no_statistics,
)
