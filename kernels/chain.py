"""Launches of one call that follow each other: a later one may start before the one before has ended, and waits for it inside.

Programmatic dependent launch, from compute capability 9.0 on. What a program does before `wait_for_previous` takes no time of
its own then: indices, parameters, its first elements of x. It stores nothing before, and reads nothing that the call wrote. The
first launch of a call waits for all that came before it, as any other does.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(FOLLOWS: tl.constexpr):
    if FOLLOWS:
        gdc_wait()


@triton.jit
def let_next_start(LEADS: tl.constexpr):
    """The next launch starts when every program of this one has come here, as soon as there is room for it."""
    if LEADS:
        gdc_launch_dependents()
