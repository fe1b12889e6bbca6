"""A comparison of the certificate: one quantity beside what it has to be."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One quantity beside its reference."""

    part: str  # of the certificate
    run: str  # as ma:4x4; "" where no layout matters
    quantity: str
    difference: float  # the largest, over the largest entry of the reference
    worst: str  # where: a leaf, or two devices
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def excess(self) -> float:
        """How many times its tolerance the difference is."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.tolerance if self.tolerance else float("inf")


def worst_of(checks: Iterable[Check]) -> Check:
    """The one that is furthest beyond its tolerance; of several the one with the largest difference."""
    return max(checks, key=lambda check: (check.excess, check.difference))
