"""Measures in turn: A B C A B C in one process, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch.utils.benchmark import Timer


def keep_freed_memory() -> str:
    """Has glibc's allocator keep from now on what is freed, up to 32 MB a tensor, as others do by themselves: says what holds.

    Else it gives the top of its heap back now and then, and whoever allocates next, ours or a peer's, is timed with a page
    fault for every 4 KB: up to four times as slow. 32 MB is the most that it keeps of its own accord, too.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another system or another C library
        return "allocator's choice"
    kept = mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return "kept to 32 MB" if kept else "allocator's choice"


WARM = 3  # calls: what a change of surroundings has dropped, such as a plan of launches, is there again


@contextlib.contextmanager
def _surrounded(name: str, function: Callable, within: dict[str, Callable]):
    """Within the function's own surroundings. Where any function has some, they may have changed: it is called first."""
    with within.get(name, contextlib.nullcontext)():
        for _ in range(WARM if set(within.values()) - {contextlib.nullcontext} else 0):
            function()
        yield


def in_turn(functions: dict[str, Callable], rounds: int, seconds: float, threads: int, within=None) -> dict[str, list[float]]:
    """Microseconds of one call of each function, one figure a round; each figure is a mean over about `seconds`.

    `within` has context managers' factories for some of them.
    """
    within = within or {}
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
    numbers, times = {}, {name: [] for name in timers}
    for name, timer in timers.items():
        with _surrounded(name, functions[name], within):
            numbers[name] = max(1, int(seconds / max(timer.timeit(2).mean, 1e-7)))
    for _ in range(rounds):
        for name, timer in timers.items():
            with _surrounded(name, functions[name], within):
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


def host_in_turn(functions: dict[str, Callable], rounds: int, calls: int, clock, within=None) -> dict[str, list[float]]:
    """Microseconds that one call takes the host: it puts work in the queue of a device and does not wait for it.

    `calls` is small, so that the queue does not fill up; the device is waited for between the figures.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            with _surrounded(name, function, within or {}):
                clock.synchronize()
                begin = perf_counter()
                for _ in range(calls):
                    function()
                times[name].append((perf_counter() - begin) / calls * 1e6)
    clock.synchronize()
    return times


class NotCaptured(Exception):
    """A function cannot be in a CUDA graph; `name` is whose it is, the cause says why."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def device_in_turn(functions: dict[str, Callable], rounds: int, clock, within=None) -> dict[str, dict[str, list[float]]]:
    """Microseconds that one call takes the device, "warm": one right after another, and "cold": what L2 held is gone."""
    replays = {}
    for name, function in functions.items():
        with _surrounded(name, function, within or {}):
            try:
                replays[name] = clock.prepare(function)
            except RuntimeError as e:
                raise NotCaptured(name) from e
    times = {state: {name: [] for name in functions} for state in ("cold", "warm")}
    for _ in range(rounds):
        for name, replay in replays.items():
            times["warm"][name].append(clock.warm(*replay))
            times["cold"][name].append(clock.cold(*replay))
    return times


class GraphClock:
    """Times replays of CUDA graphs between two events, so that no time of the host is in them.

    Everything has to happen within `stream()`, and a backward's forward too: autograd runs it on its forward's stream.
    """

    LONG = 300.0  # microseconds of replays in one warm figure; a short call is captured several times in one graph
    MOST_CALLS = 20
    REPLAYS = 3  # of one figure
    FILL = 256 << 20  # bytes, at least twice L2: written to empty it, which has to take longer than to queue a replay

    def __init__(self):
        self._stream = torch.cuda.Stream()
        size = max(2 * torch.cuda.get_device_properties(self._stream.device).L2_cache_size, self.FILL)
        self._other = torch.empty(size, dtype=torch.int8, device=self._stream.device)

    @contextlib.contextmanager
    def stream(self):
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def synchronize(self):
        torch.cuda.synchronize()

    def _captured(self, function, calls):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(calls):
                function()
        return graph

    def prepare(self, function):
        """A graph of one call, one of `calls` calls, and that number."""
        for _ in range(2):  # compiles, and allocates what is kept
            function()
        single = self._captured(function, 1)
        self._between(single.replay, 1)
        calls = min(self.MOST_CALLS, max(1, int(self.LONG / self._between(single.replay, self.REPLAYS))))
        return single, single if calls == 1 else self._captured(function, calls), calls

    def _between(self, replay, number):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def warm(self, single, several, calls):
        return self._between(several.replay, self.REPLAYS) / self.REPLAYS / calls

    def cold(self, single, several, calls):
        figures = []
        for _ in range(self.REPLAYS):
            self._other.zero_()
            figures.append(self._between(single.replay, 1))
        return median(figures)


class WallClock:
    """For a device without graphs: the time of the call itself, whose caches nobody empties."""

    CALLS = 3

    stream = staticmethod(contextlib.nullcontext)
    synchronize = staticmethod(lambda: None)

    def prepare(self, function):
        return (Timer("f()", globals={"f": function}),)

    def warm(self, timer):
        return timer.timeit(self.CALLS).mean * 1e6

    cold = warm


def clock_of(device: str):
    return GraphClock() if device.startswith("cuda") else WallClock()
