"""For pytest -p gpu_plugin: writes down the outcome of each test as it comes, so that a run may be killed at any time."""

from __future__ import annotations

import json
import os

PLACE = "FASTNORM_OUTCOMES"  # the environment variable with the path


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput"):  # xdist's controller hears of it as well
        config.pluginmanager.unregister(name=__name__)


def _note(report, outcome: str) -> None:
    text = report.longreprtext.splitlines() if outcome == "failed" else []
    message = next((line for line in text if line.startswith("E ")), (text or [""])[-1])
    with open(os.environ[PLACE], "a") as file:
        file.write(json.dumps([report.nodeid, outcome, message.removeprefix("E").strip()]) + "\n")


def pytest_runtest_logreport(report) -> None:
    if report.failed or report.skipped or report.when == "call":
        _note(report, report.outcome)


def pytest_collectreport(report) -> None:
    if report.failed:
        _note(report, "failed")
