"""What only the C++ kernels on the CPU have: bits that do not depend on threads, layouts read in place, memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64, LAYOUTS, Case
from oracle import batch_norm, error, layer_norm, ulp

import fastnorm
from fastnorm import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.forced() not in (None, "native") or dispatch.BACKENDS[1].why_not("cpu") is not None,
    reason="these are tests of the native backend, which is not the one in force, or cannot run here",
)


@pytest.fixture(autouse=True)
def _native():
    with fastnorm.use_backend("native"):
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(norm, x, dy, weight, bias):
    """y, dx, dweight, dbias"""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = norm(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


def rows_of(x, w, b):
    return fastnorm.layer_norm(x, x.shape[-1:], w, b)


def channels_of(x, w, b):
    return fastnorm.batch_norm(x, None, None, w, b, True)


def run(case, norm):
    inputs = case.make_rows() if norm is rows_of else case.make_channels()
    return everything(norm, *inputs)


# Enough elements for several threads, and for each way through them: blocks of rows, long rows, short rows; runs in one region
# and in pieces, short runs alone and together, grids in one region (few threads) and in two (many), blocks of a grid, grids too
# narrow for blocks, tiles that are turned round.
MANY = [
    *((rows_of, shape, "dense") for shape in [(3000, 10), (2000, 96), (50000, 64), (700, 768)]),
    *((rows_of, shape, "dense") for shape in [(40, 9000), (66, 33000), (3, 70000)]),
    *((rows_of, shape, layout) for shape in [(600, 520)] for layout in ("row_strided", "transposed")),
    *((channels_of, shape, "dense") for shape in [(16, 24, 30, 30), (2, 3, 300, 300), (64, 96, 7, 7), (40, 200, 9)]),
    *((channels_of, shape, "dense") for shape in [(3000, 70), (100, 2500), (128, 1030), (5, 40, 5000)]),
    *((channels_of, shape, "dense") for shape in [(20, 70, 12, 12), (700, 24, 8, 14), (2000, 20, 4, 4)]),
    *((channels_of, shape, "channels_last") for shape in [(8, 24, 40, 40), (16, 300, 9, 9)]),
    *((channels_of, (4, 150, 500), layout) for layout in ("mT", "transposed", "column_strided")),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("norm", "shape", "layout"), MANY, ids=lambda p: getattr(p, "__name__", str(p)))
def test_the_number_of_threads_does_not_show(norm, shape, layout, dtype, threads):
    case = Case(shape, dtype=dtype, weight=dtype, bias=dtype, layout=layout)
    results = []
    for n in (1, 2, 4, 7):
        threads(n)
        results.append(run(case, norm))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_parts_are_the_same(norm, inputs, places):
    """y and dx of these places along the first dimension, computed alone: the same bits."""
    x, dy, weight, bias = inputs
    y, dx, _, _ = everything(norm, x, dy, weight, bias)
    for place in places:
        part = everything(norm, x[place], dy[place], weight, bias)
        assert torch.equal(part[0], y[place])
        assert torch.equal(part[1], dx[place])


LARGE, SMALL = 48 << 20, 8 << 20  # bytes of a result that goes past the caches, and of one that does not


def parts(n, each_bytes):
    """Places of small parts of n samples: at the beginning, inside, at the end."""
    few = max(1, SMALL // each_bytes)
    return [slice(begin, begin + few) for begin in (0, n // 3, n - few)]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(64, 768), (333, 100), (70, 5000), (70, 5), (70, 9)])
def test_a_row_does_not_depend_on_its_batch(shape, dtype):
    """Alone, in another place, among others: the same bits of y and dx, where four rows are summed together and where not."""
    x, dy, weight, bias = Case(shape, dtype=dtype, weight=dtype, bias=dtype).make_rows()
    places = slice(0, 1), slice(5, 6), slice(3, 47), slice(shape[0] - 2, shape[0])
    assert_parts_are_the_same(rows_of, (x, dy, weight, bias), places)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("N", [64, 2048])
def test_a_row_does_not_depend_on_how_results_are_written(N, dtype):
    """Large results go past the caches, small ones do not."""
    row = N * dtype.itemsize
    rows = LARGE // row + 3
    inputs = Case((rows, N), dtype=dtype, weight=dtype, bias=dtype).make_rows()
    assert_parts_are_the_same(rows_of, inputs, parts(rows, row))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize(("C", "layout"), [(32, "dense"), (32, "channels_last"), (256, "channels_last")])
def test_a_sample_does_not_depend_on_how_results_are_written(C, layout, dtype):
    """The same for channels: in evaluation, where a sample is its own."""
    sample = C * 64 * 64 * dtype.itemsize
    B = LARGE // sample + 3
    mean, var = torch.randn(C).to(dtype), (torch.rand(C) + 0.5).to(dtype)
    norm = lambda x, w, b: fastnorm.batch_norm(x, mean, var, w, b, False)
    inputs = Case((B, C, 64, 64), dtype=dtype, weight=dtype, bias=dtype, layout=layout).make_channels()
    assert_parts_are_the_same(norm, inputs, parts(B, sample))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(16, 24, 26), (8, 25, 23), (1, 61, 67), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("C", [1, 2, 3, 7, 20, 32, 64])
def test_few_channels_last(C, shape, dtype):
    """Several positions are one row where they divide B * H * W, which is 61 * 67 here, too."""
    B, *space = shape
    x, dy, weight, bias = Case((B, C, *space), dtype=dtype, weight=dtype, bias=dtype, layout="channels_last").make_channels()
    dy = LAYOUTS["channels_last"](dy)
    truth = batch_norm(x, weight, bias, dy=dy)
    y, dx, dweight, dbias = everything(channels_of, x, dy, weight, bias)
    eps = 4 * torch.finfo(dtype).eps + 8 * torch.finfo(F64 if dtype == F64 else F32).eps
    assert error(y, truth.y) <= eps * abs(truth.y).max()
    assert error(dx, truth.dx) <= eps * truth.dx_terms
    assert error(dweight, truth.dweight) <= eps * truth.dweight_terms
    assert error(dbias, truth.dbias) <= eps * truth.dbias_terms


SCALES = {
    F64: (1e100, 1e30, 1e11, 1.0, 1e-11, 1e-30, 1e-100),
    F32: (1e30, 1e19, 1e11, 1.0, 1e-11, 1e-17),
    BF16: (1e30, 1e19, 1e11, 1.0, 1e-11, 1e-17),
}


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("shape", [(7, 10), (28, 100), (21, 3000), (14, 40000)], ids=str)
def test_rows_at_the_ends_of_the_range(shape, dtype):
    """Rows of all sizes beside each other; the square of their rstd need not be a number of their dtype."""
    scales = SCALES[dtype]
    x, dy, weight, bias = Case(shape, dtype=dtype, weight=dtype, bias=dtype).make_rows()
    x = (x.double() * torch.tensor(scales, dtype=F64).repeat(shape[0])[: shape[0], None]).to(dtype)
    truth = layer_norm(x, shape[1:], weight, bias, eps=0, dy=dy)
    norm = lambda x, w, b: fastnorm.layer_norm(x, shape[1:], w, b, eps=0)
    y, dx, dweight, dbias = everything(norm, x, dy, weight, bias)
    eps = 4 * torch.finfo(dtype).eps + 8 * torch.finfo(F64 if dtype == F64 else F32).eps
    assert error(y, truth.y) <= eps * abs(truth.y).max()
    for ours, theirs in zip(dx, truth.dx, strict=True):
        assert error(ours, theirs) <= max(eps * abs(theirs).max(), torch.finfo(dtype).smallest_normal)
    assert error(dweight, truth.dweight) <= eps * truth.dweight_terms
    assert error(dbias, truth.dbias) <= eps * truth.dbias_terms


CHANNEL_LAYOUTS = ("dense", "channels_last", "row_strided", "column_strided", "transposed", "mT", "every_second", "expanded")


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1e-19), (1e-17,), (1e18, 1.0), (1e15,)], ids=str)
@pytest.mark.parametrize("N", [10, 1000])
def test_rstd_at_the_ends_of_the_range(N, scales):
    """Without eps, of rows of one size and of very different ones in one block: also where float has no room for a variance."""
    x = torch.randn(64, N) * torch.tensor(scales).repeat_interleave(64 // len(scales))[:, None]
    backend = dispatch.select("cpu")
    _, _, rstd = backend.row_fwd(x, None, None, 0.0, N)
    exact = layer_norm(x, (N,), eps=0.0).rstd.reshape(-1)
    assert (abs(rstd.numpy() / exact - 1) <= 2 * torch.finfo(F32).eps).all()


def test_rstd_of_constant_rows():
    """1 / sqrt(eps), and without eps infinity, beside rows that are not constant."""
    x = torch.randn(8, 10)
    x[::2] = 3.0
    backend = dispatch.select("cpu")
    for eps, expected in ((1e-5, 1e-5**-0.5), (1e-40, 1e20), (0.0, float("inf"))):
        _, _, rstd = backend.row_fwd(x, None, None, eps, 10)
        torch.testing.assert_close(rstd[::2], torch.full((4,), expected), rtol=1e-7, atol=0)
        assert rstd[1::2].isfinite().all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("x_layout", CHANNEL_LAYOUTS)
@pytest.mark.parametrize("dy_layout", ["dense", "channels_last", "transposed", "mT"])
def test_channels_in_every_pair_of_layouts(x_layout, dy_layout, dtype):
    """Sizes that tiles and blocks of 16 by 16 do not divide: the numbers are those of dense copies, to rounding."""
    case = Case((3, 150, 5, 7), dtype=dtype, weight=dtype, bias=dtype)
    x, dy, weight, bias = case.make_channels()
    x, dy = LAYOUTS[x_layout](x), LAYOUTS[dy_layout](dy)
    truth = batch_norm(x, weight, bias, dy=dy)
    eps = torch.finfo(dtype).eps
    for name, t in zip(("y", "dx", "dweight", "dbias"), everything(channels_of, x, dy, weight, bias), strict=True):
        expected = getattr(truth, name)
        bound = 4 * eps * abs(expected).max() + 40 * torch.finfo(F32 if dtype != F64 else F64).eps
        assert error(t, expected) <= bound, name


@pytest.mark.parametrize("layout", ["dense", "row_strided", "column_strided", "transposed", "every_second"])
@pytest.mark.parametrize("shape", [(9, 700), (3, 40000), (64, 33000)])
def test_rows_in_every_layout(layout, shape):
    x, dy, weight, bias = Case(shape).make_rows()
    expected = everything(rows_of, x, dy, weight, bias)
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    for a, b in zip(everything(rows_of, x, dy, weight, bias), expected, strict=True):
        assert torch.equal(a, b)


def test_more_dimensions_than_a_walk_has():
    x = torch.randn([2, 3] + [2] * 10)
    strided = x.permute(0, 1, *range(11, 1, -1)).contiguous().permute(0, 1, *range(11, 1, -1))
    strided = torch.stack((strided, strided), -1)[..., 0]
    weight, bias, dy = torch.randn(3), torch.randn(3), torch.randn(x.shape)
    for a, b in zip(*(everything(channels_of, t, dy, weight, bias) for t in (x, strided)), strict=True):
        torch.testing.assert_close(a, b)
    shape = (2,) * 9
    norm = lambda t, w, b: fastnorm.layer_norm(t, shape, w, b)
    weight, bias = torch.randn(shape), torch.randn(shape)
    for a, b in zip(*(everything(norm, t, dy, weight, bias) for t in (x, strided)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("first", [1e3, -1e5, 0.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
    ("norm", "shape", "layout"),
    [
        *((rows_of, (5, N), "dense") for N in (10, 100, 700, 9000, 40000)),
        *((channels_of, shape, "dense") for shape in [(40, 6), (4, 6, 900), (20, 6, 30), (2, 3, 40000), (18, 50, 120)]),
        *((channels_of, (4, 6, 20, 30), layout) for layout in ("channels_last", "transposed", "mT")),
    ],
)
def test_first_elements_that_are_like_no_other(norm, shape, layout, offset, first):
    """The sums are taken about the first elements' mean: where that is far off the mean, they are taken again."""
    x, dy, _, _ = Case(shape, offset=offset).make_rows()
    beginning = (slice(None), slice(0, 4)) if norm is rows_of else (slice(0, 1), slice(None), *[slice(0, 4)] * (x.dim() - 2))
    x[beginning] += first
    x = LAYOUTS[layout](x)
    if norm is rows_of:
        truth, size = layer_norm(x, shape[-1:], dy=dy), shape[1]
        ours = fastnorm.layer_norm(x, shape[-1:])
    else:
        truth, size = batch_norm(x, dy=dy), x.numel() // shape[1]
        ours = fastnorm.batch_norm(x, None, None, training=True)
    # An outlier is as many deviations off as the root of the elements beside it.
    assert error(ours, truth.y) <= 1e-5 + 4e-7 * np.sqrt(size)


