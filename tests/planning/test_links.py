"""What a device sends on the links inside a node and between nodes."""

import pytest

from maxsep.measure.program import WIRE
from maxsep.planning.links import load

ROW, ACROSS, ALL = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]
NODES = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "kind, groups, inside, between",
    [
        # Of 80 bytes to each of 8 a tenth each: three devices are here, four there.
        ("all-to-all", ROW, 60, 0),
        ("all-to-all", ACROSS, 0, 40),
        ("all-to-all", ALL, 30, 40),
        # A gather brings a device what all others have, over a ring; the four of a node share the way out.
        ("all-gather", ROW, 3 * 80, 0),
        ("all-gather", ACROSS, 0, 80),
        ("all-gather", ALL, 7 * 80, 7 * 80 / 4),
        ("reduce-scatter", ALL, 70, 70 / 4),
        ("all-reduce", ALL, 140, 140 / 4),
        ("collective-permute", [[0, 1], [1, 2]], 80, 0),
        ("collective-permute", [[2, 3], [3, 4]], 0, 80),
    ],
)
def test_the_load_of_80_bytes(kind, groups, inside, between):
    found = load(kind, 80, groups, NODES)
    assert (found.inside, found.between) == (inside, between)


@pytest.mark.parametrize("kind", WIRE)
def test_in_one_node_all_that_is_sent_stays_there(kind):
    groups = [[0, 1], [2, 3]] if kind == "collective-permute" else [list(range(8))]
    found = load(kind, 80, groups, [0] * 8)
    assert (found.inside, found.between) == (pytest.approx(80 * WIRE[kind](8)), 0)
