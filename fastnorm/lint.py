"""`fastnorm.lint(model)`: the common mistakes with normalization, found in a model as it is."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .order import order, tensors
from .rules import TEXTS, Seen, violations

HEAD = ("severity", "rule", "modules", "what is wrong", "what to change")
WIDTHS = (8, 26, 24, 34, 34)  # of the table's columns, in characters


@dataclass(frozen=True)
class Finding:
    """One thing that is found.

    Attributes:
        rule: one of the names in `lint`'s docstring.
        severity: "warning", or "note" for what is right in some models.
        modules: names of the modules in the model.
        wrong: what is wrong with them.
        change: what to change.
    """

    rule: str
    severity: str
    modules: tuple[str, ...]
    wrong: str
    change: str


@dataclass(frozen=True, repr=False)
class Report(Sequence[Finding]):
    """What `lint` found, warnings first: a sequence of `Finding`; `print` it.

    Attributes:
        findings: all of them, in a tuple.
        order: where the order of the calls is from.
        unseen: the modules whose own calls are not known; what is inside of them is looked at by itself.
    """

    findings: tuple[Finding, ...]
    order: str
    unseen: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self)
        found = ", ".join(f"{n} {severity}{'s' if n > 1 else ''}" for severity, n in counts.items())
        lines = [f"{found or 'nothing found'}; order of the calls: {self.order}"]
        if self.unseen:
            lines.append(f"cannot be traced, but for their parts: {_listed(self.unseen)}")
        return "\n".join(lines + _table(self))

    __repr__ = __str__


def lint(model: nn.Module, batch_size: int | None = None, input: Any = None) -> Report:
    """What is likely to be a mistake in how `model` uses norms: torch.nn's, fastnorm's and subclasses of both.

    ==========================  ========  =================================================================================
    one-value                   warning   a batch norm of one value per channel, for which torch raises in training
    small-batch                 warning   a batch norm over fewer than 16 rows, or fewer than 8 images or sequences
    unsynchronised              warning   the same, where the ranks of torch.distributed have enough samples together
    momentum                    warning   above 0.5, as ported from Keras, where it is the weight of the old; or 0
    dropout-before-batch-norm   warning   evaluation has another variance than the running statistics were made of
    norm-after-norm             warning   nothing but reshapes between two norms
    mixed-norms                 note      batch norm and a norm of each sample (layer, group, instance, RMS) on one path
    norm-before-activation      note      a layer, a norm and an activation, in this order
    bias-before-batch-norm      note      a bias of a layer that the batch norm takes away again
    batch-norm-after-recurrent  note      a batch norm over the steps of sequences, padding included
    shared-batch-norm           note      a batch norm that is called more than once in a forward
    no-running-statistics       note      a batch norm that uses the batch's own statistics in evaluation as well
    ==========================  ========  =================================================================================

    A batch norm with a virtual batch size is judged by its ghost batches.

    Nothing is changed: no mode, no buffer, no hook, no random state of torch's. The order of the calls is that of a copy of the
    model without memory for its tensors, in the modes that the model is in: traced by `torch.fx` with every optional argument
    at its default, or, where `input` is given, of a run, which also knows shapes. Where it cannot be traced as a whole, its
    parts are, each nn.Sequential among them; of a model that cannot be copied it is the order in each nn.Sequential. The
    report says which it was.

    Args:
        model: any torch.nn.Module, wrapped by DistributedDataParallel, DataParallel and torch.compile or not.
        batch_size: of one device in training; without it the rules of batch sizes are not checked.
        input: an example: a tensor, a tuple of arguments or a dict of keyword arguments; it may have another batch size.

    Returns:
        A `Report`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `batch_size` is not a positive int.
        Exception: what ``model(input)`` itself raises.

    >>> report = lint(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.99), nn.ReLU()), batch_size=4)
    >>> [finding.rule for finding in report]
    ['small-batch', 'momentum', 'norm-before-activation', 'bias-before-batch-norm']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is checked, not an object of type {type(model).__name__}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is a positive int, not {batch_size!r}")
    model = getattr(model, "_orig_mod", model)
    model = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    found = order(model, None if input is None else _arguments(input))
    example = next((len(t) for t in tensors(input) if t.dim() and len(t)), None)
    alike: dict[tuple, dict[str, None]] = {}  # (rule, the values of its text) -> names; a dict for each, as an ordered set
    for rule, modules, *values in violations(Seen(model, found.calls, batch_size, example)):
        alike.setdefault((rule, *values), {}).update(dict.fromkeys(modules))
    findings = [_finding(rule, tuple(names), values) for (rule, *values), names in alike.items()]
    return Report(tuple(sorted(findings, key=lambda finding: finding.severity == "note")), found.how, found.unseen)


def _arguments(input: Any) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs)"""
    if isinstance(input, dict):
        return (), input
    return input if isinstance(input, tuple) else (input,), {}


def _finding(rule: str, modules: tuple[str, ...], values: Iterable) -> Finding:
    severity, wrong, change = TEXTS[rule]
    return Finding(rule.partition(":")[0], severity, modules, wrong.format(*values), change.format(*values))


def _listed(given: Iterable[str]) -> str:
    names = [name or "the model itself" for name in given]
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _table(findings: Sequence[Finding]) -> list[str]:
    """Lines of aligned columns, the cells wrapped."""
    rows = [HEAD, *((f.severity, f.rule, _listed(f.modules), f.wrong, f.change) for f in findings)]
    lines = []
    for row in rows if findings else ():
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, WIDTHS, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [(cell[i] if i < len(cell) else "").ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return lines
