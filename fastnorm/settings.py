"""Process-wide choices, each with torch's own behaviour as its default: `fastnorm.config`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

_CHOICES: dict[str, tuple[str | bool, ...]] = {"compile": ("torch", "fastnorm"), "autocast_keeps_dtype": (False, True)}


class Config:
    """What the user can choose for all norms of the process.

    Attributes:
        compile: what torch.compile, torch.export and dispatch modes see of a norm. "torch" (default): torch's own operator,
            which Inductor fuses with its neighbours. "fastnorm": one registered operator (`torch.ops.fastnorm`), which runs
            our kernel and is not fused with anything.
        autocast_keeps_dtype: under CUDA autocast torch's layer_norm turns bfloat16 and float16 inputs into float32 outputs.
            True: the output has the input's dtype (the statistics are computed in float32 either way).

    Raises:
        AttributeError: there is no such option.
        ValueError: the option has no such value.

    >>> with config.patch(compile="fastnorm"):
    ...     config.compile
    'fastnorm'
    >>> config.compile
    'torch'
    """

    compile: Literal["torch", "fastnorm"]
    autocast_keeps_dtype: bool

    def __init__(self) -> None:
        self.compile = "torch"
        self.autocast_keeps_dtype = False

    def __setattr__(self, name: str, value: str | bool) -> None:
        if name not in _CHOICES:
            raise AttributeError(f"fastnorm.config has no option {name!r}; there are {', '.join(_CHOICES)}")
        if value not in _CHOICES[name]:
            raise ValueError(f"fastnorm.config.{name} is one of {', '.join(map(repr, _CHOICES[name]))}, not {value!r}")
        super().__setattr__(name, value)

    @contextlib.contextmanager
    def patch(self, **options: str | bool) -> Iterator[Config]:
        """Other choices within a `with` block."""
        before = dict(vars(self))
        try:
            for name, value in options.items():
                setattr(self, name, value)
            yield self
        finally:
            vars(self).update(before)


config = Config()
