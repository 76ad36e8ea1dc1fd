"""Measures in turn: A B C A B C in one process, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from torch.utils.benchmark import Timer


def in_turn(functions: dict[str, Callable], rounds: int, seconds: float, threads: int) -> dict[str, list[float]]:
    """Microseconds of one call of each function, one figure a round; each figure is a mean over about `seconds`."""
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
    numbers = {name: max(1, int(seconds / max(timer.timeit(2).mean, 1e-7))) for name, timer in timers.items()}
    times = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean * 1e6)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over the rounds of a's time over b's."""
    return median(x / y for x, y in zip(times[a], times[b], strict=True))


def spread(values: list[float]) -> float:
    """Half of the middle half, relative to the median."""
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[(3 * n) // 4] - ordered[n // 4]) / 2 / median(ordered)
