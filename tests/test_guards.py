"""The compiled backend's every buffer between guard zones: no byte around it is written, and none that is read shows.

In the ordinary suite and, where more is caught, in the process of `make sanitize`.
"""

import ctypes
import os
import subprocess
from math import isnan
from pathlib import Path

import pytest
import torch
from cases import BF16, F16, F32, F64, LAYOUTS, Case
from test_dispatch import python
from torch.utils import cpp_extension

from fastnorm import build, extension, native, reference

# Around the widths of vectors of every dtype, of unrolled loops, register tiles, pieces and chunks.
SIZES = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 49, 64, 65, 100, 129, 255, 513, 1025, 8193, 70001)
MEAN = 1  # the place of the mean, a pair, among the results of the functions that compute one
COMPUTE_A_MEAN = ("row_fwd", "channel_stats", "channel_fwd")
READ_DY_FIRST = ("row_bwd", "channel_sums", "channel_grad", "channel_bwd")


def cases(shapes, layouts):
    """Every shape in every dtype and layout; from one to the next, another combination of parameters."""
    for dtype in (F64, F32, BF16, F16):
        parameters = ((dtype, dtype), (F32, F32), (None, dtype), (F32, None), (None, None))
        for i, shape in enumerate(shapes):
            for j, layout in enumerate(layouts):
                weight, bias = parameters[(i + j) % len(parameters)]
                yield Case(shape, dtype=dtype, weight=weight, bias=bias, layout=layout)


ROWS = [
    *cases([(35 if N < 1000 else 3, N) for N in SIZES], ["dense", "row_strided", "transposed"]),
    *cases([(2, 17, 24), (2, 8, 33)], ["mT"]),
    *cases([(3, 8, 5, 6)], ["channels_last"]),
]
CHANNELS = [
    *cases([(2, 3, S) for S in SIZES], ["dense", "mT"]),
    *cases([(3, C) for C in SIZES], ["dense", "row_strided"]),
    *cases([(2, C, 2, 2) for C in SIZES[:-1]], ["channels_last", "transposed"]),
    *cases([(2, C, 3) for C in SIZES[:-1]], ["dense", "mT"]),
    *cases([(1100, 19), (2, 67, 23, 25)], ["dense"]),
    *cases([(2, 5, 23, 25), (2, 67, 23, 25)], ["channels_last"]),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """guards.cpp, with the flags of the kernels."""
    if reason := native.unavailable("cpu"):
        pytest.skip(reason)
    try:
        compiler = build.compiler()
    except build.BuildError as e:
        pytest.skip(str(e))
    path = tmp_path_factory.mktemp("guards") / "guards.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", *build.flags(build.target_isa())]
    command += [str(Path(__file__).with_name("guards.cpp")), "-o", str(path), "-lc10"]
    command += [f"-I{p}" for p in cpp_extension.include_paths()] + [f"-L{p}" for p in cpp_extension.library_paths()]
    subprocess.run(command, check=True, env={**os.environ, "LD_PRELOAD": ""})  # the compiler itself needs no sanitizer
    library = ctypes.CDLL(str(path))
    library.guards_changed.restype = ctypes.c_int64
    return library


@pytest.fixture
def guards(library):
    """What torch allocates from now on lies between guard zones, and none of their bytes has changed at the end."""
    library.guards_install()
    yield library
    library.guards_remove()
    assert library.guards_changed() == 0


class Guarded:
    """A copy of t in t's strides, from the second element of its own buffer to its last; NaN before it and in its gaps."""

    def __init__(self, t):
        extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        self.buffer = torch.full((1 + extent,), float("nan"), dtype=t.dtype)
        distinct = [n if stride else 1 for n, stride in zip(t.shape, t.stride(), strict=True)]
        self.buffer.as_strided(distinct, t.stride(), 1).copy_(t.as_strided(distinct, t.stride()))
        self.tensor = self.buffer.as_strided(t.shape, t.stride(), 1)
        self.before = self.buffer.clone()
        assert self.tensor.data_ptr() % (2 * t.element_size()) == t.element_size()

    def may_be_written(self):
        self.before.as_strided(self.tensor.shape, self.tensor.stride(), 1).copy_(self.tensor)

    def is_unchanged(self):
        return torch.equal(self.buffer.view(torch.uint8), self.before.view(torch.uint8))