@pytest.mark.parametrize("deviations", [0, 1.9, 3.9, 7.9, 20])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("norm", "shape", "layout"),
    [
        *((rows_of, shape, "dense") for shape in [(512, 768), (4096, 64), (300, 100)]),
        *((channels_of, shape, "dense") for shape in [(8, 16, 3136), (4, 8, 31), (64, 8, 300), (64, 32, 49), (2048, 128)]),
        (channels_of, (64, 24, 100), "dense"),
        (channels_of, (16, 64, 20, 20), "channels_last"),
    ],
)
def test_means_at_any_distance_from_zero(norm, shape, layout, dtype, deviations):
    """Where sums are taken about zero, and where they no longer are: never less exact than torch.nn."""
    parameters = F32 if norm is channels_of else dtype
    case = Case(shape, dtype=dtype, weight=parameters, bias=parameters, layout=layout, offset=deviations)
    x, dy, weight, bias = case.make_channels() if norm is channels_of else case.make_rows()
    running = [[torch.zeros(shape[1]) for _ in "mv"] for _ in "ab"] if norm is channels_of else [[], []]

    def results(functional, running):
        if norm is rows_of:
            return everything(lambda x, w, b: functional.layer_norm(x, shape[-1:], w, b), x, dy, weight, bias)
        return everything(lambda x, w, b: functional.batch_norm(x, *running, w, b, True, 1.0), x, dy, weight, bias)

    ours, torchs = results(fastnorm, running[0]), results(torch.nn.functional, running[1])
    truth = layer_norm(x, shape[-1:], weight, bias, dy=dy) if norm is rows_of else batch_norm(x, weight, bias, dy=dy)
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), ours, torchs, strict=True):
        t = getattr(truth, name)
        assert error(a, t) <= error(b, t) + ulp(a.dtype, abs(t).max()), name
    if running[0]:
        var = x.double().transpose(0, 1).flatten(1).var(1).numpy()
        a, b = (error(r[1], var) for r in running)
        assert a <= b + ulp(F32, var.max()), "running_var"


