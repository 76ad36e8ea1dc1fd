"""Loads and stores of tensors that a call may not have: their pointers are None."""

import triton
import triton.language as tl


@triton.jit
def load_wanted(ptr, at, mask):
    """None where there is no pointer. What a program needs after its sums is read before them: one wait for both."""
    if ptr is not None:
        return tl.load(ptr + at, mask=mask, other=0)
    else:
        return None


@triton.jit
def store_wanted(ptr, at, value, mask):
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)
