"""Certificates: what is scaled down, what is kept, how differences are reported, and that a fault is seen."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import jax.numpy as jnp
import kill
import numpy as np
import pytest
from small import config

from maxsep import certify
from maxsep.certification import choices, parts, patterns, precision
from maxsep.certification.certificate import Certificate
from maxsep.certification.check import Check, worst_of
from maxsep.certification.differences import compared
from maxsep.certification.parts import Found
from maxsep.certification.plants import PLANTS, planted
from maxsep.certification.rig import alone
from maxsep.certification.scaled import changed, in_own_type, scaled, with_choices
from maxsep.config import cli, files
from maxsep.config.layouts import AXES
from maxsep.config.validate import validate
from maxsep.parallel import collectives
from maxsep.parallel.mesh import make_mesh
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
    for run in (alone(small), *(replace(small, layout=run.layout, mesh=run.mesh) for run in runs)):
        validate(run)
    assert [getattr(small.model, name) for name in KEPT] == [getattr(made.model, name) for name in KEPT]
    assert (small.model.capacity_factor is None) == (made.model.capacity_factor is None)
    assert bool(small.model.dense_layers) == bool(made.model.dense_layers)
    assert small.model.dtype == "float64" and small.model.d_model <= made.model.d_model
    assert {"model.dtype", "train.steps"} <= changed(made, small).keys()
    assert "layout" not in changed(made, small)


def test_what_the_run_computes_in_is_kept_in_its_own_type():
    made = config(model={"dtype": "bfloat16", "attention_kernel": "cudnn", "router_bias_rate": 0.01, "top_k": 2})
    small = scaled(made, [made])
    own = in_own_type(made, small)
    validate(own)
    assert (own.model.dtype, own.model.attention_kernel) == ("bfloat16", "auto")
    assert own.model.top_k == made.model.experts  # no choice that rounding could turn over
    assert with_choices(own.model, small.model).top_k == 2


def test_the_worst_leaf_is_named():
    reference = {"gradients": {"a": np.array([1.0, -2.0]), "b": np.array([4.0])}, "loss": 2.0}
    got = {"gradients": {"a": np.array([1.0, -2.0]), "b": np.array([4.1])}, "loss": 2.0}

    def checks():
        return {check.quantity: check for check in compared("layouts", "ma:1x2", got, reference, 1e-9)}

    assert [check.passed for check in checks().values()] == [False, True]
    assert checks()["gradients"].worst == "['b']" and checks()["gradients"].difference == pytest.approx(0.025)
    for broken in (got, reference):
        good = broken["gradients"]["a"]
        broken["gradients"]["a"] = np.array([np.nan, -2.0])
        found = checks()["gradients"]
        assert (found.worst, found.difference, found.passed) == ("['a']", float("inf"), False)
        broken["gradients"]["a"] = good


def test_the_worst_check_is_the_furthest_beyond_its_own_tolerance():
    near, far = Check("dtype", "ma:1x2", "loss", 0.5, "a", 1.0), Check("layouts", "ma:1x2", "loss", 1e-8, "b", 1e-9)
    exact = Check("repeats", "ma:1x2", "state", 5e-324, "c", 0.0)
    assert worst_of([near, far]) == far and worst_of([far, exact]) == exact and not exact.passed


def test_a_change_of_one_bit_is_a_difference():
    one, other = np.array([0.0, 1.0]), np.array([-0.0, 1.0])
    assert [differs > 0 for differs, _ in precision.bits({"a": one}, {"a": other}, "state")] == [True]
    assert list(precision.bits({"a": one}, {"a": one.copy()}, "state")) == [(0.0, "['a']")]


def test_another_order_has_the_same_micro_batches():
    batch = np.arange(3 * 4 * 2).reshape(3, 4, 2)

    def rows(of):
        return {frozenset(map(tuple, micro_batch)) for micro_batch in of}

    other = precision.permuted(batch, np.random.default_rng(0))
    assert rows(other) == rows(batch) and (other != batch).any()


def test_flipped_choices_are_counted_with_the_gap_of_their_scores():
    score_te = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.2, 0.7]])
    wide = choices.Chosen(np.array([[0, 1], [0, 1], [2, 1]]), score_te)
    same = choices.Chosen(np.array([[1, 0], [0, 1], [1, 2]]), score_te)
    other = choices.Chosen(np.array([[0, 2], [0, 1], [2, 0]]), score_te)
    real_t = np.array([True, True, False])  # of padding no choice counts
    assert choices.flipped([wide], [same], real_t) == ([0], 0.0)
    counts, gap = choices.flipped([wide, wide], [other, same], real_t)
    assert counts == [1, 0] and gap == pytest.approx(0.3 - 0.2)


def made(*checks: Check) -> Certificate:
    tiny = files.load_config("configs/tiny.py")
    found = Found(list(checks), ["a note"], ["a kernel"], {"layouts": "2 x device", "kernels": "1 x device"})
    return Certificate(tiny, scaled(tiny, [tiny]), found)


def test_a_certificate_says_first_whether_it_passed(tmp_path):
    good = Check("layouts", "ma:1x2", "loss", 1e-12, "loss", 1e-9)
    bad = Check("layouts", "pp:2x1x1", "gradients", float("inf"), "['a']", 1e-9)
    kernel = Check("kernels", "", "attention", 1e-7, "dq", 1e-5)
    assert made(good).text()[0] == "tiny: passed"
    failed = made(good, bad, kernel)
    assert failed.text()[0] == "tiny: NOT passed: layouts pp:2x1x1: gradients differs by inf at ['a']"
    failed.write(tmp_path)
    page = (tmp_path / "certificate.md").read_text()
    assert page.startswith("# tiny: NOT passed: layouts pp") and "inf FAILED" in page
    assert "moves: not asked for" in page and "a note" in page
    facts = json.loads((tmp_path / "certificate.json").read_text())
    assert facts["passed"] is False and [check["passed"] for check in facts["checks"]] == [True, False, True]
    assert facts["checks"][1]["mesh"] == {"stage": 2, "attention": 1, "expert": 1}
    assert facts["hash"] != made(good).to_json()["hash"] and facts["not_certified"] == ["a kernel"]
    assert Certificate.read(tmp_path) == failed.found  # as the parent of two halves reads it


@pytest.mark.parametrize("fault", [None, *(p for p in PLANTS if p.part == "collectives")], ids=["right", "wrong"])
def test_collectives_bring_what_they_must_or_two_devices_are_named(fault, monkeypatch):
    monkeypatch.setattr(patterns, "SIZES", (1,))
    with nullcontext() if fault is None else planted(fault):
        wrong = {
            check.quantity: check.worst
            for check in patterns.checks(make_mesh(config((2, 2))), "ma:2x2")
            if not check.passed
        }
    if fault is None:
        assert wrong == {}
        return
    assert set(wrong) == {"exchange, attention", "exchange, expert", "exchange, attention and expert"}
    assert (
        wrong["exchange, expert"]
        == "device 0x0x0 has a number of device 0x0x1, where one of device 0x0x0 belongs, of 2"
    )


def test_a_missing_part_of_a_sum_names_whose_it_was(monkeypatch):
    monkeypatch.setattr(patterns, "SIZES", (2,))
    total = collectives.total

    def wrong(x, axes):
        lost = collectives.index(AXES) == 2
        return total(jnp.where(lost, 0, x), axes)

    monkeypatch.setattr(collectives, "total", wrong)
    found = {check.quantity: check.worst for check in patterns.checks(make_mesh(config((1, 4))), "ma:1x4")}
    assert found["total, expert"] == "device 0x0x0 lacks a number of device 0x0x2, of 4"
    assert found["reduce_scatter, expert"] == ""


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
        (
            ["--runs=ma:2x2,ma:1x2", "--num_processes=2", "--process_id=0", "--coordinator=localhost:1"],
            "--runs: got ma:2x2,ma:1x2; takes runs of as many devices each, as 2 processes",
        ),
        (["--parts=layout"], "--parts: got layout; takes some of layouts,moves,dtype,kernels,collectives,repeats"),
        (["--parts="], "--parts: got ; takes some of layouts,"),
        (["--config.layout=tp"], "layout: is set by each run of --runs; takes no flag here"),
        (["--config.model.d_modle=3"], "model.d_modle: no such field"),
        (["--seed=3"], "Unknown command line flag 'seed'"),
        (["tiny"], "unexpected argument 'tiny'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(parts, "simulate", lambda: None)
    monkeypatch.setattr(parts, "begin", lambda *_: pytest.fail("it began"))
    status = certify.run(["certify", *(argument.format(tmp=tmp_path) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (status, out) == (cli.USER_ERROR, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1, err


@pytest.mark.slow
def test_the_two_processes_of_a_command_make_one_certificate(tmp_path):
    command = [sys.executable, "-m", "maxsep.certify", "--config.model.experts=4", "--config.model.heads=4"]
    command += ["--runs=zero:1x2", "--parts=moves,collectives"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=kill.environment())
    assert done.returncode == cli.DONE, done.stderr
    found = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert found["passed"] and {check["part"] for check in found["checks"]} == {"moves", "collectives"}
    assert {path.name for path in (tmp_path / "certificate").iterdir()} == {"certificate.md", "certificate.json"}