def test_python_threads_compute_the_same():
    x = torch.randn(300, 200)
    expected = rows_of(x, None, None), channels_of(x, None, None)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: (rows_of(x, None, None), channels_of(x, None, None)), range(40)):
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


FORK = """
import os, signal, torch, fastnorm
torch.set_num_threads(2)
x = torch.randn(3000, 700)
norms = lambda: (fastnorm.layer_norm(x, (700,)), fastnorm.batch_norm(x, None, None, training=True))
results = lambda: [y.numpy().tobytes() for y in norms()]
expected = results()
child = os.fork()
if child == 0:
    signal.alarm(60)  # torch's own operators would wait here for ever, torch.equal as well
    os._exit(0 if results() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_computes_the_same_without_the_threads_of_its_parent():
    environment = {**os.environ, "FASTNORM_BACKEND": "native"}
    run = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "0\n", run.stderr


class NormedRows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = torch.arange(70000.0).sin().view(100, 700) + i
        return fastnorm.layer_norm(x, (700,)), fastnorm.batch_norm(x, None, None, training=True)


def test_workers_of_a_data_loader():
    data = NormedRows()
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    for i, (rows, channels) in enumerate(loader):
        assert torch.equal(rows[0], data[2 * i][0])
        assert torch.equal(channels[1], data[2 * i + 1][1])


MEMORY = """
import sys, torch, fastnorm
kind, layout, backward = sys.argv[1:]
rows = lambda x: fastnorm.layer_norm(x, x.shape[-1:])
channels = lambda x: fastnorm.batch_norm(x, None, None, training=True)
layouts = {
    "dense": lambda b, c, s: torch.randn(b, c, s),
    "mT": lambda b, c, s: torch.randn(b, s, c).mT,
    "transposed": lambda b, c, s: torch.randn(c, b, s).transpose(0, 1),
    "strided": lambda b, c, s: torch.randn(b, c, s, 2)[..., 0],
}
norm = rows if kind == "rows" else channels
warm = layouts[layout](2, 3, 40).requires_grad_()
torch.autograd.grad(norm(warm), warm, torch.ones_like(warm))
x, dy = (layouts[layout](40, 500, 1000) for _ in range(2))
if backward == "backward":
    y = norm(x.requires_grad_())
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is of now
out = torch.autograd.grad(y, x, dy) if backward == "backward" else norm(x)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the peak of a moment")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("kind", "layout"), [("rows", "strided"), ("channels", "mT"), ("channels", "strided")])
def test_no_temporary_of_the_input_s_size(kind, layout, direction):
    """An input of 76 MB grows the process by its result alone, whatever its strides."""
    environment = {**os.environ, "FASTNORM_BACKEND": "native", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", MEMORY, kind, layout, direction]
    grown = float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert 70 < grown < 76.3 + 16


# In a process of its own: numpy advises its memory as well, and the C library hands that on.
FLAGS = """
import sys, torch, fastnorm
y = fastnorm.layer_norm(torch.randn(int(sys.argv[1]) // 1024, 1024), (1024,))
middle, inside = y.data_ptr() + y.nbytes // 2, False
for line in open("/proc/self/smaps"):
    bounds = line.split(" ", 1)[0].split("-")
    if len(bounds) == 2:
        inside = int(bounds[0], 16) <= middle < int(bounds[1], 16)
    elif inside and line.startswith("VmFlags"):
        print(line)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="only Linux tells what a mapping was advised")
@pytest.mark.parametrize(("numel", "advised"), [(9 << 20, True), (2 << 20, True), (1 << 19, False)])
def test_large_results_ask_for_huge_pages(numel, advised):
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("this kernel has no huge pages to ask for")
    environment = {**os.environ, "FASTNORM_BACKEND": "native"}
    command = [sys.executable, "-c", FLAGS, str(numel)]
    flags = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert flags.startswith("VmFlags")
    assert (" hg" in flags) == advised, flags


ENDS = [105.0, 104.0, 100.0, 89.0, 88.5, 87.5, 30.0, 17.0, 1e30, torch.finfo(F32).max, torch.inf]


@pytest.mark.parametrize(("name", "torchs"), [("silu", torch.nn.functional.silu), ("sigmoid", torch.sigmoid)])
def test_activations_made_of_e_to_the_z_at_both_ends(name, torchs):
    """As far as float32 reaches y and dx are what torch's are: zeros, infinities and NaN where those are, at most twice as far
    off elsewhere."""
    x = torch.cat([torch.tensor(ENDS), -torch.tensor(ENDS), torch.linspace(-110, 110, 20001), torch.tensor([torch.nan])])
    mean, var = torch.zeros(1), torch.ones(1)
    norm = lambda x: fastnorm.batch_norm(x.view(1, 1, -1), mean, var, None, None, False, 0.1, 0.0, activation=name).view(-1)
    results = []
    for function, inputs in ((norm, x), (torchs, x), (torchs, x.double())):
        inputs = inputs.clone().requires_grad_()
        y = function(inputs)
        results.append((y.detach(), torch.autograd.grad(y.sum(), inputs)[0]))
    for ours, theirs, truth in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        finite = theirs.isfinite()
        off = [((t.double() - truth).abs() / truth.abs().clamp_min(1e-3))[finite].max() for t in (ours, theirs)]
        assert off[0] <= 2 * off[1]


@pytest.mark.parametrize(
    ("M", "N", "dtype"), [(8300, 128, torch.float32), (4100, 512, torch.float32), (8300, 256, torch.bfloat16)]
)
def test_dx_of_a_row_is_the_same_from_memory(M, N, dtype):
    """Short rows of 12 MB and more are summed one by one, fewer of them four at a time."""
    x, dy = (torch.randn(M, N).to(dtype) for _ in range(2))
    weight = torch.randn(N).to(dtype)

    def dx(rows):
        leaf = x[rows].clone().requires_grad_()
        return torch.autograd.grad(fastnorm.layer_norm(leaf, (N,), weight), leaf, dy[rows].clone())[0]

    with fastnorm.use_backend("native"):
        whole = dx(slice(None))
        assert torch.equal(whole[:9], dx(slice(9)))
        assert torch.equal(whole[-7:], dx(slice(M - 7, M)))
