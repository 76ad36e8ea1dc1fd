"""Searches around the launch choices of fastnorm/heuristics.py on a GPU and proposes better ones, for a person to write down.

For each norm it asks which choices a call depends on, and varies one number at a time: the constants of heuristics.py and the
fields of the configurations they lead to are halved and doubled, small ones changed by one, for as long as that gains. A
candidate is timed only when its results match the float64 oracle; it is timed in turn with the present choice, device time
from a cold L2, and kept when it gains more than the spread, twice. A rung serves many shapes: a proposal for one of them is
where to look, not yet a change.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
from itertools import product
from pathlib import Path

import gpu
from gpu_bench import MODES, SHAPES
from gpu_state import OutOfTime, Section, failures, progress, write
from measure import timed as measured
from norms import Norm, bound, disagreement, expected, make, results
from table import aligned
from timing import clock_of, device_in_turn, ratio, spread

import fastnorm
from fastnorm import dispatch, heuristics

DTYPES = ("bf16", "fp32")
OPS = ("LN", "BN")
ROUNDS = 9
SWEEPS = 3  # over all numbers: a better one may make room for another
SMALL = 4  # up to here a number is changed by one as well


# ---------------------------------------------------------------- what a call asks of heuristics.py, and other answers

# A key is (function, positional arguments, keyword arguments as pairs), a table is {key: configuration}.


def choosers() -> dict:
    """The public functions of heuristics.py."""
    own = lambda f: callable(f) and not isinstance(f, type) and getattr(f, "__module__", "") == heuristics.__name__
    return {name: f for name, f in vars(heuristics).items() if not name.startswith("_") and own(f)}


@contextlib.contextmanager
def answering(answer):
    """Every public function of heuristics.py answers with answer(its key, itself); cached launches are dropped on both ends."""
    before = choosers()
    forget = getattr(dispatch, "forget", lambda: None)

    def replacement(name, function):
        def asked(*args, **kwargs):
            return answer((name, args, tuple(sorted(kwargs.items()))), function)

        return functools.wraps(function)(asked)

    for name, function in before.items():
        setattr(heuristics, name, replacement(name, function))
    forget()
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(heuristics, name, function)
        forget()


def ask(key, function):
    return function(*key[1], **dict(key[2]))


def recorded(call) -> dict:
    """The table of the configurations that a call is given."""
    table = {}

    def answer(key, function):
        config = ask(key, function)
        if dataclasses.is_dataclass(config):
            table[key] = config
        return config

    with answering(answer):
        call()
    return table


@contextlib.contextmanager
def substituted(table: dict):
    """Calls get the table's configurations; yields the set of keys that were asked for."""
    asked = set()

    def answer(key, function):
        asked.add(key)
        return table[key] if key in table else ask(key, function)

    with answering(answer):
        yield asked


# ---------------------------------------------------------------- numbers that can be varied


def numbers(value, path=()):
    """(path, number) of every integer in a constant: a number, or dicts, tuples and configurations of them."""
    if type(value) in (int, bool):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from numbers(part, (*path, key))
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from numbers(part, (*path, i))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name), (*path, field.name))


def with_number(value, path, number):
    """The constant with another number at the path."""
    if not path:
        return number
    first, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, first: with_number(value[first], rest, number)}
    if isinstance(value, tuple):
        return tuple(with_number(part, rest, number) if i == first else part for i, part in enumerate(value))
    return dataclasses.replace(value, **{first: with_number(getattr(value, first), rest, number)})


