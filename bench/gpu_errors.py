"""Section `errors`: the table of errors.py, norm by norm."""

from __future__ import annotations

import sys

import errors
from gpu_state import Section, script


def measure_errors(section: Section, device: str, jobs=None) -> None:
    jobs = {f"{norm} {dtype}": (norm, dtype) for norm, dtype in jobs or errors.jobs_of(errors.parser().parse_args([]))}

    def measure(name):
        results = errors.measure(*jobs[name], device)
        larger = [row["result"] for row in results if row["error"] > row["allowed"]]
        for row in results:
            print(*errors.line(row), sep="  ", flush=True)
        return {"results": results, **({"failed": f"larger than torch's: {', '.join(larger)}"} if larger else {})}

    section.each(jobs, measure, least=lambda name: 5.0)


if __name__ == "__main__":
    sys.exit(script(measure_errors, __doc__))
