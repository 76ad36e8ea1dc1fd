"""Loads and stores of tensors that a call may not have: their pointers are None.

What a program needs after its sums is loaded before them: one wait for the memory where there were two.
"""

import triton
import triton.language as tl


@triton.jit
def load_wanted(ptr, at, mask):
    """None where there is no pointer. Not to be put into a tuple: triton 3.6 takes no None there."""
    value = None
    if ptr is not None:
        value = tl.load(ptr + at, mask=mask, other=0)
    return value


@triton.jit
def store_wanted(ptr, at, value, mask):
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)
