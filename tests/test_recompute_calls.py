"""recompute="output" of the functions: what is kept and freed, what is refused, and the calls that go their usual way."""

import gc
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32
from recomputed import LAYERS, LEAKY, is_recomputed, leaves, saved
from torch.multiprocessing.reductions import StorageWeakRef

import fastnorm
from fastnorm import recompute

# ---------------------------------------------------------------- what is kept

every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("activation", [None, LEAKY])
def test_saved_bytes(name, activation, backend, device):
    """y and statistics; of two columns that are kept those, and where they are."""
    x, w, b = leaves(device)
    call = lambda: LAYERS[name](x * 1, w, b, activation=activation, recompute="output")
    statistics = 3 * 4 * (32 if name == "batch_norm" else 16)  # mean pair and rstd
    for more in (0, 2 * (8 + 16 * 4)):
        y, kept = saved(call)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not w and t is not b}
        assert y.untyped_storage().data_ptr() in storages
        assert sum(storages.values()) == 16 * 32 * 4 + statistics + more
        with torch.no_grad():
            w[3:5] = 0


@every_layer
def test_x_is_freed(name, backend, device):
    """As soon as nobody else has it, which without recompute is after backward."""
    for how, freed in (("output", True), (None, False)):
        leaf, w, b = leaves(device)
        x = leaf * 1
        storage = StorageWeakRef(x.untyped_storage())
        y = LAYERS[name](x, w, b, activation=LEAKY, recompute=how)
        del x
        gc.collect()  # Triton's interpreter leaves cycles of its own
        assert storage.expired() == freed
        y.sum().backward()
        gc.collect()
        assert storage.expired()
        assert leaf.grad.isfinite().all()


@every_layer
def test_no_cycle(name, backend, device):
    """y, which its own graph keeps, is freed with the last who has it."""
    y = LAYERS[name](*leaves(device), recompute="output")
    storage = StorageWeakRef(y.untyped_storage())
    gc.collect()  # Triton's interpreter leaves cycles of its own
    gc.disable()
    try:
        del y
        assert storage.expired()
    finally:
        gc.enable()


@every_layer
def test_nothing_is_kept_where_no_gradient_is_asked_for(name, monkeypatch, backend, device):
    """Nor looked at, for which the host would wait."""
    x, w, b = leaves(device)
    monkeypatch.setattr(recompute, "lost", None)
    with torch.no_grad():
        y, kept = saved(lambda: LAYERS[name](x, w, b, recompute="output"))
    assert (y.grad_fn, kept) == (None, [])
    y, kept = saved(lambda: LAYERS[name](x.detach(), w.detach(), b.detach(), recompute="output"))
    assert (y.grad_fn, kept) == (None, [])
    assert torch.equal(y, LAYERS[name](x, w, b))


