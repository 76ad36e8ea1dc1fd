"""What relu's backward takes in the place of a residual on the CPU: a bit for each element, whoever writes and reads them."""

import pytest
import torch
from cases import BF16, F16, F32, F64

from fastnorm import batch_norm, native, reference

pytestmark = pytest.mark.skipif(bool(native.unavailable("cpu")), reason="the extension is not compiled here")

SHAPES = [
    (8, 5), (64, 64), (3, 1), (2, 3, 9), (2, 3, 16), (4, 6, 5, 7), (16, 3, 40, 40), (2, 3, 131, 131), (24, 40, 7, 7),
    (64, 64, 7, 7), (16, 8, 8, 8), (70, 6, 2, 4), (3, 9, 20, 24), (2, 5, 136, 136), (1030, 3, 3, 3), (2, 32, 1, 1),
]  # fmt: skip
LAYOUTS = {
    "dense": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}
OPTIONS = (None, None, True, 0.1, 1e-5)


def inputs(shape, dtype, layout):
    x, dy, residual = (LAYOUTS[layout](t) for t in torch.randn(3, *shape).to(dtype))
    return x, dy, residual, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_where_y_is_not_zero(shape, layout, dtype):
    assert_as_the_reference(*inputs(shape, dtype, layout))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_results_past_the_caches(layout, dtype):
    """Whole lines of dx and dresidual, 28 MB with what is read."""
    assert_as_the_reference(*inputs((2, 16, 344, 344), dtype, layout))


def assert_as_the_reference(x, dy, residual, weight, bias):
    residual[0, 0] = float("nan")  # which is not <= 0
    forward = lambda: native.channel_fused_fwd(x, weight, bias, residual, "relu", 0.0, *OPTIONS, keep=True)
    y, mean, rstd, kept = forward()
    assert kept.dtype == torch.uint8
    assert kept.numel() == (x.numel() + 7) // 8 + 8
    assert torch.equal(reference.kept_bits(kept, x), y != 0)
    end = (kept, weight, bias, "relu", 0.0, mean, rstd)
    for training in (True, False):
        need = (True, F32, F32, True)
        found = native.channel_fused_bwd(dy, x, *end, training, need)
        assert torch.equal(found[3], torch.where(y != 0, dy, 0))
        for ours, theirs in zip(found, reference.channel_fused_bwd(dy, x, *end, training, need), strict=True):
            rough = {F64: 1e-10, F32: 2e-5}.get(ours.dtype, 2 * torch.finfo(ours.dtype).eps)
            torch.testing.assert_close(ours, theirs, rtol=rough, atol=rough)
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 3, 40, 40), (64, 64, 7, 7), (3, 9, 20, 24)], ids=str)
def test_any_layout_of_dy(shape, layout):
    """It is brought into the order of the bits."""
    x, dy, residual, weight, bias = inputs(shape, F32, "dense")
    _, mean, rstd, kept = native.channel_fused_fwd(x, weight, bias, residual, "relu", 0.0, *OPTIONS, keep=True)
    run = lambda dy: native.channel_fused_bwd(dy, x, kept, weight, bias, "relu", 0.0, mean, rstd, True, (True, F32, F32, True))
    for one, other in zip(run(dy), run(LAYOUTS[layout](dy)), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_kept_unasked_or_without_relu():
    x, _, residual, weight, bias = inputs((4, 6, 5, 7), F32, "dense")
    run = lambda activation, keep: native.channel_fused_fwd(x, weight, bias, residual, activation, 0.0, *OPTIONS, keep=keep)[3]
    assert run("relu", False) is None
    assert run("gelu", True).data_ptr() == residual.data_ptr()


def test_the_residual_is_not_saved():
    """A bit for each of its elements is."""
    x, _, residual, weight, bias = inputs((16, 3, 40, 40), F32, "dense")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, activation="relu", residual=residual)
    assert x.data_ptr() in [t.data_ptr() for t in saved]
    assert residual.data_ptr() not in [t.data_ptr() for t in saved]
    assert x.numel() // 8 + 8 in [t.nbytes for t in saved]


def test_wrong_bits_are_refused():
    x, dy, residual, weight, bias = inputs((4, 6, 5, 7), F32, "dense")
    _, mean, rstd, kept = native.channel_fused_fwd(x, weight, bias, residual, "relu", 0.0, *OPTIONS, keep=True)
    for activation, bits in (("gelu", kept), ("relu", kept[:-1])):
        with pytest.raises(RuntimeError, match="bits of z are kept for relu"):
            native.channel_fused_bwd(dy, x, bits, weight, bias, activation, 0.0, mean, rstd, True, (True, F32, F32, True))


def test_the_residual_is_not_needed_again():
    """As in torch.nn: it may change between forward and backward, and second derivatives come of the bits."""
    x, dy, residual, weight, bias = (t.double() for t in inputs((4, 6, 5, 7), F64, "dense"))
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]

    def gradients(change):
        r = residual * 1
        y = batch_norm(x, None, None, weight, bias, training=True, activation="relu", residual=r)
        if change:
            with torch.no_grad():
                r.add_(1)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
