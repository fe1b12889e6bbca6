"""The roofline of a schedule: by hand, and in what must hold of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxsep.config.cluster import Cluster
from maxsep.measure.schedule import Branches, Collective, Kernel, Loop, Schedule, Wait
from maxsep.planning.prices import UnknownRateError, price

CLUSTER = Cluster(
    gpu=None,
    flops={"bfloat16": 100.0, "tf32": 50.0, "float32": 10.0},
    memory_bytes=1,
    memory_bandwidth=10.0,
    inside=4.0,
    between=2.0,
    watts=None,
)
NODES = [0, 0, 1, 1]
GROUPS = (((0, 1), (2, 3)), ((0, 2), (1, 3)))
PRODUCT, COPY = Kernel({"bf16": 300.0}, 10), Kernel({}, 20)  # 3 s and 1 s of bytes beside them; 2 s


def send(size: int, name: str | None = None, groups: int = 0, role: str = "attention") -> Collective:
    """All-to-all: half of it goes over the link. 8 bytes take 1 s in a node."""
    return Collective("all-to-all", {role: 1.0}, size, groups, name)


def cost(*steps, busy: float = 1):
    return price(Schedule(steps, GROUPS, busy, {}), CLUSTER, NODES)


@pytest.mark.parametrize(
    "steps, step, products, memory, exposed",
    [
        ([PRODUCT, COPY], 5, 3, 2, 0),
        ([Kernel({"bf16": 50.0}, 10)], 1, 0.5, 0.5, 0),
        ([Kernel({"f32": 50.0}, 0), Kernel({"f32 highest": 50.0}, 0)], 6, 6, 0, 0),
        ([COPY, send(16)], 4, 0, 2, 2),
        ([COPY, send(16, groups=1)], 6, 0, 2, 4),
        ([send(16, "a"), COPY, Wait("a")], 2, 0, 2, 0),
        ([send(24, "a"), COPY, Wait("a")], 3, 0, 2, 1),
        # The second waits for the first; what is never waited for ends with its computation.
        ([send(16, "a"), send(16, "b"), COPY, Wait("a"), Wait("b")], 4, 0, 2, 2),
        ([send(40, "a"), COPY], 5, 0, 2, 3),
        ([Loop(4, (send(24, "a"), COPY, Wait("a")))], 12, 0, 8, 4),
        # The stages wait at each tick for the one that is busy.
        ([Loop(2, (Branches(((COPY, send(8)), (Kernel({}, 1),))),))], 6, 0, 4, 2),
    ],
)
def test_a_schedule_takes(steps, step, products, memory, exposed):
    found = cost(*steps, busy=0.5)
    assert (found.step, found.products, found.memory) == (step, products, memory)
    assert found.exposed == pytest.approx(exposed)


def test_bytes_are_what_one_device_sends_and_seconds_what_all_take():
    found = cost(Loop(2, (Branches(((send(8),), ())),)), busy=0.25)
    (sent,) = found.sent.values()
    assert (sent.times, sent.operand_bytes, sent.inside_bytes) == (0.5, 4, 2)
    assert (sent.inside_seconds, sent.exposed_seconds) == (2, 2)


def test_a_collective_of_several_roles_is_shared_by_bytes():
    both = Collective("all-gather", {"head": 0.75, "attention": 0.25}, 8, 0, None)
    found = cost(both)
    shares = {role: row.exposed_seconds for (role, _, _), row in found.sent.items()}
    assert shares == {"head": 1.5, "attention": 0.5}


@pytest.mark.parametrize("kind", ["f64", "f8e4m3fn", "s8"])
def test_products_without_a_rate_are_refused(kind):
    with pytest.raises(UnknownRateError, match=f"no rate for products of {kind}"):
        cost(Kernel({kind: 1.0}, 0))


KERNELS = st.builds(Kernel, st.dictionaries(st.sampled_from(["bf16", "f32"]), st.integers(0, 900)), st.integers(0, 90))
PARTS = st.lists(KERNELS | st.builds(send, st.integers(1, 90), st.none(), st.integers(0, 1)), max_size=8)


@given(PARTS, PARTS, st.integers(1, 90), st.integers(0, 1), st.integers(1, 5))
def test_overlap_saves_time_and_no_more_than_it_takes(before, beside, size, groups, trips):
    """Between a collective that is waited for at once and one that costs nothing lies one that is waited for later."""
    later = cost(Loop(trips, (*before, send(size, "a", groups), *beside, Wait("a"))))
    at_once = cost(Loop(trips, (*before, send(size, None, groups), *beside)))
    free = cost(Loop(trips, (*before, *beside)))
    assert free.step - 1e-9 <= later.step <= at_once.step + 1e-9
    for found in (later, at_once, free):
        assert found.total("exposed_seconds") == pytest.approx(found.exposed, abs=1e-9)
        links = found.total("inside_seconds") + found.total("between_seconds")
        assert max(found.products + found.memory, links) <= found.step + 1e-9