@every_layer
def test_gradients_of_some(name, backend, device):
    """Those of all, whichever of the inputs ask for one."""
    every = leaves(device)
    used = every[: 2 if name == "rms_norm" else 3]
    dy = torch.randn(16, 32, device=device)
    expected = torch.autograd.grad(LAYERS[name](*every, activation=LEAKY, recompute="output"), used, dy)
    for wanted in itertools.product((False, True), repeat=len(used)):
        if any(wanted):
            some = [t.detach().requires_grad_(asks) for t, asks in zip(used, wanted, strict=True)]
            y = LAYERS[name](*some, *every[len(some) :], activation=LEAKY, recompute="output")
            got = torch.autograd.grad(y, [t for t in some if t.requires_grad], dy)
            for a, b in zip(got, itertools.compress(expected, wanted), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_layer
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parts(name, dtype, monkeypatch, backend, device):
    """x is computed by parts of the batch: the same bits, however large they are."""
    results = []
    for elements in (1 << 20, 100, 1):
        monkeypatch.setattr(recompute, "AT_ONCE", elements)
        monkeypatch.setattr(recompute, "AT_ONCE_ON_GPUS", elements)
        x, w, b = leaves(device, dtype)
        results.append(torch.autograd.grad(LAYERS[name](x, w, b, activation=LEAKY, recompute="output").sin().sum(), (x, w)))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# ---------------------------------------------------------------- what is refused, and the other ways


@every_layer
def test_there_is_no_second_derivative(name, backend, device):
    """Neither a wrong one."""
    x, w, b = leaves(device)
    function = lambda x: LAYERS[name](x, w, b, activation=LEAKY, recompute="output").sum()
    for call in (
        lambda: torch.autograd.grad(function(x), x, create_graph=True),
        lambda: function(x).backward(create_graph=True),
        lambda: torch.autograd.functional.hessian(function, x),
    ):
        with pytest.raises(RuntimeError, match="differentiable once: leave it away for create_graph=True"):
            call()
    assert x.grad is None


@every_layer
def test_batched_gradients(name, backend, device):
    """By torch's operators."""
    x, w, b = leaves(device)
    y = LAYERS[name](x, w, b, activation=LEAKY, recompute="output")
    dys = torch.randn(3, *y.shape, device=device)
    batched = torch.autograd.grad(y, (x, w), dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for one, all_ in zip(torch.autograd.grad(y, (x, w), dy, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(all_[i], one, rtol=1e-5, atol=1e-5)


@every_layer
def test_changes_in_place_are_noticed(name, backend, device):
    for change in (0, 1):
        x, w, b = leaves(device)
        y = LAYERS[name](x, w, b, recompute="output")
        with torch.no_grad():
            (y, w)[change].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_layer
def test_traced_calls_go_their_usual_way(name, backend, device):
    every = leaves(device)
    ours = lambda x, w, b: LAYERS[name](x, w, b, activation=LEAKY, recompute="output").sin().sum()
    usual = lambda x, w, b: LAYERS[name](x, w, b, activation=LEAKY).sin().sum()
    used = every[: 2 if name == "rms_norm" else 3]
    expected = torch.autograd.grad(usual(*every), used)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for got in (
        torch.autograd.grad(compiled(*every), used),
        torch.func.grad(ours, tuple(range(len(used))))(*every),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    x, w, b = (t.detach() for t in every)
    tangents = [torch.func.jvp(lambda x, f=f: f(x, w, b), (x,), (torch.ones_like(x).cumsum(1),))[1] for f in (ours, usual)]
    torch.testing.assert_close(*tangents)
    torch.func.hessian(lambda x: ours(x, w, b))(x[:2])


@every_layer
def test_what_a_gpu_has_another_way_for(name, monkeypatch, backend, device):
    """Autocast, which widens layer_norm's y alone, and the capture of a graph; here only the questions are answered."""
    for question in ("captured", "autocasts"):
        with monkeypatch.context() as patch:
            patch.setattr(recompute, question, lambda x: True)
            y = LAYERS[name](*leaves(device), recompute="output")
        assert is_recomputed(y) == (question == "autocasts" and name == "batch_norm")
    if device == "cuda":
        x, w, b = leaves(device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert not is_recomputed(LAYERS[name](x, w, b, recompute="output"))


class Sub(torch.Tensor):
    pass


def refuses_inference_tensors(call):
    try:
        call()
    except RuntimeError as e:
        return str(e).startswith("Inference tensors cannot be saved for backward")
    return False


@every_layer
def test_subclasses_and_inference_tensors(name, backend, device):
    x, w, b = leaves(device)
    y = LAYERS[name](x.as_subclass(Sub), w, b, recompute="output")
    assert type(y) is Sub
    assert not is_recomputed(y)
    with torch.inference_mode():
        x = torch.randn(16, 32, device=device)
    # torch's rms_norm saves none of them on a CPU, and does on a GPU.
    if name == "rms_norm" and not refuses_inference_tensors(partial(F.rms_norm, x, w.shape, w)):
        assert not is_recomputed(LAYERS[name](x, w, b, recompute="output"))
    else:
        assert refuses_inference_tensors(partial(LAYERS[name], x, w, b, recompute="output"))


@pytest.mark.parametrize("wrong", ["input", True, 1, "", ("output",), torch.ones(2)])
def test_what_recompute_is_not(wrong, backend, device):
    x, w, b = leaves(device)
    for call in LAYERS.values():
        with pytest.raises(ValueError, match="recompute is None or 'output', not"):
            call(x, w, b, recompute=wrong)


NOT_INVERTED = [
    "relu",
    "elu",
    "silu",
    "gelu",
    "sigmoid",
    ("leaky_relu", 0.0),
    ("leaky_relu", -0.1),
    ("leaky_relu", float("inf")),
]


@pytest.mark.parametrize("activation", [*NOT_INVERTED, ("leaky_relu", float("nan"))], ids=str)
def test_activations_without_an_inverse(activation, backend, device):
    x, w, b = leaves(device)
    running = torch.zeros(32, device=device), torch.ones(32, device=device)
    calls = [lambda call=call: call(x, w, b, activation=activation, recompute="output") for call in LAYERS.values()]
    for training in (True, False):
        options = {"training": training, "activation": activation, "recompute": "output"}
        calls.append(lambda options=options: fastnorm.batch_norm(x, *running, **options))
    for call in calls:
        with pytest.raises(
            ValueError, match=r"goes without an activation or with \('leaky_relu', alpha\), alpha > 0, .* given activation="
        ):
            call()
    assert running[0].eq(0).all()


@pytest.mark.parametrize("other", ["residual", "mask", "lengths"])
def test_what_it_does_not_go_with(other, backend, device):
    x, w, b = leaves(device)
    running = torch.zeros(32, device=device), torch.ones(32, device=device)
    given = {"residual": x.detach(), "mask": torch.ones(16, dtype=torch.bool), "lengths": torch.ones(16, dtype=torch.long)}
    extras = {other: given[other].to(device), "recompute": "output"}
    calls = [lambda: LAYERS["layer_norm"](x, w, b, **extras)]
    calls += [lambda t=t: fastnorm.batch_norm(x, *running, training=t, **extras) for t in (True, False)]
    if other == "residual":
        calls.append(lambda: LAYERS["rms_norm"](x, w, b, **extras))
    for call in calls:
        with pytest.raises(ValueError, match=f"inverts a norm and its activation alone, and here is {other} as well"):
            call()
    assert running[0].eq(0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda **o: fastnorm.layer_norm(torch.randn(3, 6), (5,), torch.ones(5, requires_grad=True), **o),
        lambda **o: fastnorm.layer_norm("x", (5,), **o),
        lambda **o: fastnorm.layer_norm(torch.randn(3, 6, requires_grad=True), (6,), torch.ones(5), **o),
        lambda **o: fastnorm.rms_norm(torch.randn(3, 6, requires_grad=True), (5,), **o),
        lambda **o: fastnorm.batch_norm(torch.randn(1, 6, requires_grad=True), None, None, training=True, **o),
        lambda **o: fastnorm.batch_norm(torch.randn(4, 6, requires_grad=True), None, None, **o),
        lambda **o: fastnorm.batch_norm(
            torch.randn(4, 6, requires_grad=True), torch.zeros(5), torch.ones(5), training=True, **o
        ),
        lambda **o: fastnorm.batch_norm(torch.randn(4, 6, requires_grad=True), "m", "v", **o),
    ],
)
def test_invalid_calls(call, backend, device):
    """torch's own exceptions, as without recompute."""
    outcomes = []
    for options in ({}, {"recompute": "output"}):
        with torch.device(device), pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
            call(**options)
        outcomes.append((raised.type, str(raised.value)))
    assert outcomes[0] == outcomes[1]


@every_layer
def test_empty_inputs(name, backend, device):
    _, w, b = leaves(device)
    x = torch.empty(0, 32, device=device, requires_grad=True)
    outcomes = []
    for how in (None, "output"):
        try:
            y = LAYERS[name](x, w, b, recompute=how)
            outcomes.append([y.shape, *(None if t is None else t.tolist() for t in torch.autograd.grad(y.sum(), (x, w)))])
        except ValueError as e:
            outcomes.append(str(e))
    assert outcomes[0] == outcomes[1]
