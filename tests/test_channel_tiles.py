"""How the Triton kernels see the memory of channels: rows that start anywhere, and what is loaded for them."""

from unittest import mock

import pytest
import torch
from cases import BF16, F16, F32, F64, LAYOUTS
from conftest import SERVED

pytestmark = pytest.mark.skipif(all(b.name != "triton" for b, _ in SERVED), reason="the Triton backend serves no device here")


def layout_of(*tensors):
    from fastnorm.kernels.channel_tiles import Layout, described

    return Layout.of(*described(tensors))


def skewed(*tensors):
    from fastnorm.kernels.channel_tiles import SKEWED

    layout = layout_of(*tensors)
    assert (SKEWED in layout.fastest) == (set(layout.fastest) == {SKEWED})
    return SKEWED in layout.fastest


@pytest.mark.parametrize(("shape", "dtype", "expected"), [
    ((4, 8, 7, 7), BF16, True),
    ((4, 8, 7, 7), F16, True),
    ((4, 4, 7, 7), F32, True),
    ((4, 8, 5, 18), BF16, True),  # loads of 4 bytes
    ((4, 8, 91, 91), F32, True),
    ((2, 8, 16383), BF16, True),  # one tile more, of many
    ((1, 8, 7, 7), F32, True),
    ((4, 4, 7, 7), BF16, False),  # a sample is no whole number of vectors
    ((4, 8, 14, 14), BF16, False),  # loads of 8 bytes as it is
    ((4, 8, 7, 7), F64, False),
    ((4, 8, 7, 9), BF16, False),  # half of the tiles would hold nothing else
    ((4, 8, 3), BF16, False),
    ((64, 8), BF16, False),
])  # fmt: skip
def test_rows_that_start_anywhere(shape, dtype, expected):
    assert skewed(torch.empty(shape, dtype=dtype)) == expected


def test_all_tensors_of_a_launch_have_the_same_places():
    of = lambda channel: torch.empty(16 * channel).as_strided((4, 3, 22), (4 * channel, channel, 1))
    assert skewed(of(23), of(27))
    assert skewed(of(25), of(29))
    assert not skewed(of(23), of(25))  # 3 and 1 more than a whole vector
    x = torch.empty(4, 8, 7, 7)
    assert skewed(x, x, x.repeat(2, 1, 1, 1)[::2], x[:1].expand(4, 8, 7, 7))
    for other in (LAYOUTS["channels_last"](x), torch.empty(8, 4, 7, 7).transpose(0, 1), x.bfloat16()):
        assert not skewed(x, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="addresses are seen in Triton's interpreter, which does not run here")
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[::2], lambda t: t[:, 1:9], lambda t: t[1:, 8:]],
                         ids=["dense", "every second sample", "from its second channel", "last channels"])  # fmt: skip
@pytest.mark.parametrize("way", ["slab", "two passes"])
def test_nothing_beside_the_tensor_is_read(way, view, dtype, monkeypatch):
    """A view of memory that is NaN around it: every address lies between its first and its last element."""
    import fastnorm.kernels as K
    from triton.runtime.interpreter import InterpreterBuilder

    from fastnorm import heuristics

    if way == "two passes":
        monkeypatch.setattr(heuristics, "slab", lambda *sizes, **layout: None)
    around = 64
    whole = torch.full((2 * around + 4 * 16 * 25,), torch.nan, dtype=dtype)
    x = view(whole[around:-around].view(4, 16, 5, 5))
    x.copy_(torch.randn(x.shape))
    assert skewed(x)
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    first, last = whole.data_ptr(), whole.data_ptr() + whole.nbytes
    load, seen = InterpreterBuilder.create_masked_load, []

    def masked_load(self, pointers, mask, *rest):
        at = pointers.data[mask.data].astype(int)
        seen.extend(at[(first <= at) & (at < last)])
        return load(self, pointers, mask, *rest)

    K.forget()
    with mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load):
        y, mean, rstd = K.channel_fwd(x, None, None, None, None, True, 0.1, 1e-5)
        dx, _, _ = K.channel_bwd(x, x, None, mean, rstd, True, (True, None, None))
    K.forget()
    assert min(seen) >= x.data_ptr()
    assert max(seen) < x.data_ptr() + length * x.element_size()
    assert len(set(seen)) > x.numel() * 0.99  # all of it was seen
    assert y.isfinite().all()
    assert dx.isfinite().all()
