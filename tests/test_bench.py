"""The bench: its measurement, table and JSON, on a step of milliseconds. What it measures is not asserted."""

import json
import sys

import pytest
import small

from maxsep import bench
from maxsep.config import cli
from maxsep.measure import growth

SIZES = {
    "train.batch_size": 4,
    "data.sequence_length": 32,
    "data.tokenizer": "bytes",
    "model.layers": 1,
    "model.d_model": 32,
    "model.heads": 4,
    "model.experts": 4,
    "model.d_ff": 32,
    "model.vocab_size": 384,
}
SMALL = [*(f"--config.{field}={size}" for field, size in SIZES.items())]


def run(*arguments):
    return of("train", "--warmup=1", *arguments)


def of(command, *arguments):
    argv = ["bench", command, *SMALL, *arguments]
    return cli.run(bench.main, bench.define, bench.__doc__, "configs/bench.py", bench.COMMANDS, argv)


def test_train_beside_a_peer_that_fails(tmp_path, capsys):
    """Which does not take the others with it."""
    python = tmp_path / "maxtext" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such device >&2\nexit 1\n")
    python.chmod(0o755)
    path = tmp_path / "figures.jsonl"
    mesh = ("--config.mesh.attention=2", "--config.mesh.expert=2")
    assert run("--steps=3", "--turn=2", "--parts", f"--peers={tmp_path}", f"--json={path}", *mesh) == cli.DONE

    result, peer = map(json.loads, path.read_text().splitlines())
    assert peer == {"system": "maxtext", "error": "maxtext: ended with status 1 and said: no such device"}
    assert (result["system"], result["task"], result["dtype"]) == ("maxsep", "train", "float32")
    assert (result["devices"], result["layout"]) == (4, "ma")
    assert result["mesh"] == {"stage": 1, "attention": 2, "expert": 2}
    assert result["shape"]["experts"] == 4
    assert (result["bubble"], result["steps"]) == (0, 3)
    assert result["memory"]["arguments"] > 0 and result["memory"]["temporaries"] > 0
    assert result["min_seconds"] <= result["p10_seconds"] <= result["median_seconds"] <= result["p90_seconds"]
    assert result["tokens_per_second"] == pytest.approx(4 * 32 / result["median_seconds"])
    assert 0 < result["peak_share"] < 1
    assert sum(result["parts"].values()) == pytest.approx(1)
    assert {"attention", "dispatch", "head", "optimizer", "communication: dispatch"} <= set(result["parts"])

    out, err = capsys.readouterr()
    assert "4 x simulated CPU device" in out and "no such device" in out
    (row,) = (line for line in out.splitlines() if line.startswith("maxsep "))
    assert f"{result['median_seconds']:.4f}" in row
    assert f"temporaries {result['memory']['temporaries'] / 1e6:.1f}" in out
    assert "maxsep: 3/3 steps" in err


def test_growth(tmp_path, capsys):
    """A config that is in several series is measured once."""
    path = tmp_path / "figures.jsonl"
    sizes = ("--grow_tokens=1", "--grow_sequence=32", "--grow_experts=4")
    assert of("growth", "--steps=1", "--warmup=1", *sizes, f"--json={path}") == cli.DONE
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["series"], one["value"]) for one in results] == [("tokens", 1), ("sequence", 32), ("experts", 4)]
    assert len({one["median_seconds"] for one in results}) == 1
    out, err = capsys.readouterr()
    assert err.count("compiling") == 1
    assert out.count(f"{results[0]['median_seconds']:.3f}") == 3


def test_one_size_grows_at_a_time():
    values = {"tokens": [1, 4], "sequence": [64], "experts": [2, 8]}
    sizes = [
        (config.train.batch_size, config.data.sequence_length, config.model.experts)
        for _, _, config in growth.points(small.config(), values)
    ]
    batch, sequence, experts = sizes[0]
    others = [(4 * batch, sequence, experts), (batch * sequence // 64, 64, experts)]
    assert sizes[1:] == [*others, (batch, sequence, 2), (batch, sequence, 8)]


def test_decode(tmp_path, capsys):
    path, mesh = tmp_path / "figures.jsonl", ("--config.mesh.expert=2",)
    sizes = ("--contexts=20", "--batches=3", "--new=10", "--repeats=2")
    assert of("decode", *sizes, "--experts", f"--json={path}", *mesh) == cli.DONE
    result, experts = map(json.loads, path.read_text().splitlines())
    assert (result["system"], result["task"], result["devices"], result["layout"]) == ("maxsep", "decode", 2, "ma")
    assert (result["shape"]["context"], result["shape"]["batch"], result["shape"]["new"]) == (20, 3, 10)
    assert result["generations"] == 2
    tpot = result["tpot_seconds"]
    assert 0 < tpot["min"] <= tpot["p50"] <= tpot["p99"]
    assert result["ttft_seconds"]["min"] > 0
    assert result["tokens_per_second_per_device"] == pytest.approx(result["tokens_per_second"] / 2)
    assert result["floor_share"] == pytest.approx(result["floor_seconds"] / tpot["p50"])
    assert experts["rows"] == 6 and experts["chosen"] in experts["seconds"]
    out = capsys.readouterr().out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("maxsep "))
    assert row[:3] == ["maxsep", "3", "20"] and f"{tpot['p50'] * 1e3:.2f}" in row
    assert "batch 3" in out and "*: chosen" in out


def test_beside_peers_the_second_generation_of_a_turn_counts():
    from maxsep.inference.speed import second

    of_turn = {"prefill": [9.0, 1.0], "seconds": [7.0, 7.0, 2.0, 3.0], "other_cpu": 0.1}
    assert second(of_turn) == {"prefill": [1.0], "seconds": [2.0, 3.0], "other_cpu": 0.1}


def test_a_figure_without_matplotlib_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert of("decode", f"--plot={tmp_path}/a.png") == cli.USER_ERROR
    assert capsys.readouterr() == ("", "error: --plot: needs matplotlib; pip install -e '.[viz]'\n")


@pytest.mark.parametrize(
    ("command", "argument", "error"),
    [
        ("decode", "--steps=3", "--steps: got beside decode; takes train or growth"),
        ("growth", "--parts", "--parts: got beside growth; takes train"),
        ("growth", "--grow_sequence=48", "--grow_sequence: got 48; takes what divides the 128 tokens of a step"),
        (
            "growth",
            "--grow_sequence=64 --grow_experts=1",
            "--grow_experts: got 1, with which model.top_k: got 2; takes",
        ),
        ("growth", "--grow_tokens=2,x", "--grow_tokens: got 2,x; takes integers from 1 up"),
        ("train", "--batches=1", "--batches: got beside train; takes decode"),
        ("decode", "--contexts=512,0", "--contexts: got 512,0; takes integers from 1 up"),
        ("decode", "--batches=", "--batches: got"),
        ("decode", "--plot=/nowhere/a.png", "--plot: got '/nowhere/a.png'"),
    ],
)
def test_mistakes_of_a_command(command, argument, error, capsys):
    assert of(command, *argument.split()) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert error in err


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("--steps=0", "steps"),
        ("--peers=/nowhere", "--peers: got /nowhere"),
        ("--json=/nowhere/figures.jsonl", "--json: got '/nowhere/figures.jsonl'"),
        ("--config.mesh.expert=3", "mesh.expert"),
    ],
)
def test_mistakes(argument, error, capsys):
    assert run(argument) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert error in err
    assert err.count("\n") == 1
