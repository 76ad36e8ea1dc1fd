"""torch.compile, torch.export, fake tensors, dispatch modes and DTensor, for both values of fastnorm.config.compile."""

import copy
import io
import re

import pytest
import sharded
import torch
import torch._inductor.config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastnorm

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Inductor's C++ without vectors and precompiled headers compiles in a third of the time.
INDUCTOR = {"cpp.simdlen": 1, "cpp_cache_precompile_headers": False, "compile_threads": 1}
NORMS = [
    pytest.param("LayerNorm", (4, 6), id="LayerNorm"),
    pytest.param("BatchNorm1d", (4, 6), id="BatchNorm1d"),
    pytest.param("BatchNorm2d", (2, 6, 3, 5), id="BatchNorm2d"),
    pytest.param("BatchNorm3d", (2, 6, 3, 2, 4), id="BatchNorm3d"),
]
norms = pytest.mark.parametrize(("name", "shape"), NORMS)


@pytest.fixture(params=["torch", "fastnorm"])
def setting(request):
    with fastnorm.config.patch(compile=request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(torch.nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), fastnorm.LayerNorm(8), torch.nn.ReLU(), fastnorm.BatchNorm1d(8, momentum=momentum)
        )

    def forward(self, x):
        return self.layers(x)


def step(module, x):
    """y and all gradients."""
    x = x.clone().requires_grad_()
    y = module(x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def assert_same_steps(module, shape, compiler="aot_eager", steps=2):
    """Outputs, gradients and buffers of a compiled module and of the module itself."""
    mine = copy.deepcopy(module)
    compiled = torch.compile(mine, fullgraph=True, backend=compiler)
    for i in range(steps):
        x = torch.randn(shape) * (i + 1) + i
        torch.testing.assert_close(step(compiled, x), step(module, x), **CLOSE)
        torch.testing.assert_close(mine.state_dict(), module.state_dict(), **CLOSE)


def targets(graph_module):
    """The norms in a graph, without what belongs to them only in part."""
    return [str(n.target) for n in graph_module.graph.nodes if "_norm" in str(n.target)]


@norms
@pytest.mark.parametrize("training", [True, False])
def test_compile_is_eager(name, shape, training, setting):
    assert_same_steps(getattr(fastnorm, name)(6).train(training), shape)


# A call of x (4, 6, 10) and of another operand, whose sizes have to agree with x's.
BESIDE = {
    "weight of rows": (lambda x, w: fastnorm.layer_norm(x, (10,), w), (10,)),
    "weight of channels": (lambda x, w: fastnorm.batch_norm(x, None, None, w, training=True), (6,)),
    "weight of groups": (lambda x, w: fastnorm.group_norm(x, 2, w, activation="silu"), (6,)),
    "residual of rows": (lambda x, r: fastnorm.layer_norm(x, (10,), residual=r), (4, 6, 10)),
    "residual of channels": (lambda x, r: fastnorm.batch_norm(x, None, None, training=True, residual=r), (4, 6, 10)),
    "residual of ghosts": (
        lambda x, r: fastnorm.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2, residual=r),
        (4, 6, 10),
    ),
    "stream": (lambda x, r: fastnorm.add_layer_norm(x, r, (10,)), (4, 6, 10)),
    "row_scale": (lambda x, s: fastnorm.add_rms_norm(x, x, (10,), row_scale=s), (4, 6)),
    "modulation": (lambda x, s: fastnorm.modulated_layer_norm(x, (10,), s, s), (4, 1, 10)),
    "mask of rows": (lambda x, m: fastnorm.layer_norm(x, (10,), mask=m > 0), (4, 6)),
    "mask of channels": (lambda x, m: fastnorm.batch_norm(x, None, None, training=True, mask=m > 0), (4, 10)),
    "broadcast mask": (lambda x, m: fastnorm.batch_norm(x, None, None, training=True, mask=m > 0), (1, 10)),
    "lengths": (lambda x, n: fastnorm.batch_norm(x, None, None, training=True, lengths=n.abs().long() + 1), (4,)),
}


@pytest.mark.parametrize("symbolic", ["x", "other"])
@pytest.mark.parametrize("case", BESIDE)
def test_one_operand_of_symbolic_sizes(case, symbolic):
    """As after a batch of another shape: Dynamo knows the sizes of one operand as symbols, of the other as numbers."""
    call, shape = BESIDE[case]
    x, other = torch.randn(4, 6, 10), torch.randn(shape)
    marked = x if symbolic == "x" else other
    for dimension, size in enumerate(marked.shape):
        if size > 1:
            torch._dynamo.maybe_mark_dynamic(marked, dimension)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, other), call(x, other), **CLOSE)


