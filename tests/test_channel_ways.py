"""Batch norm's ways through the Triton kernels: one launch; two, of which the second merges; and a launch that merges."""

import itertools

import pytest
import torch
from cases import BF16, F16, F32, F64, WAYS, Case
from compare import Training, assert_no_worse, parameter_dtypes
from conftest import SERVED
from oracle import batch_norm, error, ulp, wide
from test_fused import Fused, cancelling, check, differentiated, dtypes

from fastnorm import heuristics, reference

SLAB = (["_slab_fwd_kernel"], ["_slab_bwd_kernel"])
TWO = (["_channel_stats_kernel", "_channel_apply_kernel"], ["_channel_sums_kernel", "_channel_grad_kernel"])
THREE = (
    ["_channel_stats_kernel", "_channel_merge_kernel", "_channel_apply_kernel"],
    ["_channel_sums_kernel", "_finalise_kernel", "_channel_grad_kernel"],
)
LAYOUTS = pytest.mark.parametrize("layout", ["dense", "channels_last"])


class Way:
    """The Triton kernels held to one way through forward and backward of training, and what they launched, by name."""

    def __init__(self, name, device, monkeypatch):
        import fastnorm.kernels
        from fastnorm.kernels import channel, channel_tiles, partial, slab

        self.name, self.device, self.kernels, self.launched = name, device, fastnorm.kernels, []
        self.patch = monkeypatch.setattr
        for module in (channel, channel_tiles, partial, slab):
            self.patch(module, "launch", self._recording(module.launch))
        if name != "slab":  # small tiles, so that small tensors have many
            self.patch(heuristics, "slab", lambda *sizes, **layout: None)
            for table in ("READINGS", "HELD"):
                small = {name: dict.fromkeys((2, 4, 8), (128, 4, 2, 8, None)) for name in getattr(heuristics, table)}
                self.patch(heuristics, table, small)
            self.patch(heuristics, "MERGED_WITH_READING", 2048 if name == "two" else 0)
            self.patch(heuristics, "LEADING", heuristics.LEADING if name == "two" else 0)

    @property
    def launches(self):
        """Of forward and backward."""
        return {"slab": SLAB, "two": TWO, "three": THREE}[self.name]

    def _recording(self, launch):
        def run(kernel, *args, **options):
            self.launched.append(kernel.fn.__name__)
            return launch(kernel, *args, **options)

        return run

    def train(self, x, dy, weight=None, bias=None, running=(None, None), momentum=0.1, eps=1e-5, counter=None):
        """y, dx, dweight and dbias by name, and a function of `need` that runs the backward again."""
        self.kernels.forget()  # plans are kept by what the kernels are given, not by what the heuristics say
        forward, backward = self.launches
        y, mean, rstd = self.kernels.channel_fwd(x, weight, bias, *running, True, momentum, eps, counter)
        assert self.launched == forward
        again = lambda need: self.kernels.channel_bwd(dy, x, weight, mean, rstd, True, need)
        dx, dweight, dbias = again((True, *parameter_dtypes(weight, bias)))
        assert self.launched == forward + backward
        found = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        return {name: t for name, t in found.items() if t is not None}, again


@pytest.fixture(params=["slab", "two", "three"])
def name(request):
    return request.param


@pytest.fixture(
    params=[device for backend, device in SERVED if backend.name == "triton"], ids=lambda device: f"triton-{device}"
)
def way(name, request, monkeypatch):
    way = Way(name, request.param, monkeypatch)
    yield way
    way.kernels.forget()


@pytest.mark.parametrize("case", WAYS, ids=str)
def test_every_way_is_as_right(case, way):
    inputs = case.make_channels(way.device)
    truth = Training.truth(case, *inputs)
    for name, t in way.train(*inputs, eps=case.eps)[0].items():
        assert_no_worse(Training, case, name, t, truth, way.kernels)


@pytest.mark.parametrize("dtype", [F32, BF16])
@LAYOUTS
def test_running_statistics(dtype, layout, way):
    case = Case((6, 7, 4, 3), layout=layout, offset=2.0)
    x, dy, weight, bias = case.make_channels(way.device)
    mean, var = case.running(way.device, dtype)
    truth, part = batch_norm(x), 0.37
    unbiased = truth.var * truth.count / (truth.count - 1)
    expected = [wide(old) * (1 - part) + new * part for old, new in ((mean, truth.mean), (var, unbiased))]
    counter = torch.tensor(41, device=way.device)
    way.train(x, dy, weight, bias, (mean, var), part, counter=counter)
    assert counter == 42
    for t, right in zip((mean, var), expected, strict=True):
        assert error(t, right) <= 2 * ulp(dtype, abs(right).max())


def test_only_what_is_needed(way):
    x, dy, weight, bias = Case((5, 7, 6, 5)).make_channels(way.device)
    _, again = way.train(x, dy, weight, bias)
    full = again((True, F32, BF16))
    for need in itertools.product((True, False), (F32, None), (BF16, None)):
        for got, expected, wanted in zip(again(need), full, need, strict=True):
            assert (got is not None) == bool(wanted), need
            assert got is None or torch.equal(got, expected), need


