"""Whether runs agree, by their own data; and how they scale."""

import pytest
from results import result

from maxsep.ablation.compare import agreement, efficiency


def runs(count: int = 4, **changed) -> list[dict]:
    return [result(f"ma:{number}x1", **changed) for number in range(1, count + 1)]


def test_equal_losses_are_said_to_agree():
    agreed = agreement(runs())
    assert (agreed.apart, agreed.difference, agreed.steps) == ([], 0, 5)
    assert agreed.text.startswith("all losses agree to 1e-09")


@pytest.mark.parametrize("fault", [3e-9, -1e-3, None])
def test_a_fault_in_one_run_names_it(fault):
    found = runs()
    loss = found[2]["losses"][3]
    found[2]["losses"][3] = None if fault is None else loss * (1 + fault)
    agreed = agreement(found)
    assert agreed.apart == ["ma:3x1"]
    assert agreed.text.startswith("WARNING: losses are not the same: ma:3x1 above 1e-09")


def test_rounding_is_no_fault():
    found = runs()
    found[1]["losses"][4] *= 1 + 5e-10
    agreed = agreement(found)
    assert agreed.apart == []
    assert agreed.difference == pytest.approx(5e-10, rel=1e-3)


def test_of_two_runs_none_is_the_right_one():
    found = runs(2)
    found[0]["losses"][0] += 1
    agreed = agreement(found)
    assert agreed.apart == ["ma:1x1", "ma:2x1"]
    assert "Of two runs it cannot be told" in agreed.text


@pytest.mark.parametrize(
    "model, why",
    [
        ({"dtype": "float32", "capacity_factor": None, "capacity_group": None}, "rounding in float32"),
        ({"dtype": "float64", "capacity_factor": 1.0, "capacity_group": None}, "model.capacity_group is None"),
    ],
)
def test_where_nothing_follows_there_is_no_verdict(model, why):
    found = runs(config={"model": model})
    found[0]["losses"][0] += 1
    agreed = agreement(found)
    assert agreed.apart is None
    assert agreed.text.startswith("largest difference") and why in agreed.text


def test_fewer_than_two_runs_are_not_compared():
    assert agreement(runs(1)) is None


def test_only_steps_that_all_have_are_compared():
    found = runs()
    found[0]["steps"], found[0]["losses"] = found[0]["steps"][:3], found[0]["losses"][:3]
    assert agreement(found).steps == 3


def test_efficiency_is_that_of_a_device_over_one_of_four():
    speeds = {"ma:1x1": (1, 100.0), "ma:2x2": (4, 320.0), "ma:4x4": (16, 1088.0), "tp:2x1": (2, 50.0)}
    found = [
        result(name, devices, tokens_per_second_per_device=speed / devices) for name, (devices, speed) in speeds.items()
    ]
    got = efficiency(found)
    assert got == pytest.approx({"ma:1x1": 1.25, "ma:2x2": 1.0, "ma:4x4": 0.85, "tp:2x1": 1.0})
    speed_up = {devices: speed / 100 for name, (devices, speed) in speeds.items() if name.startswith("ma")}
    assert got["ma:4x4"] == pytest.approx((speed_up[16] / 16) / (speed_up[4] / 4))
    assert efficiency([result("ma:4x4"), result("tp:8x2")]) == {}
