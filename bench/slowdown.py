"""Whether a row of `run.py` is slower than it was."""

from __future__ import annotations

from measure import US
from norms import Norm
from record import primary, speedup

LEAST = 0.05  # between two processes: memory that lies elsewhere makes this much of a difference by itself


def slower(row: dict, then: dict) -> str | None:
    """What is slower, in one sentence; None where nothing is.

    Both the time and its ratio to torch's, where both rows have one, have to be larger by more than the spread of all the
    figures in them: a machine that is slower today makes torch slower, too, and a faster torch is no slower fastnorm.
    """
    if "us" not in row or "us" not in then:
        return None
    state = primary(row)
    if state not in then["us"]:
        return None
    factors = [row["us"][state][US] / then["us"][state][US]]
    beside = [speedup(each, state, "torch") for each in (then, row)]
    if all(beside):
        factors.append(beside[0] / beside[1])
    factor, spread = min(factors), sum(spread for each in (row, then) for spread in spreads(each, state))
    if factor - 1 <= max(LEAST, spread):
        return None
    name = f"{Norm(row['op'], tuple(row['shape']), row['layout'])} {row['dtype']} {row['mode']}"
    times = f"{row['us'][state][US]:.1f} us, {then['us'][state][US]:.1f} before"
    return f"slower: {name}: {factor:.2f} times ({times}; the spread is {spread:.0%})"


def spreads(row: dict, state: str) -> list[float]:
    found = row["spread"][state]
    return [found[name] for name in (US, "torch") if name in found]
