"""Groups of channels: a norm over P neighbouring channels of a sample, S positions each, that ends in an activation.

x is dense, so a group is a row of N = P * S elements, and the forward is that of fused rows, whose parameters are of channels
instead of columns. Backward a program has one group: the sums of its channels, which are partial rows of dw and db, give c1 and
c2. The contract is written in reference.py.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Channels, Rows
from .activations import number
from .chain import let_next_start
from .launch import dense, launch, leads, vector
from .math import affine, grad_input, inverse, normalize, sum2
from .partial import finalise
from .row_fused import normalize_rows
from .row_parts import load_dz, load_statistics, store_sums
from .wanted import load_wanted

SIZES = ["M", "groups", "P", "S_v", "alpha"]


@triton.jit
def _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, s, P, S, alpha, ACTIVATION: tl.constexpr):
    """x_hat and dz, both 0 outside, of channels c and positions s of a group, where they are in it, and whether they exist."""
    at = c[:, None] * S + s[None, :]
    mask = (c < P)[:, None] & (s < S)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(rstd.dtype)
    x_hat = tl.where(mask, normalize(x, high, low, rstd), 0.0)
    return x_hat, load_dz(dy_ptr, None, at, at, mask, x_hat, weight, bias, alpha, ACTIVATION), at, mask


@triton.jit(do_not_specialize=SIZES)
def _group_bwd_kernel(dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, M, groups,
                      P, S_v, alpha, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr, ACTIVATION: tl.constexpr,
                      LEADS: tl.constexpr):  # fmt: skip
    """A group that one tile holds."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    S = S_v * VEC
    row = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * P
    c = tl.arange(0, BLOCK_C)
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, row + tl.arange(0, 1), M)
    weight = load_wanted(weight_ptr, first + c[:, None], (c < P)[:, None])
    bias = load_wanted(bias_ptr, first + c[:, None], (c < P)[:, None])
    start = row * P * S_v * VEC
    x_ptr += start
    dy_ptr += start
    x_hat, dz, at, mask = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, tl.arange(0, BLOCK_S), P, S, alpha,
                                     ACTIVATION)  # fmt: skip
    dw, db = sum2(dz * x_hat, dz, 1)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw[None, :], db[None, :], sample, M // groups, first + c, c < P, groups * P)
    if dx_ptr is not None:
        c1, c2 = sum2(affine(dw[:, None], weight, None), affine(db[:, None], weight, None), 0)
        share = inverse((P * S).to(ACC))
        dx = grad_input(affine(dz, weight, None), x_hat, rstd, (c1 * share)[:, None], (c2 * share)[:, None])
        tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _group_bwd_long_kernel(dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, M,
                           groups, P, S_v, alpha, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr,
                           STAGES: tl.constexpr, ACTIVATION: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """A group of any size: a sweep over its tiles for the sums of its channels, and one back, from what the caches still hold,
    for dx. In the first, tiles of the same channels follow each other."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    S = S_v * VEC
    row = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * P
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, row + tl.arange(0, 1), M)
    start = row * P * S_v * VEC
    x_ptr += start
    dy_ptr += start
    across = tl.cdiv(S, BLOCK_S)
    tiles = tl.cdiv(P, BLOCK_C) * across
    s1 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    s2 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    c1 = tl.zeros((BLOCK_C, 1), ACC)
    c2 = tl.zeros((BLOCK_C, 1), ACC)
    for i in tl.range(0, tiles, num_stages=STAGES):
        c = i // across * BLOCK_C + tl.arange(0, BLOCK_C)
        s = i % across * BLOCK_S + tl.arange(0, BLOCK_S)
        weight = load_wanted(weight_ptr, first + c[:, None], (c < P)[:, None])
        bias = load_wanted(bias_ptr, first + c[:, None], (c < P)[:, None])
        x_hat, dz, _, _ = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, s, P, S, alpha, ACTIVATION)
        s1 += dz * x_hat
        s2 += dz
        if i % across == across - 1:
            dw, db = sum2(s1, s2, 1)
            store_sums(partial_ptr, dw_ptr, db_ptr, dw[None, :], db[None, :], sample, M // groups, first + c, c < P,
                       groups * P)  # fmt: skip
            c1 += affine(dw[:, None], weight, None)
            c2 += affine(db[:, None], weight, None)
            s1 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
            s2 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
    if dx_ptr is not None:
        c1, c2 = sum2(c1, c2, 0)
        share = inverse((P * S).to(ACC))
        c1, c2 = (c1 * share)[:, None], (c2 * share)[:, None]
        for back in tl.range(0, tiles, num_stages=STAGES):
            i = tiles - 1 - back
            c = i // across * BLOCK_C + tl.arange(0, BLOCK_C)
            s = i % across * BLOCK_S + tl.arange(0, BLOCK_S)
            weight = load_wanted(weight_ptr, first + c[:, None], (c < P)[:, None])
            bias = load_wanted(bias_ptr, first + c[:, None], (c < P)[:, None])
            x_hat, dz, at, mask = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, s, P, S, alpha, ACTIVATION)
            dx = grad_input(affine(dz, weight, None), x_hat, rstd, c1, c2)
            tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def group_fwd(x, weight, bias, activation, alpha, eps, groups):
    channels, x = Channels.of(x.shape), x.contiguous()
    rows = Rows.of(x.shape, channels.C // groups * channels.S)
    y, _, mean, rstd = normalize_rows(rows, x, None, weight, bias, None, activation, alpha, eps, True, "group", groups,
                                      channels.S)  # fmt: skip
    return y, mean, rstd


def group_bwd(dy, x, weight, bias, activation, alpha, mean, rstd, need):
    if not any(need):
        return None, None, None
    channels, x, M = Channels.of(x.shape), x.contiguous(), rstd.numel()
    groups = M // channels.B
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    dw, db = (None if dtype is None else torch.empty(channels.C, dtype=dtype, device=x.device) for dtype in need[1:])
    partial = None
    if dw is not None or db is not None:
        partial = torch.empty((2, channels.B, channels.C), dtype=rstd.dtype, device=x.device)
    vec = vector(x.element_size(), channels.S)
    config = heuristics.group_backward(channels.C // groups, channels.S, x.element_size(), vec * x.element_size())
    args = (dy.contiguous(), x, dense(weight), None if activation == "identity" else dense(bias), dense(mean), dense(rstd), dx,
            partial, dw, db, M, groups, channels.C // groups, channels.S // vec, number(activation, alpha))  # fmt: skip
    options = dict(BLOCK_C=config.block_c, BLOCK_S=config.block_s, VEC=vec, ACTIVATION=activation,
                   LEADS=leads(x.device, x.nbytes), warps=config.warps, registers=config.registers)  # fmt: skip
    if config.whole:
        launch(_group_bwd_kernel, M, x.device, *args, **options)
    else:
        launch(_group_bwd_long_kernel, M, x.device, *args, STAGES=config.stages, stages=config.stages, **options)
    if partial is not None and channels.B > 1:
        finalise(partial, dw, db)
    return dx, dw, db
