"""How steps are timed."""

from types import SimpleNamespace

import pytest

from maxsep.measure import timing

FACTS = {"system": "some", "shape": {"batch": 4, "sequence": 8}}


def test_a_turn_times_every_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    lengths = iter([0.5, 0.25, 2.0])
    turn = timing.timed(lambda: clock.append(clock.pop() + next(lengths)), 3)
    assert turn["seconds"] == [0.5, 0.25, 2.0]


def test_decoding_counts_the_tokens_of_all_prompts():
    facts = {"shape": {"batch": 4, "new": 3}, "devices": 2}
    turns = [
        {"prefill": [0.5], "seconds": [0.2, 0.1], "other_cpu": 0.0},
        {"prefill": [0.7], "seconds": [0.3, 0.2], "other_cpu": 0.2},
    ]
    found = timing.decoding(facts, turns)
    assert found["tpot_seconds"]["mean"] == found["tpot_seconds"]["p50"] == pytest.approx(0.2)
    assert found["ttft_seconds"]["min"] == 0.5
    assert found["tokens_per_second"] == pytest.approx(4 * 3 * 2 / 2.0)
    assert found["tokens_per_second_per_device"] == pytest.approx(6.0)
    assert found["decode_tokens_per_second"] == pytest.approx(20.0)
    assert (found["generations"], found["other_cpu"]) == (2, 0.1)


def test_own_work_is_not_other_work(monkeypatch):
    clock, busy, own = iter([5.0, 7.0]), iter([10.0, 14.0]), iter([1.0, 4.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(timing, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(timing, "_own_seconds", lambda: next(own))
    assert timing.OtherCPU().cores() == 0.5  # 4 s of work in 2 s, 3 of them its own


def test_no_proc_no_cores(monkeypatch):
    monkeypatch.setattr(timing, "_busy_seconds", lambda: None)
    turn = timing.timed(lambda: None, 1)
    assert turn["other_cpu"] is None
    assert timing.measurement(FACTS, [turn])["other_cpu"] is None


def test_a_measurement_takes_all_turns_together():
    turns = [{"seconds": [4.0, 2.0], "other_cpu": 0.5}, {"seconds": [1.0, 3.0, 2.0], "other_cpu": 0.0}]
    assert timing.measurement(FACTS, turns) == FACTS | {
        "median_seconds": 2.0,
        "min_seconds": 1.0,
        "p10_seconds": pytest.approx(1.4),
        "p90_seconds": pytest.approx(3.6),
        "steps": 5,
        "tokens_per_second": 16.0,
        "other_cpu": 0.25,  # 6 of 12 seconds beside half a core
    }


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (0.25, 1.5), (0.5, 2.0), (1, 4.0)])
def test_quantiles(share, value):
    assert timing.quantile([1.0, 2.0, 4.0], share) == value
