"""Every kernel that the contract functions launch is compiled to machine code for real GPUs, on a machine without one.

Triton decides at import between its interpreter and its compiler, so this runs as a script in a process of its own.
"""

import json
import os
import subprocess
import sys

CAPABILITIES = (80, 90)


def run(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # after whatever a compiler had to say


def launch_rows(M, N, dtype, parameter, y_dtype=None):
    import fastnorm.kernels as K
    import torch

    x = torch.empty(M, N, dtype=dtype)
    p = None if parameter is None else torch.empty(N, dtype=parameter)
    y, mean, rstd = K.row_fwd(x, p, p, 1e-5, N, y_dtype)
    K.row_bwd(y, x, p, mean, rstd, (True, parameter, parameter))


def launch_channels(shape, dtype, parameter, permuted=False, evaluate=False):
    """`permuted`: channels_last, or (N, L, C).mT."""
    import fastnorm.kernels as K
    import torch

    x = torch.empty(shape, dtype=dtype)
    if permuted:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    p = None if parameter is None else torch.empty(shape[1], dtype=parameter)
    _, mean, rstd = K.channel_fwd(x, p, p, p, p, True, 0.1, 1e-5)
    K.channel_bwd(x, x, p, mean, rstd, True, (True, parameter, parameter))
    if evaluate:
        K.channel_fwd(x, p, p, p, p, False, 0.1, 1e-5)
        K.channel_bwd(x, x, p, mean, rstd, False, (True, None, None))
        K.channel_stats(x)
        K.channel_sums(x, x, mean, rstd)


def cases():
    from torch import bfloat16, float16, float32, float64

    for dtype, parameter, lengths in ((bfloat16, float32, (64, 1000)), (float32, float32, (256, 2048))):
        for N in (*lengths, 8192, 16384, 40000):  # the top rungs are the ones that spill first
            yield launch_rows, (512, N, dtype, parameter)
        for permuted in (False, True):
            yield launch_channels, ((8, 64, 56, 56), dtype, parameter, permuted, permuted)
            yield launch_channels, ((64, 65, 7, 7), dtype, parameter, permuted)
        for shape in ((64, 8, 14, 14), (7, 16, 3), (128, 64), (128, 65), (64, 8, 7, 7)):  # every size of slab
            yield launch_channels, (shape, dtype, parameter)
    yield launch_channels, ((8, 64), float64, float64)
    yield launch_channels, ((8, 6, 12, 12), float64, float64)
    yield launch_channels, ((2, 6, 12, 12), float64, float64)
    yield launch_channels, ((300, 65, 7, 7), bfloat16, float32)
    for N in (100, 2048, 8192):
        yield launch_rows, (512, N, float64, float64)
    yield launch_rows, (512, 4096, float32, bfloat16)
    yield launch_rows, (512, 96, float16, None)
    for N in (64, 1000, 8192, 16384, 40000):  # autocast
        yield launch_rows, (512, N, bfloat16, float32, float32)
    yield launch_channels, ((8, 64, 56, 56), float64, bfloat16)
    yield launch_channels, ((5, 130, 49), float16, float16, True)


def spills(capability):
    from dryrun import record
    from fastnorm.kernels import channel, partial, row, slab

    found, reached, count = [], set(), 0
    for function, args in cases():
        with record(capability, []) as compiled:
            function(*args)
        for c in compiled:
            count += 1
            reached.add(c.kernel)
            usage = c.usage()
            if usage["STACK"] or usage["LOCAL"]:
                found.append([c.kernel, str(args), usage])
    defined = {name for module in (channel, partial, row, slab) for name in vars(module) if name.endswith("_kernel")}
    return {"spills": found, "unreached": sorted(defined - reached), "count": count}


def recompiles(capability):
    from dryrun import record
    from torch import float16, float32

    batches = (2, 16, 1, 3, 4, 5, 7, 8, 12, 15, 17, 24, 31, 32, 33, 48, 64, 100, 128, 257)
    calls = {
        "rows": lambda M: launch_rows(M, 1000, float16, float32),
        "short rows": lambda M: launch_rows(M, 10, float32, float32),
        "long rows": lambda M: launch_rows(M, 20000, float16, float32),
        # Batches of one layer that fit a slab and batches that do not are different kernels: these shapes keep to one side.
        "NCHW": lambda B: launch_channels((B, 8, 130, 130), float16, float32),
        "odd NCHW": lambda B: launch_channels((B, 5, 131, 129), float32, float32),
        "channels_last": lambda B: launch_channels((B, 24, 26, 20), float16, float32, True),
        "slab NCHW": lambda B: launch_channels((B, 8, 2, 2), float32, float16),
        "odd slab": lambda B: launch_channels((B, 5, 7), float32, float32),
        "slab NC": lambda B: launch_channels((B, 65), float32, float32),
    }
    late = {}
    for name, call in calls.items():
        with record(capability, []) as compiled:
            for batch in batches[:2]:
                call(batch)
            early = len(compiled)
            assert early, "nothing was compiled, so nothing was measured"
            for batch in batches[2:]:
                call(batch)
        if len(compiled) > early:
            late[name] = sorted({c.kernel for c in compiled[early:]})
    return late


if __name__ == "__main__":
    print(json.dumps({"spills": spills, "recompiles": recompiles}[sys.argv[1]](int(sys.argv[2]))))
else:
    import pytest

    pytest.importorskip("triton", reason="Triton is not installed, so its compiler cannot be run")

    @pytest.mark.parametrize("capability", CAPABILITIES)
    def test_no_kernel_spills(capability):
        result = run("spills", capability)
        assert not result["unreached"]
        assert not result["spills"]
        assert result["count"] > 50

    def test_a_new_batch_size_compiles_nothing():
        assert run("recompiles", 90) == {}
