"""How compiled kernels are started without Triton's front end: the same arguments, in the places where the machine code looks.

Triton decides at import between its interpreter and its compiler, so this runs as a script in a process of its own, in which
compilation is real and nothing is launched (dryrun.py).
"""

import itertools
import json
import os
import re
import subprocess
import sys

SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}


def run(name):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def calls():
    """(function of the contract, its arguments)"""
    import fastnorm.kernels as K
    import torch
    from torch import bfloat16, float32, float64

    need = lambda dtype: (True, dtype, dtype)
    for shape, dtype in (((8, 64), float32), ((40, 1000), bfloat16), ((6, 20000), float32), ((3, 5), float64)):
        x, p = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
        yield K.row_fwd, (x, p, torch.empty(shape[1]), 1e-5, shape[1], None)
        yield K.row_bwd, (torch.empty_like(x), x, p, *K.row_fwd(x, p, p, 1e-5, shape[1])[1:], need(float32))
        yield K.row_bwd, (torch.empty_like(x), x, None, *K.row_fwd(x, p, p, 1e-5, shape[1])[1:], (True, None, None))
    for shape in ((8, 64), (4, 16, 14, 14), (4, 6, 7, 7)):
        dense, p = torch.empty(shape), torch.empty(shape[1])
        for x in (dense, dense.movedim(1, -1).contiguous().movedim(-1, 1)):
            for training in (True, False):
                buffers = torch.empty(shape[1]), torch.empty(shape[1])
                yield K.channel_fwd, (x, p, None, *buffers, training, 0.1, 1e-5)
                _, mean, rstd = K.channel_fwd(x, p, p, None, None, True, 0.1, 1e-5)
                yield K.channel_bwd, (torch.empty_like(x), x, p, mean, rstd, training, need(float32))


def parameters(compiled):
    """Bytes of each parameter of the machine code's entry."""
    entry = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.S).group(1)
    return [SIZES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)]


def plans():
    """Plans whose parameters are not those of the machine code."""
    from fastnorm.kernels import launch, plans

    wrong, count, inner = [], 0, plans._step

    def step(record, memory):
        nonlocal count
        function, programs, threads, shared, _, given = inner(record, memory)
        count += 1
        sizes = [4 if kind == plans.NUMBER and not wide(record, i) else 8 for i, (kind, *_) in enumerate(given)]
        metadata = record.compiled.metadata
        right = (
            [*sizes, 8, 8] == parameters(record.compiled)  # and two of Triton's own
            and threads == 32 * metadata.num_warps
            and shared == metadata.shared
        )
        if not right:
            wrong.append([record.kernel.__name__, sizes, parameters(record.compiled)])
        return function, programs, threads, shared, False, given

    def wide(record, i):
        flat = []
        spread = lambda t: [spread(k) for k in t] if isinstance(t, tuple) else flat.append(t)
        for kind in record.compiled.src.signature.values():
            spread(kind)
        return [k for k in flat if k != "constexpr"][i] == "i64"

    plans._step = step
    missing = [f.__name__ for f, args in calls() if plans.record(f, args, True)[1] is None]
    return {"wrong": wrong, "missing": missing, "count": count, "trusted": launch._compiled.trusted}


def direct():
    """Launches at hand whose arguments are not those of an ordinary launch."""
    import torch
    from audit import dryrun
    from fastnorm.kernels import launch

    started = []
    dryrun._Launcher.__call__ = lambda self, *args: started.append(args)
    torch._C._cuda_getCurrentRawStream = lambda index: 0

    def arguments(inputs):
        """Of all that was started; memory that the call made for itself goes by the order in which it is seen."""
        places = {t.data_ptr(): t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)}

        def seen(a, pointer):
            if isinstance(a, tuple):
                return tuple(seen(part, pointer) for part in a)
            a = a.data_ptr() if isinstance(a, torch.Tensor) else a
            return places.setdefault(a, len(places)) if pointer and a is not None else a

        # Arguments 6 to 8 are for Triton's hooks.
        return [tuple(seen(a, i > 8 and (isinstance(a, torch.Tensor) or (isinstance(a, int) and a > 2**32)))
                      for i, a in enumerate(args) if i not in (6, 7, 8)) for args in started]  # fmt: skip

    wrong, count = [], 0
    for f, args in list(calls()):
        runs = []
        for trusted in (False, True, True):
            launch._compiled.trusted = trusted
            started.clear()
            f(*args)
            runs.append(arguments(args))
        count += len(runs[0])
        if not runs[0] == runs[1] == runs[2]:
            wrong.append([f.__name__, str(runs[0]), str(runs[2])])
    return {"wrong": wrong, "count": count, "kept": len(launch._compiled.kernels)}