@LAYOUTS
def test_huge_values_stay_finite_and_right(layout, way):
    x, dy, _, _ = Case((4, 5, 9, 5), layout=layout, scale=1e30).make_channels(way.device)
    truth, (ours, _) = batch_norm(x, dy=dy), way.train(x, dy)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5 * abs(truth.dx).max()


@LAYOUTS
def test_mean_far_from_zero(layout, way):
    x, dy, _, _ = Case((8, 5, 8, 8), layout=layout, offset=1e4).make_channels(way.device)
    truth, (ours, _) = batch_norm(x, dy=dy), way.train(x, dy)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@LAYOUTS
def test_not_finite_input_spoils_its_channel_alone(bad, layout, way):
    x, dy, _, _ = Case((4, 5, 5, 5), layout=layout).make_channels(way.device)
    x[1, 1, 2, 3] = bad
    mean = torch.zeros(5, device=way.device)
    ours, _ = way.train(x, dy, running=(mean, torch.ones_like(mean)), momentum=1.0)
    for t in (ours["y"], ours["dx"]):
        assert t.isnan().any((0, 2, 3)).tolist() == [False, True, False, False, False]
    assert mean.isfinite().tolist() == [True, False, True, True, True]
    assert bad != bad or mean[1] == bad


def test_constant_channels_are_zero(way):
    for value in (0.0, 3.0, 1e4):
        x = torch.full((4, 3, 7), value, device=way.device)
        ours, _ = way.train(x, torch.ones_like(x))
        assert torch.equal(ours["y"], torch.zeros_like(x))
        assert torch.equal(ours["dx"], torch.zeros_like(x))
        way.launched.clear()


FUSED = [
    *(Fused(Case((4, 5, 5, 7), layout=layout), "gelu", residual=residual)
      for layout in ("dense", "channels_last") for residual in (None, "dense", "channels_last")),
    *(Fused(Case((3, 8, 7, 7), layout=layout, dtype=BF16, weight=BF16, bias=F32), "silu", residual="dense")
      for layout in ("dense", "every_second", "expanded")),
    *(Fused(Case((2, 8, 5, 27), dtype=F16), activation, residual=residual)
      for activation, residual in (("identity", "dense"), ("leaky_relu", None), ("relu", "row_strided"))),
    *(Fused(Case((40, 9), weight=weight, bias=bias), "elu", residual="mT") for weight, bias in ((None, F32), (F32, None))),
    Fused(Case((3, 5, 8, 3), layout="channels_last", dtype=BF16, weight=None, bias=None), "relu", residual="channels_last"),
    Fused(Case((5, 3, 16), dtype=F64, weight=F64, bias=F64), "tanh", residual="dense"),
]  # fmt: skip


@pytest.mark.parametrize("fused", FUSED, ids=str)
def test_every_way_is_as_right_with_what_surrounds_a_norm(fused, way):
    x, dy, weight, bias, _, residual, _ = inputs = fused.inputs(way.device, 0, False)
    truth = differentiated("channels", fused, F64, *inputs)
    around, (forward, backward) = (residual, fused.activation, fused.alpha), way.launches
    way.kernels.forget()
    y, mean, rstd, _ = way.kernels.channel_fused_fwd(x, weight, bias, *around, None, None, True, 0.1, fused.case.eps)
    assert way.launched == forward
    need = (True, *dtypes(weight, bias), residual is not None)
    end = (residual, weight, bias, *around[1:])
    gradients = way.kernels.channel_fused_bwd(dy, x, *end, mean, rstd, True, need)
    assert way.launched == forward + backward
    found = dict(zip(("y", "dx", "dweight", "dbias", "dresidual"), (y, *gradients), strict=True))
    terms = cancelling("channels", fused, x, weight, truth["dz"])
    check("channels", fused, {name: t for name, t in found.items() if t is not None}, truth, way.device, terms)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("residual", [None, "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_needed_with_what_surrounds_a_norm(activation, residual, training, way):
    """Whatever is wanted together, and whichever launch makes it."""
    x, dy, weight, bias, _, residual, _ = Fused(Case((4, 2, 5, 7)), residual=residual).inputs(way.device, 0, False)
    way.kernels.forget()
    _, mean, rstd = reference.channel_fwd(x, None, None, None, None, True, 0.1, 1e-5)
    run = lambda backend, need: backend.channel_fused_bwd(
        dy, x, residual, weight, bias, activation, 0.0, mean, rstd, training, need
    )
    dtypes = ((True, False), (F32, None), (BF16, None), (True, False) if residual is not None else (False,))
    for need in itertools.product(*dtypes):
        for got, expected, wanted in zip(run(way.kernels, need), run(reference, need), need, strict=True):
            assert (got is not None) == bool(wanted)
            if wanted:
                torch.testing.assert_close(got, expected, rtol=2e-6 if got.dtype == F32 else 1e-2, atol=1e-5)
