"""Plain text tables."""

from __future__ import annotations


def aligned(lines: list[list[str]]) -> str:
    """The lines with their cells in columns; all lines have as many cells as the first, which is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
