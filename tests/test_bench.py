"""The bench: its measurement, table and JSON, on a step of milliseconds. What it measures is not asserted."""

import json

import pytest

from maxsep import bench
from maxsep.config import cli

SIZES = {
    "train.batch_size": 4,
    "data.sequence_length": 32,
    "data.tokenizer": "bytes",
    "model.layers": 2,
    "model.d_model": 32,
    "model.heads": 4,
    "model.experts": 4,
    "model.d_ff": 32,
    "model.vocab_size": 384,
}
SMALL = ["--warmup=1", *(f"--config.{field}={size}" for field, size in SIZES.items())]


def run(*arguments):
    return cli.run(
        bench.main, bench.define, bench.__doc__, "configs/bench.py", ("train",), ["bench", "train", *SMALL, *arguments]
    )


def test_train(tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    mesh = ("--config.mesh.attention=2", "--config.mesh.expert=2")
    assert run("--steps=3", "--turn=2", "--parts", f"--json={path}", *mesh) == cli.DONE

    (result,) = map(json.loads, path.read_text().splitlines())
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
    assert {"attention", "dispatch", "head", "optimizer", "communication"} <= set(result["parts"])

    out, err = capsys.readouterr()
    assert "4 x simulated CPU device" in out
    (row,) = (line for line in out.splitlines() if line.startswith("maxsep "))
    assert f"{result['median_seconds']:.4f}" in row
    assert f"temporaries {result['memory']['temporaries'] / 1e6:.1f}" in out
    assert "maxsep: 3/3 steps" in err


def test_a_peer_that_fails_does_not_take_the_others_with_it(tmp_path, capsys):
    python = tmp_path / "maxtext" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such device >&2\nexit 1\n")
    python.chmod(0o755)
    path = tmp_path / "figures.jsonl"
    assert run("--steps=1", f"--peers={tmp_path}", f"--json={path}") == cli.DONE
    ours, theirs = map(json.loads, path.read_text().splitlines())
    assert ours["steps"] == 1
    assert theirs == {"system": "maxtext", "error": "maxtext: ended with status 1 and said: no such device"}
    assert "no such device" in capsys.readouterr().out


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
