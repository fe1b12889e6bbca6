"""Which documents are trained on, and which are held out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxsep.config import ConfigError
from maxsep.data import splits
from maxsep.data.splits import place, sides

SLICE = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted).filter(lambda ab: ab[0] < ab[1])
SLICES = st.lists(SLICE.map(lambda ab: f"train[{ab[0]}%:{ab[1]}%]"), min_size=1, max_size=4).map("+".join)
PLACES = [(i + 0.5) / 100 for i in range(100)]  # one in each percent


def of(found, split="train"):
    """The percents that are trained on, and those that are held out."""
    its = found.get(split, splits.Sides())
    return [{i for i, p in enumerate(PLACES) if its.of(p) == side} for side in ("train", "eval")]


def percents(text):
    """As `text` says, by hand."""
    found = set()
    for term in text.split("+"):
        a, b = term.removeprefix("train[").removesuffix("]").replace("%", "").split(":")
        found |= set(range(int(a or 0), int(b or 100)))
    return found


@given(held_out=SLICES)
def test_all_that_is_not_held_out_is_trained_on(held_out):
    if percents(held_out) == set(range(100)):
        with pytest.raises(ConfigError, match=r"^data\.eval_split: got train.*, which leaves nothing to train on"):
            sides(None, held_out, {"train": 0}, None)
        return
    train, evaluated = of(sides(None, held_out, {"train": 0}, None))
    assert evaluated == percents(held_out) and train == set(range(100)) - evaluated


@given(train=SLICES, held_out=SLICES)
def test_slices_of_both_sides_may_not_overlap(train, held_out):
    if percents(train) & percents(held_out):
        with pytest.raises(ConfigError, match=r"^data\.split: got train.*, which overlaps the held-out split train"):
            sides(train, held_out, {"train": 0}, None)
    else:
        assert of(sides(train, held_out, {"train": 0}, None)) == [percents(train), percents(held_out)]


@given(size=st.integers(0, 1 << 45), more=st.integers(0, 1 << 45), most=st.integers(1, 1 << 33))
def test_a_corpus_that_grows_holds_out_nothing_that_was_trained_on(size, more, most):
    """By default about as much is held out as may be, and at most 10 %."""
    before, after = (sides(None, None, {"train": s}, most)["train"] for s in (size, size + more))
    ((start, _),), ((later, stop),) = before.held_out, after.held_out
    assert start <= later and stop == 1 and before.train == ((0, start),) and after.train == ((0, later),)
    tokens = (1 - start) * size / splits.BYTES_A_TOKEN
    assert start == 0.9 or most * 0.999 <= tokens  # an estimate: `1 - start` is rounded
    assert tokens < 2 * most * 1.001


def test_the_validation_split_is_held_out_and_what_of_it_is_needed():
    sizes = {"test": 10**9, "train": 10**12, "validation": 7 * 10**9}
    found = sides(None, None, sizes, 10**9)
    assert list(found) == ["train", "validation"] and of(found) == [set(range(100)), set()]
    assert found["validation"].held_out == ((0, 1),)
    assert sides(None, None, sizes, 500 * 10**6)["validation"].held_out == ((0.5, 1),)
    assert found == sides("train", "validation", sizes, 10**9)


@pytest.mark.parametrize(
    "train, held_out, field",
    [
        ("train", None, "data.split"),
        ("validation", None, "data.split"),
        ("train[:10]", None, "data.split"),
        ("train[1.2.3%:]", None, "data.split"),
        (None, "test", "data.eval_split"),
        (None, "train[90%:80%]", "data.eval_split"),
        (None, "train[90%:101%]", "data.eval_split"),
        (None, "train[90%", "data.eval_split"),
    ],
)
def test_wrong_splits_are_refused(train, held_out, field):
    with pytest.raises(ConfigError, match=rf"^{field}: got "):
        sides(train, held_out, {"train": 0}, None)


def test_without_a_train_split_one_is_named():
    with pytest.raises(ConfigError, match=r"^data\.split: got None; takes splits of test, validation"):
        sides(None, None, {"validation": 0, "test": 0}, None)
    assert list(sides("test", None, {"validation": 0, "test": 0}, None)) == ["test", "validation"]


def test_places_are_even():
    places = [place(f"document {i}".encode()) for i in range(10_000)]
    assert all(0 <= p < 1 for p in places)
    assert abs(sum(p >= 0.9 for p in places) - 1000) < 4 * 30
    assert place(b"") == place(b"") != place(b"a")