def test_inductor(setting):
    with torch._inductor.config.patch(INDUCTOR):
        assert_same_steps(Network(momentum=None), (4, 6), "inductor", steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_cumulative_average(dtype, compiled, setting):
    """momentum=None is torch.nn's, within one rounding a step, and compiles in one graph, which torch.nn's does not."""
    ours = fastnorm.BatchNorm1d(6, momentum=None, dtype=dtype)
    theirs = torch.nn.BatchNorm1d(6, momentum=None, dtype=dtype)
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for i in range(5):
        x = torch.randn(8, 6, dtype=dtype) * (i + 1) + i
        torch.testing.assert_close(run(x), theirs(x), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=(i + 2) * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert ours.num_batches_tracked == 5


@pytest.mark.parametrize("shape", [(8, 5), (1, 6), (0, 6)])
def test_cumulative_average_of_no_batch(shape):
    """A call that raises leaves the statistics and the counter alone, an empty batch only the statistics."""
    norm = fastnorm.BatchNorm1d(6, momentum=None)
    norm(torch.randn(8, 6))
    before = copy.deepcopy(norm.state_dict())
    if shape[0]:
        with pytest.raises((ValueError, RuntimeError)):
            norm(torch.randn(shape))
    else:
        norm(torch.randn(shape))
        before["num_batches_tracked"] += 1
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))


@pytest.mark.parametrize("case", ["training", "evaluation", "cumulative", "channels_last"])
def test_no_recompilation(case, setting):
    """None for another batch size than the first two, nor for another step."""
    network, shape = Network(None if case == "cumulative" else 0.1), (6,)
    memory_format = torch.contiguous_format
    if case == "channels_last":
        network, shape, memory_format = fastnorm.BatchNorm2d(6), (6, 3, 5), torch.channels_last
    network.train(case != "evaluation")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for batch in (4, 5, 7, 9):
        mine, x = copy.deepcopy(network), torch.randn(batch, *shape).to(memory_format=memory_format)
        torch.testing.assert_close(step(compiled, x), step(mine, x), **CLOSE)
    assert counter.frame_count <= 2


def graphs(module, x):
    """The forward and the backward graph that AOTAutograd hands to a compiler: nodes in order, with the names of states in
    the place of numbers for inputs, and inputs and outputs in no order: Dynamo numbers them as it meets them.
    """
    roles, seen = [], []

    def keep(graph_module, _):
        code = re.sub(r"primals_(\d+)", lambda i: roles[int(i[1]) - 1], graph_module.code)
        lines = (line.split(";")[0] for line in code.splitlines())
        either = lambda line: sorted(re.findall(r"\w+", line)) if line.strip().startswith(("def ", "return ")) else [line]
        seen.append(list(map(either, lines)))
        return make_boxed_func(graph_module.forward)

    def compiler(graph_module, inputs):
        states = (*dict(module.named_parameters()), *dict(module.named_buffers()))
        for node in graph_module.graph.find_nodes(op="placeholder"):
            roles.append(next((state for state in states if node.target.endswith(f"{state}_")), "input"))
        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph_module, inputs)

    torch.compile(module, fullgraph=True, backend=compiler)(x.clone().requires_grad_()).sum().backward()
    return seen


@norms
@pytest.mark.parametrize("training", [True, False])
def test_by_default_the_graph_is_that_of_torch_nn(name, shape, training):
    """Node for node and in the same order, so compiled code is no slower."""
    x = torch.randn(shape)
    ours = graphs(getattr(fastnorm, name)(6).train(training), x)
    assert len(ours) == 2
    assert ours == graphs(getattr(torch.nn, name)(6).train(training), x)
    with fastnorm.config.patch(compile="fastnorm"):
        forward, backward = graphs(getattr(fastnorm, name)(6).train(training), x)
    assert "torch.ops.fastnorm." in str(forward)
    assert "_backward = torch.ops.fastnorm." in str(backward)
    assert "native" not in str(forward + backward)


def test_the_setting_recompiles():
    counter = CompileCounter()
    compiled = torch.compile(fastnorm.LayerNorm(6), fullgraph=True, backend=counter)
    compiled(torch.randn(4, 6))
    with fastnorm.config.patch(compile="fastnorm"):
        compiled(torch.randn(4, 6))
    assert counter.frame_count == 2


def test_transforms_inside_compiled_code(setting):
    """Per-sample gradients: torch.func goes to torch's own operators whatever the setting."""
    x, w = torch.randn(5, 4, 6), torch.randn(6)
    loss = lambda w, x: fastnorm.layer_norm(x, (6,), w).pow(3).sum()
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    torch.testing.assert_close(torch.compile(grads, fullgraph=True, backend="aot_eager")(w, x), grads(w, x), **CLOSE)


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
def test_mixed_dtypes_that_torch_refuses_compile(name, dtypes):
    dtype, parameters = dtypes
    norm = getattr(fastnorm, name)(6, dtype=parameters).eval()
    x = torch.randn(4, 6, dtype=dtype)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


