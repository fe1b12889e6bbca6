"""Certificates: what is scaled down, what is kept, how differences are reported, and that a fault is seen."""

import json
import subprocess
import sys
from dataclasses import replace

import kill
import numpy as np
import pytest
from small import config

from maxsep import certify
from maxsep.certification import certificate, evidence
from maxsep.certification.certificate import Certificate
from maxsep.certification.evidence import Check
from maxsep.certification.plants import PLANTS, planted
from maxsep.certification.scaled import changed, scaled
from maxsep.config import cli, files
from maxsep.config.validate import validate
from maxsep.planning import candidates
from maxsep.training.step import Program

DENSE = {"layers": 4, "dense_layers": 2, "dense_d_ff": 48, "shared_experts": 2, "router_bias_rate": 0.01, "kv_heads": 4}
KEPT = ("heads", "kv_heads", "experts", "top_k", "router_bias_rate", "shared_experts", "remat", "expert_dropout")


@pytest.mark.parametrize(
    "made",
    [
        files.load_config("configs/tiny.py"),
        files.load_config("configs/seed.py"),
        files.load_config("configs/small.py"),
        files.load_config("configs/mixtral_8x7b.py"),
        config(model=DENSE),
    ],
    ids=lambda made: made.name,
)
def test_the_scaled_model_fits_every_mesh_and_keeps_what_decides_who_does_what(made):
    runs = candidates.one_of_each(made, 16 if made.mesh.devices == 1 else made.mesh.devices)
    small = scaled(made, runs)
    for run in (evidence.alone(small), *(replace(small, layout=run.layout, mesh=run.mesh) for run in runs)):
        validate(run)
    assert [getattr(small.model, name) for name in KEPT] == [getattr(made.model, name) for name in KEPT]
    assert (small.model.capacity_factor is None) == (made.model.capacity_factor is None)
    assert bool(small.model.dense_layers) == bool(made.model.dense_layers)
    assert small.model.dtype == "float64" and small.model.d_model <= made.model.d_model
    assert {"model.dtype", "train.steps"} <= changed(made, small).keys()
    assert "layout" not in changed(made, small)


def test_the_worst_leaf_is_named():
    reference = {"start": {"w": 0}, "gradients": {"a": np.array([1.0, -2.0]), "b": np.array([4.0])}, "loss": 2.0}
    got = {"new state": {"w": 0}, "gradients": {"a": np.array([1.0, -2.0]), "b": np.array([4.1])}, "loss": 2.0}
    checks = {check.quantity: check for check in evidence.compared("ma:1x2", got, reference)}
    assert [check.passed for check in checks.values()] == [True, False, True]
    assert checks["gradients"].worst == "['b']" and checks["gradients"].difference == pytest.approx(0.025)
    for broken in (got, reference):
        good = broken["gradients"]["a"]
        broken["gradients"]["a"] = np.array([np.nan, -2.0])
        (check,) = (check for check in evidence.compared("ma:1x2", got, reference) if check.quantity == "gradients")
        assert (check.worst, check.difference, check.passed) == ("['a']", float("inf"), False)
        broken["gradients"]["a"] = good


def made(*checks: Check) -> Certificate:
    tiny = files.load_config("configs/tiny.py")
    return Certificate(tiny, scaled(tiny, [tiny]), list(checks))


def test_a_certificate_says_first_whether_it_passed(tmp_path):
    good, bad = Check("ma:1x2", "loss", 1e-12, "loss"), Check("ma:1x2", "gradients", 1e-3, "['a']")
    assert made(good).text()[0] == "tiny: passed"
    failed = made(good, bad)
    assert failed.text()[0] == "tiny: NOT passed: ma:1x2: gradients differs by 1.0e-03 at ['a']"
    failed.write(tmp_path)
    assert (tmp_path / "certificate.md").read_text().startswith("# tiny: NOT passed: ma:1x2")
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert found["passed"] is False and [check["passed"] for check in found["checks"]] == [True, False]
    assert found["hash"] != made(good).to_json()["hash"] and found["not_certified"]


def test_a_plant_is_taken_out_again():
    own = Program._reduce
    with planted(PLANTS[0]):
        assert Program._reduce is not own
    assert Program._reduce is own


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--runs=ma"], "--runs: got 'ma'; takes layout:"),
        (["--runs=ma:3x4"], "--runs: ma:3x4: mesh: got attention 3; takes"),
        (["--runs="], "--runs: none given; takes layout:"),
        (["--plant=none"], "--plant: got none; takes all, or expert_gradients_not_summed, "),
        (["--plant=all", "--runs=ma:1x2"], "--plant: got beside --runs; takes one of the two"),
        (["--folder={tmp}/none/certificate"], "--folder: got "),
        (["--config.layout=tp"], "layout: is set by each run of --runs; takes no flag here"),
        (["--config.model.d_modle=3"], "model.d_modle: no such field"),
        (["--seed=3"], "Unknown command line flag 'seed'"),
        (["tiny"], "unexpected argument 'tiny'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(certificate, "start", lambda *_: pytest.fail("it began"))
    status = certify.run(["certify", *(argument.format(tmp=tmp_path) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (status, out) == (cli.USER_ERROR, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1, err


@pytest.mark.slow
def test_two_layouts_are_certified_and_a_fault_is_not(tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "maxsep.certify", "--config.model.experts=4", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=kill.environment())

    done = call("--runs=ma_folded:2x2,zero:2x2")
    assert done.returncode == cli.DONE, done.stderr
    found = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert found["passed"] and {check["run"] for check in found["checks"]} == {"ma_folded:2x2", "zero:2x2"}
    assert all(check["difference"] < 1e-9 for check in found["checks"])
    seen = call("--plant=norm_counts_copies")
    assert seen.returncode == cli.DONE and "seen on ma:2x2 in grad norm" in seen.stderr
