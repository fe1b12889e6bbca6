"""A run on a mixture: its rows and its result by source, and resuming it."""

import json
import math
import re

from corpora import mixed

from maxsep.config import cli
from maxsep.output.metrics import read_rows


def test_rows_and_summary_tell_of_each_source(workdir, tmp_path, call):
    fields = mixed(tmp_path) | {"train__steps": 2, "train__eval_every": 0}
    status, printed, errors = call(workdir, **fields)
    assert status == cli.DONE, errors
    train, evaluation = read_rows(workdir / "metrics.jsonl")[-2:]
    assert train["split"] == "train" and evaluation["split"] == "eval"
    records = [round(epochs * n) for epochs, n in zip(train["epochs"].values(), records_of(printed), strict=True)]
    assert list(train["epochs"]) == ["a", "b", "c"] and sum(records) == 2 * 8
    assert all(abs(n - share * 16) < 1 for n, share in zip(records, (0.5, 0.2, 0.3), strict=True))
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["eval_losses"] == evaluation["losses"] and list(evaluation["losses"]) == ["a", "b", "c"]
    targets = [held_out - 1 for _, held_out in tokens_of(printed)]
    assert summary["eval_tokens"] == sum(targets)
    mean = sum(n * loss for n, loss in zip(targets, evaluation["losses"].values(), strict=True)) / sum(targets)
    assert math.isclose(mean, evaluation["loss"], rel_tol=1e-12)
    for name, loss in evaluation["losses"].items():
        assert f"    {name} " in printed and f"{loss:.4f} over" in printed


def tokens_of(printed):
    """Training and held-out tokens of each source, as the console has them."""
    found = re.findall(r"^  corpus .*: ([\d,]+) tokens of .* train on, ([\d,]+) of", printed, re.MULTILINE)
    return [tuple(int(number.replace(",", "")) for number in line) for line in found]


def records_of(printed):
    return [math.ceil((train - 1) / 32) for train, _ in tokens_of(printed)]


def test_a_changed_weight_is_refused_and_a_source_that_is_short_is_named(workdir, tmp_path, call):
    fields = mixed(tmp_path) | {"train__steps": 1}
    assert call(workdir, **fields)[0] == cli.DONE
    other = fields | {
        "train__steps": 2,
        "data__mixture": fields["data__mixture"].replace("0.5", "0.4").replace("0.2", "0.3"),
    }
    status, _, errors = call(workdir, **other)
    assert status == cli.USER_ERROR and errors.startswith("error: data.mixture: got (a:0.4:")
    (tmp_path / "c.jsonl").write_text('{"text": "short"}\n{"text": "and short"}\n')
    status, _, errors = call(tmp_path / "other", **fields)
    assert status == cli.USER_ERROR
    assert errors.splitlines()[-1].startswith("error: data.mixture: c: data.sequence_length: got 32; takes less than")