def widened(argument):
    """An argument of the contract for the reference in float64."""
    if isinstance(argument, tuple):
        return tuple(map(widened, argument))
    return argument.double() if isinstance(argument, torch.Tensor) else F64 if isinstance(argument, torch.dtype) else argument


def check(guards, function, *args):
    """On guarded tensors the function gives what the reference gives in float64, and changes only what it is to update."""
    guarded = {i: Guarded(a) for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    ours = getattr(native, function)(*(guarded[i].tensor if i in guarded else a for i, a in enumerate(args)))
    assert guards.guards_changed() == 0, function
    wide, x = widened(args), args[function in READ_DY_FIRST]
    acc = reference.accumulate_dtype(x.dtype)
    truth = getattr(reference, function)(*wide)
    pairs = dict(enumerate(zip(ours, truth, strict=True) if isinstance(ours, tuple) else [(ours, truth)]))
    if function in COMPUTE_A_MEAN:
        pairs[MEAN] = [t.double().sum(0) for t in pairs[MEAN]]
    if function == "channel_fwd" and args[5]:
        updated = [i for i in (3, 4) if i in guarded]  # running_mean, running_var
        pairs |= {f"args[{i}]": (guarded[i].tensor, wide[i]) for i in updated}
        for i in updated:
            guarded[i].may_be_written()
    assert all(g.is_unchanged() for g in guarded.values()), function
    for name, (got, expected) in pairs.items():
        if not isinstance(expected, torch.Tensor):
            assert got == expected, (function, name)
            continue
        assert got.shape == expected.shape, (function, name)
        # One rounding of the result, and those of the terms that it is a sum of, which may be larger than itself.
        size = max(1.0, *(t.abs().max() for t in wide if isinstance(t, torch.Tensor))) * (x.numel() / expected.numel()) ** 0.5
        bound = torch.finfo(got.dtype).eps * expected.abs().max() + 64 * torch.finfo(acc).eps * size
        assert (got.double() - expected).abs().max() <= bound, (function, name)


def gradients_to_take(case, dy):
    """(dy, need): dense, in x's layout, and expanded in another dtype; all, dx alone and the parameters' alone."""
    yield dy, (True, case.weight, case.bias)
    yield LAYOUTS[case.layout](dy), (True, None, None)
    yield LAYOUTS["expanded"](dy.to(F32)), (False, F32, case.dtype)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case, guards):
    x, dy, weight, bias = case.make_rows()
    N, acc = case.shape[-1], reference.accumulate_dtype(x.dtype)
    for dtype in (None, acc):
        check(guards, "row_fwd", x, weight, bias, case.eps, N, dtype)
    _, mean, rstd = reference.row_fwd(x.double(), None, None, case.eps, N)
    statistics = reference.split(mean.sum(0), acc), rstd.to(acc)
    for dy_, need in gradients_to_take(case, dy):
        check(guards, "row_bwd", dy_, x, weight, *statistics, need)


