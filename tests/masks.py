"""Norms of which some of the input does not count, in plain torch: the truth in float64, and what a user would write."""

import torch
from compare import accumulate
from sequences import size

DRAWS = 6


def mask_for(x, kind, draw=0):
    """bool, (B, *): True where a position counts."""
    B, *space = x.shape[0], *x.shape[2:]
    generator = torch.Generator().manual_seed(draw)
    mask = torch.ones(B, *space, dtype=torch.bool)
    if kind == "padding":  # lengths, among them none and all
        lengths = torch.randint(0, (space or [2])[0] + 1, (B,), generator=generator)
        lengths[0] = 0 if B > 1 else max(lengths[0], 1)
        lengths[-1] = (space or [1])[0]
        mask = (
            (torch.arange((space or [1])[0]) < lengths[:, None]).view(B, *space[:1], *[1] * len(space[1:])).expand(mask.shape)
        )
    elif kind == "random":
        mask = torch.rand(mask.shape, generator=generator) < 0.6
        mask.view(-1)[-1] = True
    elif kind == "one":
        mask = torch.zeros_like(mask)
        mask.view(-1)[mask.numel() // 2] = True
    elif kind == "none":
        mask = torch.zeros_like(mask)
    return mask.contiguous().to(x.device) if space else mask.reshape(B).to(x.device)


def written_out(x, mask, weight, bias, eps, dtype):
    """z in the accumulate dtype, rounded to `dtype`; differentiable. Statistics over what counts, about the mean."""
    acc, column = accumulate(dtype), lambda p: p.to(dtype).to(accumulate(dtype)).view(1, -1, *[1] * (x.dim() - 2))
    xf = x.to(acc)
    counting = xf.movedim(1, -1)[mask]
    var, mean = torch.var_mean(counting, 0, correction=0)
    z = (xf - column(mean)) * torch.rsqrt(column(var) + eps)
    z = z if weight is None else z * column(weight)
    return (z if bias is None else z + column(bias)).to(dtype)


def rows_for(case, kind, R, P, draw=0):
    """bool, (R, P): True where columns of rows count."""
    generator = torch.Generator().manual_seed(draw)
    if kind == "padding":
        mask = torch.arange(P) < torch.randint(0, P + 1, (R, 1), generator=generator)
    else:
        mask = torch.rand(R, P, generator=generator) < {"random": 0.6, "all": 2.0, "none": -1.0}[kind]
    if kind in ("padding", "random"):
        mask[0], mask[-1] = R == 1, True
    return mask


def rows_written_out(x, mask, weight, bias, eps, dtype):
    """z of rows (M, N) in the accumulate dtype, rounded to `dtype`; differentiable. `mask` is (R, P)."""
    acc, (R, P), (M, N) = accumulate(dtype), mask.shape, x.shape
    counts, xf = mask.view(R, 1, P, 1).expand(R, M // R, P, N // P).reshape(M, N), x.to(acc)
    n, kept = counts.sum(1, keepdim=True), lambda t: torch.where(counts, t, 0).sum(1, keepdim=True)
    mean = kept(xf) / n.clamp(min=1)
    var = torch.where(n > 0, kept((xf - mean).square()) / n.clamp(min=1), 1)
    z = (xf - mean) * torch.rsqrt(var + eps)
    z = z if weight is None else z * weight.to(dtype).to(acc)
    return (z if bias is None else z + bias.to(dtype).to(acc)).to(dtype)


def differentiated(x, dy, mask, weight, bias, eps, dtype, written_out=written_out):
    """y, dx, dweight, dbias by autograd, as far as they exist."""
    leaf = lambda t: None if t is None else t.detach().to(dtype).requires_grad_()
    leaves = {"dx": leaf(x), "dweight": leaf(weight), "dbias": leaf(bias)}
    y = written_out(leaves["dx"], mask, leaves["dweight"], leaves["dbias"], eps, dtype)
    leaves = {name: t for name, t in leaves.items() if t is not None}
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))}


def drawn(case, kind, device, draw):
    """x, dy, weight, bias and the mask"""
    inputs = case.make_channels(device, draw)
    return *inputs, mask_for(inputs[0], kind, draw)


def plain_errors(case, kind, device, drawn, written_out):
    """The largest error of what a user would write, of several draws, relative to the size of each result."""
    wide, worst = case.dtype == torch.float64, {}
    taken = lambda t: t.float() if wide and t is not None else t
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if wide else 1.0
    for draw in range(DRAWS):
        *inputs, mask = drawn(case, kind, device, draw)
        x, dy, weight, bias = map(taken, inputs)
        run = lambda dtype, a=(x, dy, mask, weight, bias, case.eps): differentiated(*a, dtype, written_out)
        truth, theirs = run(torch.float64), run(torch.float32 if wide else case.dtype)
        for name, t in theirs.items():
            worst[name] = max(worst.get(name, 0), scale * size(t.double() - truth[name]) / size(truth[name]))
    return worst


def check(case, kind, results, truth, device, terms, drawn=drawn, written_out=written_out):
    """Each result is off by at most what is plain, and one unit in the last place; `terms` are those that cancel in dx."""
    errors, acc = plain_errors(case, kind, device, drawn, written_out), torch.finfo(accumulate(case.dtype)).eps
    for name, got in results.items():
        expected = truth[name]
        assert got.shape == expected.shape, name
        summed = 2 * acc * max(size(expected), terms if name == "dx" else 0)
        one = max(torch.finfo(got.dtype).eps * size(expected), summed)
        error, theirs = size(got.double() - expected), errors[name] * size(expected)
        assert error <= theirs + one, f"{name}: error {error:.3g}, the plain one's {theirs:.3g} + one ulp {one:.3g}"