def chains():
    """By architecture and call, of each launch that compiles: its kernel, and whether it may start early, waits, and lets the
    next one start early."""
    import fastnorm.kernels as K
    import torch
    from audit.dryrun import record

    from fastnorm import heuristics

    def rows():
        x, p = torch.empty(64, 768), torch.empty(768)
        K.row_bwd(x, x, p, *K.row_fwd(x, p, None, 1e-5, 768)[1:], (True, torch.float32, torch.float32))

    def channels(shape, merged):
        heuristics.MERGED_WITH_READING = merged
        x, p = torch.empty(shape), torch.empty(shape[1])
        y, mean, rstd = K.channel_fwd(x, p, None, None, None, True, 0.1, 1e-5)
        K.channel_bwd(y, x, None, mean, rstd, True, (True, torch.float32, None))

    calls = {"rows": rows, "two": lambda: channels((16, 8, 56, 56), 1024), "large": lambda: channels((16, 32, 128, 256), 1024),
             "three": lambda: channels((16, 8, 57, 56), 0)}  # fmt: skip
    found = {}
    for arch, (name, call) in itertools.product(("sm_80", "sm_90"), calls.items()):
        with record(arch, []) as compiled:
            call()
        ptx = [c.files["ptx"].read_text() for c in compiled]
        found.setdefault(arch, {})[name] = [
            (c.kernel, c.follows, "griddepcontrol.wait" in t, "griddepcontrol.launch_dependents" in t)
            for c, t in zip(compiled, ptx, strict=True)
        ]
    return found


def specialised():
    """Numbers of kernels on whose values Triton would specialise, and so compile anew when one is 1 or a multiple of 16."""
    import fastnorm.kernels as K
    import triton

    modules = [m for m in vars(K).values() if getattr(m, "__name__", "").startswith("fastnorm.kernels.")]
    kernels = {v for m in modules for name, v in vars(m).items() if name.endswith("_kernel")}
    kernels = [k for k in kernels if isinstance(k, triton.runtime.JITFunction)]
    numbers = [(k.__name__, p) for k in kernels for p in k.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    return {"found": [[k, p.name] for k, p in numbers if not p.do_not_specialize], "count": len(numbers)}


if __name__ == "__main__":
    from audit.dryrun import record

    with record("sm_90", []):
        print(json.dumps({"plans": plans, "direct": direct, "chains": chains, "specialised": specialised}[sys.argv[1]]()))
else:
    import pytest

    pytest.importorskip("triton", reason="Triton is not installed, so its compiler cannot be run")

    def test_plans_have_the_parameters_of_the_machine_code():
        result = run("plans")
        assert not result["wrong"]
        assert not result["missing"]
        assert result["count"] > 40

    def test_launches_at_hand_are_given_what_ordinary_ones_are():
        result = run("direct")
        assert not result["wrong"]
        assert result["count"] > 40
        assert result["kept"] > 10

    def test_launches_that_follow_each_other_overlap():
        alone, leads, follows, both = (False,) * 3, (False, False, True), (True, True, False), (True,) * 3
        found = run("chains")
        for launches in found["sm_80"].values():
            assert launches
            assert all(tuple(kinds) == alone for _, *kinds in launches)
        kinds = lambda name: {kernel.removeprefix("_").removesuffix("_kernel"): tuple(k) for kernel, *k in found["sm_90"][name]}
        assert kinds("rows") == {"row_fwd": alone, "row_bwd": leads, "finalise": follows}
        chain = {"channel_stats": leads, "channel_apply": follows, "channel_sums": leads, "channel_grad": follows}
        assert kinds("two") == chain
        # Its gradient is the kernel of the smaller one.
        assert kinds("large") == {"channel_stats": alone, "channel_apply": follows, "channel_sums": alone}
        assert kinds("three") == {**chain, "channel_merge": both, "finalise": both}

    def test_no_number_is_specialised():
        result = run("specialised")
        assert not result["found"]
        assert result["count"] > 20
