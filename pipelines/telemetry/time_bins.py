"""Amounts over time in equal steps, of bounded size: when the time outgrows the steps, every two become one."""

from __future__ import annotations

from collections.abc import Sequence

MAX_BINS = 500
FIRST_STEP_S = 1.0


class TimeBins:
    """Sums per step, from `begin` on, for each of some columns."""

    def __init__(self, names: Sequence[str], begin: float) -> None:
        self.width_s = FIRST_STEP_S
        self.begin = begin
        self.columns: dict[str, list[float]] = {name: [] for name in names}

    def spread(self, begin: float, end: float, **amounts: float) -> None:
        """Add amounts evenly over [begin, end]; at once, for an instant."""
        begin = max(begin, self.begin)  # the clock of a worker may be wrong
        end = max(begin, end)
        self._reach(end)
        first, last = self._bin(begin), self._bin(end)
        for number in range(first, last + 1):
            low = self.begin + number * self.width_s
            inside = min(end, low + self.width_s) - max(begin, low)
            share = inside / (end - begin) if end > begin else float(number == first)
            for name, amount in amounts.items():
                self.columns[name][number] += amount * share

    def _bin(self, at: float) -> int:
        return int((at - self.begin) / self.width_s)

    def _reach(self, end: float) -> None:
        """Make room up to `end`, in wider steps where there are too many."""
        while self._bin(end) >= MAX_BINS:
            self.width_s *= 2
            for column in self.columns.values():
                column[:] = [sum(column[i : i + 2]) for i in range(0, len(column), 2)]
        needed = self._bin(end) + 1
        for column in self.columns.values():
            column.extend([0.0] * (needed - len(column)))