def test_invalid_calls_raise_as_in_torch(setting):
    calls = (
        lambda f: f.layer_norm(torch.randn(4, 6), (5,)),
        lambda f: f.layer_norm(torch.randn(4, 6), (6,), torch.randn(5)),
        lambda f: f.batch_norm(torch.randn(1, 6), None, None, training=True),
        lambda f: f.batch_norm(torch.randn(4, 6), torch.zeros(5), torch.ones(5)),
        lambda f: f.batch_norm(torch.randn(4, 6), None, None, training=True, eps=-1.0),
    )
    for call in calls:
        messages = []
        for functional in (fastnorm, torch.nn.functional):
            with torch._subclasses.FakeTensorMode(), pytest.raises((RuntimeError, ValueError)) as error:
                call(functional)
            messages.append((error.type, str(error.value)))
        assert messages[0] == messages[1]


def test_autocast_option_inside_compiled_code(setting):
    """On the CPU it changes nothing, and breaks no graph."""
    with fastnorm.config.patch(autocast_keeps_dtype=True):
        assert_same_steps(fastnorm.LayerNorm(6), (4, 6), steps=1)


def test_double_backward_of_compiled_code_raises_as_in_torch(setting):
    messages = []
    for cls in (fastnorm.LayerNorm, torch.nn.LayerNorm):
        x = torch.randn(4, 6, requires_grad=True)
        y = torch.compile(cls(6), fullgraph=True, backend="aot_eager")(x)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward") as error:
            dx.sum().backward()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


BATCH = ({0: torch.export.Dim("batch", min=2)},)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export(training, strict, setting):
    """Saved, loaded and decomposed, with a dynamic batch: the same numbers, the running statistics too."""
    network, buffer = Network().train(training), io.BytesIO()
    exported = torch.export.export(network, (torch.randn(4, 6),), dynamic_shapes=BATCH, strict=strict)
    assert all(("fastnorm" in t) == (setting == "fastnorm") for t in targets(exported.graph_module))
    assert len(targets(exported.graph_module)) == 2
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for program in (exported, loaded, loaded.run_decompositions()):
        mine, module = copy.deepcopy(network), copy.deepcopy(program.module())  # modules of a program share its buffers
        for batch in (7, 3):
            x = torch.randn(batch, 6)
            torch.testing.assert_close(module(x), mine(x), **CLOSE)
        buffers = dict(module.named_buffers())
        assert len(buffers) == 3 or not training
        torch.testing.assert_close(buffers, {name: mine.get_buffer(name) for name in buffers}, **CLOSE)


def test_aot_inductor(setting, tmp_path):
    network = torch.nn.Sequential(fastnorm.LayerNorm(6), fastnorm.BatchNorm1d(6)).eval()
    exported = torch.export.export(network, (torch.randn(4, 6),), dynamic_shapes=BATCH)
    options = {**INDUCTOR, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with torch._inductor.config.patch(options):
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "network.pt2"))
    x = torch.randn(9, 6)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), network(x), **CLOSE)


def test_fake_and_meta_tensors(setting, backend):
    with torch._subclasses.FakeTensorMode():
        network = Network()
        y = network(torch.randn(4, 6))
        y.sum().backward()
        assert y.shape == (4, 8)
        assert all(p.grad.shape == p.shape for p in network.parameters())
    assert fastnorm.layer_norm(torch.empty(4, 6, device="meta"), (6,)).device.type == "meta"


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode, setting):
    x, norm = torch.randn(4, 6), fastnorm.LayerNorm(6, elementwise_affine=False)
    graph = make_fx(norm, tracing_mode=mode)(x)
    assert targets(graph)[0].startswith("fastnorm" if setting == "fastnorm" else "aten")
    torch.testing.assert_close(graph(x), norm(x))


def test_selective_checkpointing_sees_the_norm(setting):
    """A policy that keeps the norm: it is not computed again."""
    seen, norm = [], fastnorm.LayerNorm(6)

    def policy(context, op, *args, **kwargs):
        seen.append((str(op), context.is_recompute))
        return CheckpointPolicy.MUST_SAVE if "layer_norm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)
    kept = lambda x: checkpoint(lambda x: norm(x).sin(), x, use_reentrant=False, context_fn=contexts)
    x = torch.randn(4, 6)
    plain = lambda x: norm(x).sin()
    kept.parameters = plain.parameters = norm.parameters
    torch.testing.assert_close(step(kept, x), step(plain, x), **CLOSE)
    op = "fastnorm.layer_norm.default" if setting == "fastnorm" else "aten.native_layer_norm.default"
    assert (op, False) in seen


def test_rows_sharded_as_dtensors(tmp_path):
    """Over any leading dimension: y, dx, dweight and dbias of two processes are those of one."""
    torch.multiprocessing.spawn(sharded.rows_in_two_processes, (tmp_path / "init",), 2)
    assert {path.name for path in tmp_path.glob("agreed-*")} == {"agreed-0", "agreed-1"}
