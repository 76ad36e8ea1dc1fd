"""What takes a line of NVIDIA's assembly: memory that is asked for ahead, and values that the compiler is not to see through.

Memory that a later row needs is asked for while an earlier one is worked on: it comes to L2, and no register waits for it. It
pays where few programs with long rows each reduce and store without a load on the way. Where loads are prefetched into shared
memory already, it was measured to cost more than it gains.
"""

import triton
import triton.language as tl


@triton.jit
def prefetch_row(ptr, row, M, N, stride_v, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Asks for row `row` of N <= BLOCK columns, where there is one, in sectors of 32 bytes."""
    SECTOR: tl.constexpr = 256 // ptr.dtype.element_ty.primitive_bitwidth
    cols = tl.arange(0, BLOCK // SECTOR) * SECTOR
    there = (cols < N) & (row < M)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [ptr + tl.cast(row, tl.int64) * stride_v * VEC + cols, there.to(tl.int32)], dtype=tl.int32, is_pure=False,
        pack=1)  # fmt: skip


@triton.jit
def hidden(n, ASSEMBLES: tl.constexpr):
    """n as an int32 of which the compiler knows nothing, not that it is the same as before either."""
    n = tl.cast(n, tl.int32)
    if ASSEMBLES:
        n = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [n], dtype=tl.int32, is_pure=False, pack=1)
    return n
