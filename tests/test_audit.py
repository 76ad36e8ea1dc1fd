"""The audit's reduced grid, and the audit itself against planted violations.

Triton decides at import between its interpreter and its compiler, so what compiles runs in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so its compiler cannot be run")

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run(module, *args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", f"audit.{module}", *args], env=env, capture_output=True, text=True)


def result(module, *args):
    done = run(module, *args)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # after whatever a compiler had to say


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_violation_and_every_kernel_reached(arch):
    done = run("variants", arch, "--few")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


def test_the_audit_finds_planted_violations():
    found = result("selfcheck", "planted")
    assert found == {"none": [[]], "spill": [["SPILL"]], "fp64": [["FP64"]], "narrow": [["NARROW"]]}


def test_a_kernel_that_no_call_reaches_is_named():
    assert {"_row_fwd_kernel", "_row_bwd_sums_kernel", "_channel_stats_kernel", "_finalise_kernel"} <= set(
        result("selfcheck", "unreached")
    )


def test_the_assembler_keeps_widths_and_adds_no_fp64():
    variants = result("selfcheck", "assembler")
    assert len(variants) > 10
    for kernel, in_ptx, in_machine_code in variants:
        assert in_ptx == in_machine_code, kernel


def test_a_new_batch_size_compiles_nothing():
    for name, (late, early) in result("recompiles").items():
        assert early, f"{name}: nothing was compiled, so nothing was measured"
        assert not late, name
