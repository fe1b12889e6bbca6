"""Rates and shares from what has been measured: fits that find what made the figures, and files that keep them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small import config

from maxsep import plan
from maxsep.config import ConfigError, cli
from maxsep.config.cluster import load_cluster
from maxsep.measure.schedule import Collective, Kernel, Loop, Schedule
from maxsep.planning import calibration, comparison, rates
from maxsep.planning.links import load
from maxsep.planning.prices import price
from maxsep.planning.rows import Row

CLUSTER = replace(
    load_cluster("cpu:1x4"),
    flops={"float32": 1e10},
    memory_bytes=1e9,
    memory_bandwidth=1e9,
    inside=1e8,
    between=1e8,
    latency=1e-4,
)
NODES = [0] * 4


def program(products: float, moved: int, sent: int, times: int) -> Schedule:
    """A step that computes, moves and sends so much, in so many messages."""
    gather = Collective("all-gather", {"attention": 1.0}, sent // times, 0, None)
    kernels = (Kernel({"f32": products}, 0), Kernel({}, moved), Loop(times, (gather,)))
    return Schedule(kernels, (((0, 1), (2, 3)),), 1.0, {})


def test_shares_are_found_from_the_steps_that_they_make():
    programs = [(program(1e10 * a, 10**9 * b, 10**8 * c, d), NODES) for a, b, c, d in
                [(4, 1, 1, 4), (1, 4, 1, 8), (1, 1, 4, 4), (2, 2, 1, 400), (1, 2, 3, 40)]]  # fmt: skip
    true = replace(CLUSTER, reached={"products": 0.8, "memory": 0.5, "links": 0.6}, latency=2e-4)
    seconds = [price(*one[:1], true, NODES).step for one in programs]
    found = calibration.fitted(programs, seconds, CLUSTER)
    again = [price(schedule, found, nodes).step for schedule, nodes in programs]
    assert again == pytest.approx(seconds, rel=0.05), "the prior holds each share near 1"
    assert found.reached["memory"] < found.reached["links"] < found.reached["products"] < 1
    assert found.latency > CLUSTER.latency
    least, most = found.spread
    assert 0.95 < least <= 1 <= most < 1.05


def test_a_latency_and_a_rate_are_found_from_collectives():
    collectives = []
    for kind in ("all-gather", "all-reduce", "all-to-all"):
        for size in (10**3, 10**6):
            one = load(kind, size, [[0, 1, 2, 3]], NODES)
            seconds = one.hops * 1e-4 + one.inside / 2e8
            collectives.append({"kind": kind, "groups": [[0, 1, 2, 3]], "bytes": size, "seconds": seconds})
    assert calibration._links(collectives) == pytest.approx((1e-4, 2e8))
    assert calibration._links([]) == (0.0, None), "of one device"


def test_a_written_cluster_is_read_again(tmp_path):
    measured = replace(CLUSTER, reached={"products": 0.8, "memory": 0.5, "links": 0.6}, spread=(0.9, 1.1))
    gpus = replace(load_cluster("h100:1x4"), reached=measured.reached, latency=1e-5)
    for name, cluster in (("mine", measured), ("gpus", gpus)):
        (tmp_path / f"{name}.py").write_text(calibration.source(cluster, "Measured."))
        assert load_cluster(f"{tmp_path}/{name}.py:1x4") == cluster


def test_rates_are_of_one_device(monkeypatch):
    monkeypatch.setattr(rates, "SIZES", (2**10, 2**12))
    monkeypatch.setattr(rates, "REPEATS", 1)
    found = rates.measured(config((2, 2)), 4)
    assert set(found["flops"]) == {"float32"} and min(found["flops"].values()) > 0
    axes = {(tuple(one["axes"]), one["kind"], one["bytes"]) for one in found["collectives"]}
    assert len(axes) == len(found["collectives"]) == 3 * 5 * 2, "each axis and both, kinds, sizes"
    of = {tuple(one["axes"]): one["groups"] for one in found["collectives"]}
    assert of[("attention",)] == [[0, 2], [1, 3]] and of[("expert",)] == [[0, 1], [2, 3]]
    assert all(one["seconds"] > 0 for one in found["collectives"])


def row(name: str, seconds: float) -> Row:
    made = Row(name, name, {}, inner="expert", flags=[f"--config.layout={name}"], fits=True, step_seconds=seconds)
    return replace(made, ranges={"step_seconds": [seconds, 2 * seconds]}, memory_bytes={"total": 10**9})


def test_rows_are_measured_and_those_that_fail_are_left_out(tmp_path, monkeypatch):
    def run(command, log, cluster, what):
        if "--config.layout=tp" in command:
            raise cli.Exit(cli.CRASHED, "the bench: killed")
        if "--config.layout=pp" in command:
            raise ConfigError("memory: too little")
        out = next(flag.partition("=")[2] for flag in command if flag.startswith("--json="))
        with open(out, "w", encoding="utf-8") as f:
            json.dump({"median_seconds": 3.0, "memory": {"arguments": 4, "temporaries": 5}}, f)

    monkeypatch.setattr(calibration, "run", run)
    told = []
    made = SimpleNamespace(
        rows=[row("ma", 2.0), row("tp", 2.5), row("pp", 3.0)],
        cluster=CLUSTER,
        config=SimpleNamespace(name="small"),
        reason="",
    )
    (found,) = comparison.measure(made, [], tmp_path, told.append)
    assert (found.row.name, found.seconds, found.memory_bytes) == ("ma", 3.0, 9)
    assert told == [
        "[1/3] ma: 3 s per step, 2 s planned",
        "warning: tp is left out: the bench: killed",
        "warning: pp is left out: memory: too little",
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{comparison.HEAD}\n|---|---|---|---|---|---|---|\n| old |\n\nafter\n")
    comparison.append(page, [found], made)
    lines = page.read_text().splitlines()
    line = "| `small`, `ma` | 4 × simulated CPU device | 1.0 | 0 (the compiler's count there) | 2–4 | 3 | 0.67 |"
    assert lines[4:] == ["| old |", line, "", "after"]
    page.write_text("nothing\n")
    with pytest.raises(ConfigError, match=r"^--table: .* has no table with the columns of docs/plan\.md"):
        comparison.append(page, [found], made)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--measure={tmp}/here.txt"], "takes a file that ends in .py, and one node of GPUs or of simulated devices"),
        (["--measure={tmp}/none/here.py"], "--measure: got "),
        (["--measure={tmp}/here.py", "--cluster=h100:2x8"], "for 2 x 8 NVIDIA H100 80GB HBM3; takes a file"),
        (["--measure={tmp}/here.py", "--mode=decode"], "--measure: got beside --mode=decode; takes --mode=train"),
        (["--table={tmp}/page.md"], "--table: got without --measure"),
        (["--cluster={tmp}/wrong.py:1x4"], "wrong.py: reached: got {'products': 1}; takes None, or shares of products"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(calibration.child, "run", lambda *_, **__: pytest.fail("it began"))
    wrong = calibration.source(replace(CLUSTER, reached={"products": 1}), "Wrong.")
    (tmp_path / "wrong.py").write_text(wrong)
    argv = ["plan", "--config=configs/tiny.py", "--cluster=cpu:1x4", f"--cache={tmp_path}"]
    status = plan.run([*argv, *(argument.format(tmp=tmp_path) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (status, out) == (cli.USER_ERROR, "")
    assert says in err and err.startswith("error: ") and err.count("\n") == 1, err
