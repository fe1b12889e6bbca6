"""The command: from flags to a table and JSON; what is kept; and every mistake in one line."""

import contextlib
import errno
import io
import json
import os

import pytest

from maxsep import plan
from maxsep.config import MeshConfig, cli, runs
from maxsep.measure import plots
from maxsep.planning import compilation, kept, session, target

CHANGED = {"d_model": 32, "d_ff": 16, "layers": 1}
TINY = ("--config=configs/tiny.py", *(f"--config.model.{name}={size}" for name, size in CHANGED.items()))
RUNS = ("--cluster=cpu:1x2", "--runs=ma:1x2,tp:2x1")


@pytest.fixture
def planned(tmp_path, capsys):
    """Calls the command in this process: its exit status, what it printed, and its errors."""

    def call(*arguments, own=TINY):
        argv = ["plan", *own, f"--cache={tmp_path / 'cache'}", *arguments]
        return plan.run(argv), *capsys.readouterr()

    return call


def parsed(*arguments):
    return cli.parse(["plan", *TINY, *arguments], lambda _: None, "").config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A plan from its flags on: its status, what it printed, its errors, its JSON, and its cache."""
    folder = tmp_path_factory.mktemp("whole")
    out, told, progress = folder / "plan.json", *(io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    argv = ["plan", *TINY, "--cluster=cpu:1x2", "--runs=ma:1x2", f"--json={out}", f"--cache={folder / 'cache'}"]
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(progress):
        status = plan.run(argv)
        told.seek(0), progress.seek(0)
    return status, told.read(), progress.read(), json.loads(out.read_text()), folder / "cache"


def ends(status, said=""):
    """A compilation that ends so."""

    def child(log, stop):
        log.write_text(said)
        return status

    return child


@pytest.fixture
def children(monkeypatch, whole):
    """In place of compilations: which have been started; and what one is to do or to find, by layout."""
    (facts,) = (path.read_text() for path in whole[-1].iterdir())
    started, does = [], {}

    def run(command, log, environment, stop, shown):
        with open(command[2], encoding="utf-8") as f:
            layout = json.load(f)["config"]["layout"]
        started.append(layout)
        if callable(does.get(layout)):
            return does[layout](log, stop)
        with open(command[3], "w", encoding="utf-8") as f:
            f.write(json.dumps(does[layout]) if layout in does else facts)
        return cli.DONE

    monkeypatch.setattr(session.child, "run", run)
    return started, does


def test_a_plan_from_flags_to_table_and_json(whole):
    status, told, progress, found, _ = whole
    assert status == cli.DONE, progress
    assert "compiling 1 of 1 layouts" in progress and "ma:1x2" in progress
    (row,) = found["layouts"]
    assert found["best"] == row["name"] == "ma:1x2"
    assert (row["layout"], row["mesh"]) == ("ma", {"stage": 1, "attention": 1, "expert": 2})
    assert row["fits"] and row["memory_fits_default_pool"] and row["error"] is None
    parts = sum(size for kind, size in row["memory_bytes"].items() if kind != "total")
    assert parts == row["memory_bytes"]["total"]
    seconds = row["products_seconds"] + row["memory_seconds"] + row["exposed_seconds"]
    assert row["step_seconds"] == pytest.approx(seconds)
    assert row["ranges"]["step_seconds"] == [row["step_seconds"], pytest.approx(row["step_seconds"] / 0.65)]
    tokens = row["tokens_per_second_per_device"] * row["step_seconds"] * 2
    assert tokens == pytest.approx(16 * 128), "of a step"
    assert row["communication_bytes"]["dispatch"] > 0
    assert row["energy_joules_per_token"] is None
    assert {name for names in found["source"].values() for name in names} <= set(row)
    lines = told.splitlines()
    assert lines[2].split()[:4] == ["layout:mesh", "inner", "GB", "fits"]
    assert lines[3].split()[0] == "ma:1x2"
    flags = runs.flags("ma", MeshConfig(1, 1, 2))
    assert lines[-1] == f"train it: {' '.join(['python', 'train.py', *TINY, *flags])}"


def test_a_second_plan_compiles_nothing(whole, capsys, monkeypatch):
    monkeypatch.setattr(session.child, "run", lambda *_, **__: pytest.fail("compiled again"))
    argv = ["plan", *TINY, "--cluster=cpu:1x2", "--runs=ma:1x2", f"--cache={whole[-1]}"]
    assert plan.run(argv) == cli.DONE
    assert "compiling" not in capsys.readouterr().err


def test_a_picture_has_what_the_table_has(whole, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    bars, stacked = [], plots.stacked

    def seen(axes, names, values, labels):
        bars.append((names, values))
        stacked(axes, names, values, labels)

    monkeypatch.setattr(plots, "stacked", seen)
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    argv = ["plan", *TINY, "--cluster=cpu:1x2", "--runs=ma:1x2", f"--cache={whole[-1]}"]
    assert plan.run([*argv, f"--json={out}", f"--picture={png}"]) == cli.DONE
    assert png.read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads(out.read_text())["layouts"]
    (names, (seconds,)), (_, (memory,)) = bars
    assert names == ["ma:1x2"]
    assert sum(seconds.values()) == pytest.approx(row["step_seconds"])
    assert sum(memory.values()) == pytest.approx(row["memory_bytes"]["total"] / 1e9)


def test_a_layout_that_does_not_compile_or_whose_child_was_killed_is_a_row(planned, tmp_path, children):
    started, does = children
    does["tp"] = {"error": "JaxRuntimeError: UNIMPLEMENTED: of this kind"}
    does["zero"], does["ma_folded"] = ends(-9), ends(1, "error: OSError: no room\n")
    out = tmp_path / "plan.json"
    runs = "--runs=tp:2x1,ma:1x2,zero:1x2,ma_folded:2x1"
    status, told, _ = planned("--cluster=cpu:1x2", runs, f"--json={out}", "--jobs=1")
    assert status == cli.DONE
    of = {row["layout"]: row for row in json.loads(out.read_text())["layouts"]}
    assert of["tp"]["error"] == "JaxRuntimeError: UNIMPLEMENTED: of this kind"
    assert of["zero"]["error"] == "killed by SIGKILL (out of memory?); the last that it said: nothing"
    assert of["ma_folded"]["error"] == "OSError: no room (status 1)"
    assert of["ma"]["error"] is None and of["ma"]["fits"]
    assert of["tp"].keys() == of["ma"].keys()
    assert "did not compile:\n  tp:2x1: JaxRuntimeError" in told
    planned("--cluster=cpu:1x2", runs, "--jobs=1")
    first = ["tp", "ma", "zero", "ma_folded"]
    assert started == [*first, "zero", "ma_folded"], "what XLA refuses it will refuse again; a machine may do better"


def test_stopped_it_resumes(planned, children):
    started, does = children

    def stopped(log, stop):
        os.kill(os.getpid(), 15)
        log.write_text("")
        return -15

    does["tp"] = stopped
    status, _, told = planned(*RUNS, "--jobs=1")
    assert (status, told.splitlines()[-1]) == (cli.STOPPED, "error: SIGTERM: stopped; the same command resumes")
    del does["tp"]
    assert planned(*RUNS, "--jobs=1")[0] == cli.DONE
    assert started == ["ma", "tp", "tp"]


def test_where_nothing_compiles_the_status_says_so(planned, children):
    _, does = children
    does["ma"] = ends(1, "error: no room\n")
    status, _, err = planned("--cluster=cpu:1x2", "--runs=ma:1x2")
    assert status == cli.CRASHED
    assert err.splitlines()[-1] == "error: no layout compiled; the first: no room (status 1)"


def test_the_kept_depend_on_all_that_makes_the_program(monkeypatch):
    def key(*arguments, cluster="cpu:1x2", versions=None):
        return kept.key(compilation.job(parsed(*arguments), None, plan.load_cluster(cluster), None), versions or {})

    base = key()
    others = ["--config.model.d_ff=32", "--config.layout=tp", "--config.mesh.expert=2", "--config.optimizer.zero1=True"]
    others += ["--config.data.sequence_length=64", "--config.train.accumulation=2"]
    clusters = ("cpu:1x4", "h100:1x2", "h200:1x2")
    keys = [key(other) for other in others] + [key(cluster=cluster) for cluster in clusters]
    keys.append(key(versions={"nvidia-cudnn-cu12": "9.0.0"}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    keys.append(key())
    assert len({base, *keys}) == 1 + len(keys)
    monkeypatch.undo()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert key("--config.name=other", "--config.data.cache=elsewhere") == base


MINE = "from configs.clusters import h100\n\ndef get_cluster():\n    {}\n"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "--cluster: none given; takes what to plan for, as a100-80gb:4x4"),
        (["--cluster=a100:4x4"], "--cluster: got 'a100'; takes a100-80gb, b200, cpu, h100, h200, tpu-v5e, "),
        (["--cluster=cpu"], "--cluster: got 'cpu'; takes NAME:NODESxDEVICES"),
        (["--cluster=cpu:0x4"], "--cluster: got 'cpu:0x4'; takes NAME:NODESxDEVICES"),
        (["--cluster={tmp}/mine.py:1x8"], "mine.py:4: ZeroDivisionError: division by zero"),
        (["--cluster=cpu:1x16", "--runs=ma:4x8"], "--runs: got ma:4x8 = 32 devices; takes all 16 of --cluster"),
        (["--cluster=cpu:1x7"], "--cluster: got 7 devices; takes a number of devices over which some layout can split"),
        (
            ["--cluster=cpu:1x16", "--config.model.heads=7"],
            "model.d_model: got 32; takes a multiple of model.heads",
        ),
        (["--cluster=cpu:1x16", "--config.layout=tp"], "layout: is set by each run of --runs; takes no flag here"),
        (["--cluster=cpu:1x16", "--runs="], "--runs: none given; takes layout:"),
        (["--cluster=cpu:1x16", "--json={tmp}/none/plan.json"], "--json: got "),
        (["--cluster=cpu:1x16", "--cache={tmp}/mine.py"], "--cache: cannot write in "),
        (["--cluster=cpu:1x16", "--picture={tmp}/plan.pdf"], "takes a file that ends in .png"),
        (["--cluster=cpu:1x16", "--jobs=0"], "flag --jobs=0: 0 is not a positive integer"),
        (["--cluster=cpu:1x16", "--cach=x"], "Unknown command line flag 'cach'"),
        (["--cluster=cpu:1x16", "all"], "unexpected argument 'all'"),
    ],
)
def test_a_mistake_is_one_line(planned, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setattr(session.child, "run", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "mine.py").write_text(MINE.format("1 / 0"))
    status, out, err = planned(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (status, out) == (cli.USER_ERROR, "")
    assert says in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "versions, says",
    [
        ({}, "to compile for GPUs takes the extra cuda, which is not installed: pip install"),
        ({"jax-cuda12-pjrt": "0.1"}, "got jax-cuda12-pjrt 0.1 beside jaxlib 9.9; takes the same version: pip install"),
        ({"jax-cuda13-pjrt": "9.9"}, "jax-cuda13-pjrt is here without nvidia-cudnn-cu13; takes the extra cuda: pip"),
    ],
)
def test_gpus_take_the_extra(planned, monkeypatch, versions, says):
    monkeypatch.setattr(target, "_version", (versions | {"jaxlib": "9.9"}).get)
    status, _, err = planned("--cluster=h100:1x2", "--runs=ma:1x2")
    assert (status, err.count("\n")) == (cli.USER_ERROR, 1)
    assert err.startswith(f"error: --cluster: {says}")


def test_a_full_disk_ends_it_in_one_line(planned, tmp_path, children, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept, "write_json", full)
    status, _, err = planned("--cluster=cpu:1x2", "--runs=ma:1x2")
    assert status == cli.USER_ERROR
    assert err.splitlines()[-1].startswith("error: --cache: cannot write in ") and "No space left" in err
