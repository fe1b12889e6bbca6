from hypothesis import given
from hypothesis import strategies as st

from maxsep.data import intervals

INTERVAL = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple)
SOME = st.lists(INTERVAL, max_size=5)


def numbers(some):
    return {number for start, stop in some for number in range(start, stop)}


@given(INTERVAL, SOME)
def test_less_is_what_none_of_them_covers(interval, taken):
    found = list(intervals.less(interval, taken))
    assert numbers(found) == numbers([interval]) - numbers(taken)
    assert found == sorted(found) and all(start < stop for start, stop in found)


@given(SOME)
def test_once_covers_the_same_without_repeating_and_keeps_what_repeats_nothing(some):
    found = intervals.once(some)
    assert numbers(found) == numbers(some)
    assert sum(stop - start for start, stop in found) == len(numbers(some))
    if sum(stop - start for start, stop in some) == len(numbers(some)):
        assert found == tuple((start, stop) for start, stop in some if start < stop)


@given(SOME, SOME)
def test_overlap_is_a_number_in_both(some, others):
    assert intervals.overlap(some, others) == bool(numbers(some) & numbers(others))
