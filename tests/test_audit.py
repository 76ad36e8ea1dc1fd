"""The audit's reduced grid, and the audit itself against planted violations.

Triton decides at import between its interpreter and its compiler, so what compiles runs in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed, so its compiler cannot be run")

from audit import traffic
from audit.__main__ import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


# The oldest Triton that is served, where `make test` put it: beside the one of the environment.
OLDEST = Path(sys.prefix, "triton-3.6")


def run(module, *args, beside=()):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([*beside, str(ROOT / "tests"), str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", f"audit.{module}", *args], env=env, capture_output=True, text=True)


def result(module, *args):
    done = run(module, *args)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # after whatever a compiler had to say


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_violation_and_every_kernel_reached(arch):
    done = run("variants", arch, "--few")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


@pytest.mark.skipif(
    not OLDEST.is_dir(), reason="Triton 3.6 is not beside this environment: `make test` puts it into .venv alone"
)
def test_the_oldest_triton_makes_the_same_of_positions():
    """It sees fewer neighbours by itself: loads of one element each had made these kernels up to eight times as slow."""
    done = run("variants", "sm_90", "--few", "--only", "positions", beside=[str(OLDEST)])
    assert "triton 3.6" in done.stdout, done.stderr[-4000:]
    assert done.returncode == 0, done.stdout


def test_the_audit_finds_planted_violations():
    found = result("selfcheck", "planted")
    assert found == {"none": [[]], "spill": [["SPILL"]], "fp64": [["FP64"]], "division": [["ROUGH"]], "root": [["ROUGH"]],
                     "early load": [["EARLY"]], "early store": [["EARLY"]], "waited": [[]], "narrow": [["NARROW"]]}  # fmt: skip


def test_a_kernel_that_no_call_reaches_is_named():
    assert {"_row_fwd_kernel", "_row_bwd_sums_kernel", "_channel_stats_kernel", "_finalise_kernel"} <= set(
        result("selfcheck", "unreached")
    )


def test_long_rows_are_asked_for_ahead():
    assert result("selfcheck", "ahead") == {"_row_fwd_kernel": True, "_row_bwd_long_kernel": True}


def test_the_assembler_keeps_widths_and_adds_no_fp64():
    variants = result("selfcheck", "assembler")
    assert len(variants) > 10
    for kernel, in_ptx, in_machine_code in variants:
        assert in_ptx == in_machine_code, kernel


def test_a_new_batch_size_compiles_nothing():
    for name, (late, early) in result("recompiles").items():
        assert early, f"{name}: nothing was compiled, so nothing was measured"
        assert not late, name


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the bytes are counted in Triton's interpreter")
class TestTraffic:
    @pytest.mark.parametrize("op", traffic.OPS, ids=lambda op: f"{op.name}-{op.shape}-{op.layout}")
    def test_no_op_moves_more_than_its_ideal(self, op):
        dram, moved = traffic.ratios(op)
        assert op.least <= dram <= traffic.MOST, f"{dram:.2f} times the ideal; {moved:.2f} pass the L2"

    def test_a_second_sweep_is_seen_where_the_L2_does_not_hold_the_first(self):
        memory = traffic.Memory(1 << 20)
        row = lambda i: i * 1000 + np.arange(1000)
        for i in (*range(30), *range(30)):  # 32000 bytes each
            memory.touch(False, row(i))
        assert memory.read == 30 * 32000
        for i in (*range(100, 150), *range(100, 150)):
            memory.touch(False, row(i))
        assert memory.read == (30 + 100) * 32000
        assert memory.moved == (60 + 100) * 32000

    def test_a_store_costs_its_bytes_once(self):
        memory = traffic.Memory(1 << 20)
        for is_store in (True, False, True):
            memory.touch(is_store, np.arange(100))
        assert (memory.read, memory.written) == (0, 3200)

    def test_a_copy_between_the_passes_is_found(self):
        """The planted fault: a second sweep over x in a launch of its own."""
        op = traffic.Op("row_fwd", 2, (64, 8192), traffic.F32)
        x, run = traffic._run(op)
        memory = traffic.count(lambda: (run(), run()), op.sms)
        assert memory.read + memory.written > traffic.MOST * op.ideal * x.numel() * x.element_size()