def neighbours(value) -> list:
    if isinstance(value, bool):
        return [not value]
    near = {value // 2, 2 * value} | ({value - 1, value + 1} if value <= SMALL else set())
    return sorted(n for n in near - {value} if n > 0)


@dataclasses.dataclass(frozen=True)
class State:
    """Changed numbers: of constants by (name, *path), then of configurations by (key, *path)."""

    constants: dict = dataclasses.field(default_factory=dict)
    fields: dict = dataclasses.field(default_factory=dict)

    def but(self, knob, number) -> State:
        if isinstance(knob[0], str):
            return State({**self.constants, knob: number}, self.fields)
        return State(self.constants, {**self.fields, knob: number})

    def value(self, knob, keys):
        changed = self.constants if isinstance(knob[0], str) else self.fields
        if knob in changed:
            return changed[knob]
        whole = getattr(heuristics, knob[0]) if isinstance(knob[0], str) else self.table(keys)[knob[0]]
        return dict(numbers(whole)).get(knob[1:])

    def table(self, keys) -> dict:
        """The configurations that heuristics.py would give with these numbers."""
        before = {name: getattr(heuristics, name) for name, *_ in self.constants}
        try:
            for (name, *path), number in self.constants.items():
                setattr(heuristics, name, with_number(getattr(heuristics, name), tuple(path), number))
            table = {key: ask(key, _uncached(getattr(heuristics, key[0]))) for key in keys}
        finally:
            for name, value in before.items():
                setattr(heuristics, name, value)
        for (key, *path), number in self.fields.items():
            table[key] = with_number(table[key], tuple(path), number)
        return table


def _uncached(function):
    return getattr(function, "__wrapped__", function)


def knobs(present: dict) -> list[tuple]:
    """Constants first: a proposal in their terms can be written down as it is."""
    constants = [(name, *path) for name, value in vars(heuristics).items() if name.isupper() for path, _ in numbers(value)]
    return constants + [(key, *path) for key, config in present.items() for path, _ in numbers(config)]


def name_of(knob) -> str:
    if isinstance(knob[0], str):
        return knob[0] + "".join(f"[{part}]" for part in knob[1:])
    (function, args, kwargs), *path = knob
    arguments = [*map(str, args), *(f"{name}={value}" for name, value in kwargs)]
    return f"{function}({', '.join(arguments)})" + "".join(f".{part}" for part in path)


# ---------------------------------------------------------------- the search


def search(present: dict, judge, left=lambda: 1.0) -> dict:
    """What was found around a table.

    `judge` says of a table, and of the number changed last, how many times as fast it is and the spread, or why it is out.
    """
    keys, best = list(present), State()
    row = {
        "present": {name_of((key,)): repr(config) for key, config in present.items()},
        "tried": 0,
        "refused": [],
        "gain": 0.0,
    }
    seen = [present]
    for _ in range(SWEEPS):
        gain = row["gain"]
        for knob in knobs(present):
            best = climb(knob, best, keys, seen, judge, left, row)
        if row["gain"] == gain:
            break
    if row["gain"]:  # the best of many figures is partly luck: once more
        times_as_fast, uncertain = judge(best.table(keys), "the best again")
        row |= {"gain": times_as_fast - 1, "spread": uncertain}
        if times_as_fast - 1 <= uncertain:
            row["refused"].append(f"{row.pop('changes')}: it did not gain again")
    return row


def climb(knob, best: State, keys, seen: list, judge, left, row: dict) -> State:
    """One number, on from each value that gains."""
    value = best.value(knob, keys)
    values = [] if value is None else neighbours(value)
    while values:
        number = values.pop(0)
        what, state = f"{name_of(knob)} = {number}", best.but(knob, number)
        try:
            table = state.table(keys)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            continue  # these numbers do not go together: nothing comes out
        if table in seen:
            continue
        seen.append(table)
        if left() <= 0:
            raise OutOfTime(row)
        row["tried"] += 1
        verdict = judge(table, what)
        if isinstance(verdict, str):
            row["refused"].append(f"{what}: {verdict}")
            continue
        times_as_fast, uncertain = verdict
        if times_as_fast - 1 > row["gain"] + uncertain:
            best, values = state, neighbours(number)
            row |= {"gain": times_as_fast - 1, "spread": uncertain, "changes": changes(best, keys)}
    return best


def changes(state: State, keys) -> list[dict]:
    changed = {**state.constants, **state.fields}
    return [{"number": name_of(knob), "present": State().value(knob, keys), "best": n} for knob, n in changed.items()]


def judge_of(norm: Norm, dtype: str, mode: str, device: str, timer):
    """The present table of a norm, and the function that judges another one."""
    inputs = make(norm, dtype, device)
    torchs, truth = expected(norm, inputs, "backward", True)
    forward = bound(norm, fastnorm, inputs, True)
    call = measured(forward, inputs, mode)
    present = recorded(call)

    def under(table):
        def run():
            with substituted(table):
                call()

        return run

    def judge(table, what):
        try:
            with substituted(table) as asked:
                ours = results(forward, inputs, "backward")
        except Exception as e:
            # Triton has many ways to say that something does not fit. An error that broke the device is raised again here.
            clock_of_device(device).synchronize()
            return f"does not run: {type(e).__name__}: {e}".splitlines()[0]
        if not {key for key in table if table[key] != present[key]} <= asked:
            return "nothing asks for it: is a launch cached?"
        if reason := disagreement(norm.how.names, ours, torchs, truth):
            return f"wrong: {reason}"
        del ours
        times = timer({"present": under(present), "candidate": under(table)}, table)
        return ratio(times, "present", "candidate"), max(map(spread, times.values()))

    return present, judge


clock_of_device = functools.cache(clock_of)


def timed(device: str):
    return lambda calls, table: device_in_turn(calls, ROUNDS, clock_of_device(device))["cold"]


def careful(judge, section: Section, name: str):
    """A candidate that the process dies of, an access out of bounds say, is not tried again by the next process."""
    if deadly := section.data.pop("trying", None):
        section.data.setdefault("deadly", []).append(deadly)

    def judged(table, what):
        if [name, what] in section.data.get("deadly", []):
            return "the process died of it"
        section.data["trying"] = [name, what]
        section.save()
        try:
            verdict = judge(table, what)
        except KeyboardInterrupt:
            forget()
            raise
        forget()
        return verdict

    def forget():
        section.data.pop("trying")
        section.save()

    return judged


def tune(section: Section, device: str, jobs: dict, timer=None) -> None:
    timer = timer or timed(device)

    def measure(name):
        present, judge = judge_of(*jobs[name], device, timer)
        row = search(present, careful(judge, section, name), section.left)
        print(f"{name}: {row['tried']} tried, {len(row['refused'])} refused, gain {row['gain']:.1%}", flush=True)
        return row

    with fastnorm.use_backend("triton"), clock_of_device(device).stream():
        section.each(progress(jobs), measure, least=lambda name: 5.0)


HEAD = ["norm", "number", "present", "best", "gain", "+-"]


def proposal(rows: list[dict]) -> str:
    """One line for each number to change; the gain is that of all changes of a norm together."""
    lines = [HEAD]
    for row in rows:
        for i, change in enumerate(row.get("changes", [])):
            figures = [f"{row['gain']:.1%}", f"{row['spread']:.1%}"] if i == 0 else ["", ""]
            lines.append(
                [row["row"] if i == 0 else "", change["number"], str(change["present"]), str(change["best"]), *figures]
            )
    return aligned(lines) if len(lines) > 1 else "no change gains more than the spread"


def jobs_of(args) -> dict[str, tuple[Norm, str, str]]:
    every = {f"{norm} {dtype} {mode}": (norm, dtype, mode)
             for dtype, norm, mode in product(DTYPES, SHAPES, MODES) if norm.op in args.ops}  # fmt: skip
    return {name: job for name, job in every.items() if any(text in name for text in args.shapes)}


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    p.add_argument(
        "--shapes", nargs="+", default=[""], metavar="TEXT", help='norms with one of these in "LN 64x96 bf16 forward"'
    )
    p.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop with what there is by then")
    p.add_argument("--out", type=Path, metavar="PATH", help="default: bench/results/GPU/tune-DATE.json")
    p.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tries out the command in Triton's interpreter"
    )
    args = p.parse_args(argv)
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, which is at their first use
    if reason := gpu.cannot_run(args.device):
        print(reason, file=sys.stderr)
        return 2
    jobs = jobs_of(args)
    if not jobs:
        p.error(f"no norm has {' or '.join(map(repr, args.shapes))} in its name")
    about = gpu.machine(args.device)
    path = (args.out or gpu.default_path(about, "tune-")).resolve()
    write(path, gpu.opened(path, about))
    section = Section(path, "tune", args.budget)
    tune(section, args.device, jobs)
    print(proposal([row for row in section.data["rows"] if row["row"] in jobs]), f"results: {path}", sep="\n")
    return 1 if failures(json.loads(path.read_text())["sections"]["tune"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
