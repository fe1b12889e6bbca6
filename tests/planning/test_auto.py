"""`layout=auto`: which row a run takes, that it keeps it, and every mistake in one line."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import kill
import processes
import pytest
from runs import SMALL

import train
from maxsep.config import Config, MeshConfig, cli, runs
from maxsep.output import workdir
from maxsep.planning import auto, planned, session
from maxsep.planning.rows import Row

ASKED = replace(Config(), layout="auto", cluster="cpu:1x4")
ROW = Row(
    "tp:2x2",
    "tp",
    {"stage": 1, "attention": 2, "expert": 2},
    flags=["--config.layout=tp"],
    memory_bytes={"total": 7},
    ranges={"step_seconds": [1.0, 2.0]},
)


@pytest.fixture
def children(monkeypatch):
    """In place of plans: what has been planned for, and the row that the next one finds best."""
    asked, rows = [], [ROW]

    def made(config, named, cluster, configs, *_):
        asked.append(named)
        best = rows[-1]
        return SimpleNamespace(rows=[ROW, ROW], best=best, reason="it is." if best else "Nothing fits.")

    def run(command, log, environment, stop):
        assert environment["JAX_PLATFORMS"] == "cpu"
        auto.main(*command[2:])
        return cli.DONE

    monkeypatch.setattr(planned, "plan", made)
    monkeypatch.setattr(auto.child, "run", run)
    return asked, rows


def test_a_new_run_takes_the_best_row_and_a_resume_plans_nothing(tmp_path, children):
    asked, _ = children
    config, kept = auto.settled(ASKED, tmp_path)
    assert (config.layout, config.mesh, config.cluster) == ("tp", MeshConfig(1, 2, 2), "cpu:1x4")
    assert (kept["row"], kept["layouts"], kept["reason"], kept["cluster"]) == ("tp:2x2", 1, "it is.", "cpu:1x4")
    workdir.write_config(tmp_path, workdir.resolve(config), "corpus", "tokenizer", plan=kept)

    for resumed in (ASKED, replace(ASKED, cluster=None), config):
        again = auto.settled(resumed, tmp_path)
        assert again == (replace(config, cluster=resumed.cluster or config.cluster), kept)
    moved = replace(config, layout="ma")
    assert auto.settled(moved, tmp_path) == (moved, None), "its layout was not planned"
    assert asked == ["cpu:1x4"]
    auto.settled(replace(ASKED, cluster="cpu:1x8"), tmp_path)
    assert asked == ["cpu:1x4", "cpu:1x8"], "on another cluster another row may be the best"


def test_the_order_of_the_devices_is_the_rows_where_auto_would_choose_another(tmp_path, children):
    _, rows = children
    rows.append(replace(ROW, inner="expert", flags=["--config.layout=tp", "--config.mesh.inner=expert"]))
    assert auto.settled(ASKED, tmp_path)[0].mesh.inner == "expert"


def test_where_nothing_fits_the_error_has_the_reason(tmp_path, children):
    children[1].append(None)
    with pytest.raises(cli.Exit) as refused:
        auto.settled(ASKED, tmp_path)
    assert cli.outcome(refused.value) == (cli.USER_ERROR, "layout: got auto for cpu:1x4; Nothing fits.")


def test_a_killed_plan_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(auto.child, "run", lambda *_: -9)
    with pytest.raises(cli.Exit) as failed:
        auto.settled(ASKED, tmp_path)
    assert cli.outcome(failed.value) == (cli.CRASHED, "planning for cpu:1x4 failed (status 137); see above")


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Puts a driver on the path that tells of these GPUs."""

    def told(*names):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    return told


def test_without_a_cluster_it_is_this_machines_gpus(tmp_path, children, gpus, monkeypatch):
    gpus(*["NVIDIA A100-SXM4-80GB"] * 4)
    auto.settled(replace(ASKED, cluster=None), tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    auto.settled(replace(ASKED, cluster=None), tmp_path)
    assert children[0] == ["a100-80gb:1x4", "a100-80gb:1x2"]


@pytest.mark.parametrize(
    "names, says",
    [
        (["GeForce"], "cluster: none given, and no file of configs/clusters is of 'GeForce'; takes a file like"),
        (["GeForce", "Titan"], "cluster: got GeForce and Titan, 2 on "),
    ],
)
def test_gpus_that_are_not_known(tmp_path, children, gpus, names, says):
    gpus(*names)
    with pytest.raises(auto.ConfigError, match="^" + says):
        auto.settled(replace(ASKED, cluster=None), tmp_path)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            [],
            "cluster: none given beside layout=auto, and this machine has no NVIDIA GPU that nvidia-smi tells of;",
        ),
        (["--config.cluster=a100:4x4"], "cluster: got 'a100'; takes a100-80gb, b200, cpu, h100, h200, tpu-v5e, "),
        (["--config.cluster=cpu"], "cluster: got 'cpu'; takes NAME:NODESxDEVICES"),
        (["--config.cluster=cpu:2x2"], "cluster: got cpu:2x2; takes 1x4, as CPU devices are simulated in one node"),
        (["--config.cluster=cpu:1x7"], "cluster: got 7 devices; takes a number of devices over which some layout"),
        (["--config.cluster=none.py:1x4"], "cluster: got 'none.py'; takes a100-80gb"),
        (["--config.cluster=h100:1x4"], "cluster: to compile for GPUs takes the extra cuda"),
        (
            ["--config.cluster=cpu:1x4", "--config.mesh.expert=4"],
            "mesh.expert: is chosen by layout=auto; takes no flag beside it",
        ),
        (
            ["--config.layout=ma", "--config.cluster=cpu:1x4"],
            "cluster: got cpu:1x4 beside layout=ma; takes layout=auto",
        ),
        (["--config.cluster=cpu:1x4", "--config.mesh.inner=node"], "mesh.inner: got 'node'; takes one of auto"),
        (["--cluster=cpu:1x4"], "Unknown command line flag 'cluster'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(session.child, "run", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr(auto.child, "run", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr("maxsep.planning.target._version", {}.get)
    argv = ["train.py", f"--workdir={tmp_path / 'run'}", "--config.layout=auto", *arguments]
    status = cli.run(train.main, train.define, train.__doc__, default_config="configs/tiny.py", argv=argv)
    out, err = capsys.readouterr()
    assert (status, out) == (cli.USER_ERROR, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_on_the_row_that_the_first_has_planned(tmp_path, data):
    flags = kill.flags(data, **SMALL | {"train__steps": 2})
    flags = [flag for flag in flags if not flag.startswith("--config.mesh.")]
    flags += ["--config.layout=auto", "--config.cluster=cpu:1x2"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = processes.train(tmp_path / "run", 2, *flags, environment=cache)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    config, plan = record["config"], record["plan"]
    assert plan["row"] == runs.name(config["layout"], MeshConfig(**config["mesh"])) and plan["seconds"] > 0
    assert printed.count("planned in") == 1 and plan["reason"] in printed
    assert "2 x simulated CPU device in 2 processes" in printed
    again = processes.train(tmp_path / "run", 2, *flags, "--config.train.steps=3", environment=cache)
    assert "resuming from step 2" in again and "planning" not in again
