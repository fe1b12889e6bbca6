"""`plan --mode=decode`: infer.py's programs, their memory and times, and every mistake in one line."""

import json

import pytest

from maxsep import plan
from maxsep.config import cli
from maxsep.planning import session

CHANGED = {"d_model": 32, "d_ff": 16, "layers": 1, "experts": 4, "vocab_size": 257}
TINY = ["--config=configs/tiny.py", *(f"--config.model.{name}={size}" for name, size in CHANGED.items())]
TINY += ["--config.data.tokenizer=bytes", "--mode=decode"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The rows of two batches."""
    folder = tmp_path_factory.mktemp("decode")
    out = folder / "plan.json"
    flags = ["--cluster=cpu:1x2", "--runs=ma:1x2", "--contexts=32", "--batches=2,16", "--new=8"]
    assert plan.run(["plan", *TINY, *flags, f"--json={out}", f"--cache={folder}", "--jobs=2"]) == cli.DONE
    return json.loads(out.read_text())["layouts"]


def test_weights_and_cache_are_those_of_a_device(found):
    small, large = found
    assert [(row["batch"], row["context"], row["error"]) for row in found] == [(2, 32, None), (16, 32, None)]
    embedding, attention, experts = 2 * 384 * 32, 4 * 32 * 32, 3 * 4 * 32 * 16
    norms_and_router = 3 * 32 + 32 * 4
    weights = embedding + attention + experts // 2 + norms_and_router
    assert small["memory_bytes"]["weights"] == large["memory_bytes"]["weights"] == 4 * weights
    slots = 64  # of 32 tokens and 8 new ones, by 32
    assert small["memory_bytes"]["cache"] == 4 * 2 * 1 * slots * 32, "keys and values of one of two prompts"
    assert large["memory_bytes"]["cache"] == 8 * small["memory_bytes"]["cache"]
    for row in found:
        assert (
            sum(size for kind, size in row["memory_bytes"].items() if kind != "total") == row["memory_bytes"]["total"]
        )


def test_times_are_ranges_above_the_floor_and_grow_with_the_batch(found):
    small, large = found
    for row in found:
        assert 0 < row["floor_seconds"] < row["tpot_seconds"][0] < row["tpot_seconds"][1]
        assert row["tpot_seconds"][0] < row["ttft_seconds"][0], "a prompt has more tokens than one"
        speed = row["batch"] / row["tpot_seconds"][0] / 2
        assert row["tokens_per_second_per_device"][1] == pytest.approx(speed)
    assert small["ttft_seconds"][0] < large["ttft_seconds"][0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--contexts="], "--contexts: got ; takes integers from 1 up, as 512,1024"),
        (["--batches=1,x"], "--batches: got 1,x; takes integers from 1 up"),
        (["--new=0"], "flag --new=0: 0 is not a positive integer"),
        (["--mode=train", "--contexts=64"], "--contexts: got beside --mode=train; takes --mode=decode"),
        (["--picture=x.png"], "--picture: got beside --mode=decode; takes --mode=train"),
        (["--runs=ma:3x1"], "--runs: ma:3x1: mesh: got attention 3"),
        (["--mode=serve"], "flag --mode=serve: value should be one of <train|decode>"),
        (["--cluster=tpu-v5e:1x3"], "--cluster: got tpu-v5e:1x3; takes 1xN, one slice of N chips: 1, 4, 8"),
        (["--cluster=tpu-v5e:2x4"], "--cluster: got tpu-v5e:2x4; takes 1xN, one slice"),
        (["--cluster=tpu-v5e:1x4"], "--cluster: to compile for TPUs takes the extra tpu, which is not installed: pip"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(session.child, "run", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr("maxsep.planning.target._version", {}.get)
    status = plan.run(["plan", *TINY, "--cluster=cpu:1x4", f"--cache={tmp_path}", *arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (cli.USER_ERROR, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1, err
