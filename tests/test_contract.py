"""What a backend is handed at the edge of the contract, and what the compiled one refuses before it takes a pointer."""

import pytest
import torch
from cases import Case
from compare import gradients

import fastnorm
from fastnorm import dispatch


def test_fresh_memory_is_full_of_nan():
    """Otherwise an output that a kernel forgets to write could pass by luck."""
    assert torch.empty(4).isnan().all()
    assert torch.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()


def test_parameters_of_any_strides(backend, device):
    every_second = lambda p: torch.stack((p, p + 1), 1).flatten()[::2]
    for function, x, dy, weight, bias in (
        (lambda x, w, b: fastnorm.layer_norm(x, (20,), w, b), *Case((9, 20)).make_rows(device)),
        (lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True), *Case((9, 20)).make_channels(device)),
    ):
        dense = gradients(function, x, dy, weight, bias)
        strided = gradients(function, x, dy, every_second(weight), every_second(bias))
        assert all(torch.equal(dense[name], strided[name]) for name in dense)


def test_gradients_are_fresh_tensors(backend, device):
    """No result aliases an input or another result."""
    x, dy, weight, bias = Case((9, 20)).make_rows(device)
    _, mean, rstd = backend.row_fwd(x, weight, bias, 1e-5, 20)
    results = backend.row_bwd(dy, x, weight, mean, rstd, (True, torch.float32, torch.float32))
    pointers = [t.untyped_storage().data_ptr() for t in (*results[:2], x, dy, weight, bias)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 20), (3, 9000)])
def test_a_half_input_with_a_float32_output(shape, half, backend, device):
    """What autocast's layer_norm is: no rounding between the statistics and y, nor between dy and the sums."""
    x, _, weight, bias = Case(shape, dtype=half).make_rows(device)
    dy = torch.randn(shape, device=device)
    wide = x.double().requires_grad_(), weight.double().requires_grad_(), bias.double().requires_grad_()
    expected = torch.nn.functional.layer_norm(wide[0], shape[1:], *wide[1:])
    grads = torch.autograd.grad(expected, wide, dy.double())
    y, mean, rstd = backend.row_fwd(x, weight, bias, 1e-5, shape[1], torch.float32)
    dx, dweight, dbias = backend.row_bwd(dy, x, weight, mean, rstd, (True, torch.float32, torch.float32))
    assert y.dtype == torch.float32
    assert dx.dtype == half
    for got, truth in zip((y, dweight, dbias), (expected, *grads[1:]), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=2e-6)
    rounding = torch.finfo(half).eps / 2 * grads[0].abs().max().item()
    torch.testing.assert_close(dx.double(), grads[0], rtol=0, atol=rounding + 2e-6)


@pytest.fixture
def native():
    backend = dispatch.BACKENDS[dispatch.NAMES.index("native")]
    if reason := backend.why_not("cpu"):
        pytest.skip(reason)
    return backend.load()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n, x, s: n.row_fwd(x.long(), None, None, 1e-5, 6), "read float64, float32, bfloat16 and float16"),
        (lambda n, x, s: n.row_fwd(x, None, None, 1e-5, 7), "is not rows of 7"),
        (lambda n, x, s: n.row_fwd(x.to("meta"), None, None, 1e-5, 6), "x as a strided CPU or CUDA tensor, got one on meta"),
        (lambda n, x, s: n.row_fwd(x, torch.ones(5), None, 1e-5, 6), "weight should have 6 elements, got 5"),
        (lambda n, x, s: n.row_bwd(x[:2], x, None, s[0], s[1], (True, None, None)), "dy should have 24 elements, got 12"),
        (lambda n, x, s: n.row_bwd(x, x, None, s[0].double(), s[1], (True, None, None)), "mean should be contiguous and Float"),
        (lambda n, x, s: n.row_bwd(x, x, None, s[0][:1], s[1], (True, None, None)), "mean should have 8 elements, got 4"),
        (lambda n, x, s: n.group_fwd(x, None, None, "relu", 0.0, 1e-5, 4), "6 channels of 4 samples are not 16 groups"),
        (lambda n, x, s: n.group_fwd(x, torch.ones(5), None, "relu", 0.0, 1e-5, 3), "weight should have 6 elements, got 5"),
        (lambda n, x, s: n.group_fwd(x, None, None, "swish", 0.0, 1e-5, 3), "no activation swish"),
        (lambda n, x, s: n.group_bwd(x[:2], x, None, None, "relu", 0.0, *s, (True, None, None)), "dy should have x's shape"),
        (lambda n, x, s: n.row_fused_fwd(x, None, torch.ones(18), None, None, "relu", 0.0, 1e-5, 6), "has no parts for 4 rows"),
        (
            lambda n, x, s: n.row_fused_fwd(x, None, torch.ones(12), torch.ones(6), None, "relu", 0.0, 1e-5, 6),
            "should have 12",
        ),
        (lambda n, x, s: n.channel_stats(x[0]), "x should have two or more dimensions"),
        (lambda n, x, s: n.channel_fwd(x, None, None, None, None, False, 0.1, 1e-5), "always in evaluation"),
        (lambda n, x, s: n.channel_fwd(x, None, None, torch.ones(5), torch.ones(5), True, 0.1, 1e-5), "should have 6 elements"),
        (lambda n, x, s: n.channel_sums(x[:2], x, s[0], s[1]), "dy should have x's shape"),
        (lambda n, x, s: n.channel_grad(x, x, torch.ones(2, 6), torch.ones(6), None, torch.ones(6), None), "given together"),
    ],
)
def test_the_compiled_backend_checks_what_it_reads(call, words, native):
    x = torch.randn(4, 6)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        call(native, x, (torch.zeros(2, 4), torch.ones(4)))