@pytest.mark.parametrize("case", CHANNELS, ids=str)
def test_channels(case, guards):
    x, dy, weight, bias = case.make_channels()
    acc, running = reference.accumulate_dtype(x.dtype), case.running()
    every_second = [torch.stack((t, t), 1)[:, 0] for t in running]
    for statistics, training in ((running, True), (every_second, True), ((None, None), True), (running, False)):
        check(guards, "channel_fwd", x, weight, bias, *statistics, training, 0.3, case.eps)

    _, mean, rstd = reference.channel_fwd(x.double(), None, None, None, None, True, 0.0, case.eps)
    statistics = reference.split(mean.sum(0), acc), rstd.to(acc)
    check(guards, "channel_stats", x)
    check(guards, "channel_apply", x, *statistics, weight, bias)
    for dy_, need in gradients_to_take(case, dy):
        check(guards, "channel_sums", dy_, x, *statistics)
        check(guards, "channel_grad", dy_, x, *statistics, weight, rstd.to(acc), mean[0].to(acc))
        check(guards, "channel_grad", dy_, x, *statistics, weight, None, None)
        for training in (True, False):
            check(guards, "channel_bwd", dy_, x, weight, *statistics, training, need)


# ---------------------------------------------------------------- that all this can fail


@pytest.mark.parametrize("offset", [-4096, -1, 20, 20 + 4095])
@pytest.mark.parametrize("freed", [False, True])
def test_a_changed_byte_around_a_buffer_is_seen(offset, freed, guards):
    """As a masked write past a result would change it."""
    t = torch.zeros(5)
    byte = ctypes.c_ubyte.from_address(t.data_ptr() + offset)
    assert byte.value == 255
    byte.value = 254
    if freed:
        del t
    assert guards.guards_changed() == 1
    assert guards.guards_changed() == 0


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_what_is_read_around_a_buffer_is_not_a_number(dtype, guards):
    t = torch.zeros(5, dtype=dtype)
    for start in (t.data_ptr() - t.element_size(), t.data_ptr() + t.nbytes):
        found = bytes(ctypes.c_ubyte.from_address(start + i).value for i in range(t.element_size()))
        assert isnan(torch.frombuffer(bytearray(found), dtype=dtype).item())


def test_a_changed_byte_of_an_input_is_seen(guards):
    """The element before it, one of its own, and a gap between its rows."""
    for index in (0, 2, 4):
        g = Guarded(torch.zeros(3, 4)[:, :2])
        assert g.is_unchanged()
        g.buffer[index] = 1
        assert not g.is_unchanged()
        g.may_be_written()
        assert g.is_unchanged() == (index == 2)


def test_the_sanitizers_are_there_where_they_are_asked_for_and_nowhere_else(library):
    """In the library in use, in the process, and in the environment: all three or none."""
    content = Path(extension.load().__file__).read_bytes()
    expected = [build.sanitized()] * 3
    assert [b"__asan_report" in content, b"__ubsan_handle" in content, hasattr(ctypes.CDLL(None), "__asan_init")] == expected
    assert extension.load().build_key in build.accepted_keys()


@pytest.mark.skipif(not build.sanitized(), reason="only what FASTNORM_SANITIZE=1 compiles stops there (make sanitize)")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("element(buffer, ctypes.c_int64(3))", None),
        ("element(buffer, ctypes.c_int64(4))", "AddressSanitizer: heap-buffer-overflow"),
        ("element(buffer, ctypes.c_int64(-1))", "AddressSanitizer: heap-buffer-overflow"),
        ("element(guarded, ctypes.c_int64(3))", None),
        ("element(guarded, ctypes.c_int64(4))", "AddressSanitizer: use-after-poison"),
        ("element(guarded, ctypes.c_int64(-1))", "AddressSanitizer: use-after-poison"),
        ("successor(2**31 - 2)", None),
        ("successor(2**31 - 1)", "runtime error: signed integer overflow"),
    ],
)
def test_the_sanitizers_stop_what_they_should(call, words, library):
    code = f"import ctypes, torch; library = ctypes.CDLL({library._name!r}); a = torch.zeros(4); library.guards_install()"
    code += "; b = torch.zeros(4); buffer, guarded = (ctypes.c_void_p(t.data_ptr()) for t in (a, b))"
    run = python(f"{code}; library.{call}; print('went on')")
    assert (run.returncode == 0) == (run.stdout == "went on\n") == (words is None), run.stderr
    assert words is None or words in run.stderr
