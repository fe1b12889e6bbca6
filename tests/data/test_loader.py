"""Batches made of records: their order, and mixtures of several sources."""

import hashlib
import threading
from fractions import Fraction

import kill
import numpy as np
import pytest
from corpora import ensure
from hypothesis import given
from hypothesis import strategies as st

from maxsep.data import packing
from maxsep.data.loader import eval_batches, train_batches
from maxsep.data.mixture import Mixture


def write(folder, name, count):
    """A corpus of `count` documents, no two records of which are the same."""
    path = folder / f"{name}.jsonl"
    texts = [hashlib.sha256(f"{name} {i}".encode()).hexdigest() for i in range(count)]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return ensure(path, folder / "cache", sequence_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def corpus(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD_TOKENS", 64)
        return write(folder, "one", 40)


def single(corpus):
    return Mixture({"files": corpus}, (1,), named=False)


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return np.stack(taken)


def all_records(split):
    return np.stack([split[i] for i in range(len(split))])


ROWS = np.arange(4)


def test_an_epoch_has_every_record_once(corpus):
    count = len(corpus.train)
    assert count > 20
    taken = take(train_batches(single(corpus), 4, 7, 0, ROWS), count)  # four epochs
    epochs = taken.reshape(4, count, -1)
    expected = sorted(map(tuple, all_records(corpus.train)))
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == expected
    assert len({epoch.tobytes() for epoch in epochs}) == 4
    assert not (epochs[0] == all_records(corpus.train)).all()


def test_another_seed_is_another_order_in_every_epoch(corpus):
    count = len(corpus.train)
    orders = [take(train_batches(single(corpus), count, seed, 0, np.arange(count)), 3) for seed in (0, 1, 2)]
    assert len({epoch.tobytes() for order in orders for epoch in order}) == 9


@pytest.mark.parametrize("hosts", [[[0, 1], [2, 3]], [[3], [0, 2], [1]], [[0, 1, 2, 3], []]])
def test_hosts_share_a_batch(corpus, hosts):
    whole = take(train_batches(single(corpus), 4, 3, 0, ROWS), 30)
    for rows in hosts:
        part = take(train_batches(single(corpus), 4, 3, 0, np.array(rows, int)), 30)
        assert part.dtype == np.int32 and (part == whole[:, rows]).all()


@pytest.mark.parametrize("position", [0, 4, 44, 1000])
def test_a_run_goes_on_where_it_stopped(corpus, position):
    whole = take(train_batches(single(corpus), 4, 3, 0, ROWS), position // 4 + 5)
    rest = take(train_batches(single(corpus), 4, 3, position, ROWS), 5)
    assert (rest == whole[position // 4 :]).all()


def test_another_batch_size_goes_on_with_the_same_records(corpus):
    fours = take(train_batches(single(corpus), 4, 3, 0, ROWS), 12).reshape(48, -1)
    twos = take(train_batches(single(corpus), 2, 3, 24, ROWS[:2]), 12).reshape(24, -1)
    assert (fours[24:] == twos).all()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_evaluation_sees_every_record_once(corpus, batch_size):
    batches = np.concatenate(list(eval_batches(corpus.eval, batch_size, np.arange(batch_size))))
    count = len(corpus.eval)
    assert (batches[:count] == all_records(corpus.eval)).all() and (batches[count:] == -1).all()
    assert len(batches) % batch_size == 0 and len(batches) - count < batch_size
    assert (batches[:, 1:] >= 0).sum() == corpus.eval.targets


def test_closing_stops_the_thread(corpus):
    before = set(threading.enumerate())
    batches = train_batches(single(corpus), 4, 0, 0, ROWS)
    next(batches)
    (thread,) = (one for one in set(threading.enumerate()) - before if one.name.startswith("grain-prefetch"))
    batches.close()
    thread.join(kill.LIMIT)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def mixture(folder):
    """Three sources, of which the smallest is read most often."""
    return Mixture({name: write(folder, name, n) for name, n in (("a", 20), ("bb", 30), ("c", 10))}, (50, 20, 30), True)


@given(ratio=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), position=st.integers(0, 10**13))
def test_each_position_is_the_next_of_one_source(ratio, position):
    made = Mixture({}, tuple(ratio), True)
    before, after = made.counts(position), made.counts(position + 1)
    source, own = made.place(position)
    assert sum(before) == position and own == before[source]
    assert after == [n + (i == source) for i, n in enumerate(before)]
    exact = [Fraction(position * part, sum(ratio)) for part in ratio]
    assert all(abs(n - share) < len(ratio) for n, share in zip(before, exact, strict=True))


def sources_of(mixture, records):
    """Which source, and which of its records, each is."""
    known = {
        record.tobytes(): (name, i)
        for name, one in mixture.corpora.items()
        for i, record in enumerate(all_records(one.train))
    }
    assert len(known) == sum(len(one.train) for one in mixture.corpora.values())
    return [known[record.tobytes()] for record in records]


def test_a_mixture_has_its_shares_and_each_record_once_an_epoch(mixture):
    steps = 600  # more than two epochs of each
    taken = take(train_batches(mixture, 4, 3, 0, ROWS), steps).reshape(4 * steps, -1)
    found = sources_of(mixture, taken)
    epochs = mixture.epochs(4 * steps)
    for (name, one), share in zip(mixture.corpora.items(), (0.5, 0.2, 0.3), strict=True):
        own = [number for source, number in found if source == name]
        assert abs(len(own) / len(found) - share) < 0.001
        count = len(one.train)
        assert epochs[name] == len(own) / count > 2
        orders = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert len({tuple(order) for order in orders}) == len(orders)
    assert sorted(set(found[:40])) != sorted(set(found[40:80])), "a stretch has some of each"
    assert {name for name, _ in found[:10]} == set(mixture.corpora)


def test_a_mixture_goes_on_where_it_stopped_on_any_hosts(mixture):
    whole = take(train_batches(mixture, 4, 3, 0, ROWS), 100)
    for rows in ([0, 1], [3], []):
        rest = take(train_batches(mixture, 4, 3, 36 * 4, np.array(rows, int)), 64)
        assert (rest == whole[36:, rows]).all()


def test_a_source_is_not_shuffled_as_another(folder):
    same = Mixture({name: write(folder, "same", 40) for name in "xy"}, (1, 1), True)
    count = len(same.corpora["x"].train)
    taken = take(train_batches(same, 2, 3, 0, ROWS[:2]), count)
    assert not (taken[:, 0] == taken[:, 1]).all()


def test_the_fingerprint_is_of_names_weights_and_texts(mixture):
    a, b, c = mixture.corpora.items()
    others = [
        Mixture(dict([a, b, c]), (50, 30, 20), True),
        Mixture(dict([b, a, c]), (50, 20, 30), True),
        Mixture(dict([("d", a[1]), b, c]), (50, 20, 30), True),
        Mixture(dict([a, b, ("c", b[1])]), (50, 20, 30), True),
    ]
    assert len({one.fingerprint for one in [mixture, *others]}) == 5
    assert Mixture(dict([a, b, c]), (50, 20, 30), True).fingerprint == mixture.fingerprint
