"""How the vectors of a version find their list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ListAssignment:
    """The nearest of all centroids, or the nearest on two levels.

    slack: infinite for the nearest of all, else that of kernels.assign_two_level; its groups of centroids follow from
    the centroids and `seed`. share: of the training sample's vectors that go to their nearest centroid.
    """

    slack: float = math.inf
    share: float = 1.0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, from which the same bits come back; an infinite slack is null."""
        return {"slack": None if math.isinf(self.slack) else self.slack, "share": self.share, "seed": self.seed}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> ListAssignment:
        slack = math.inf if fields["slack"] is None else float(fields["slack"])
        return ListAssignment(slack, float(fields["share"]), int(fields["seed"]))


NEAREST = ListAssignment()
