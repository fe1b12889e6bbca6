"""The command: what it is told wrongly, what it finds or leaves on the disk, and its files."""

import json
import os
import re
import signal
import time

import ml_dtypes
import pytest
from conversion import GOLDEN, converted, exported, imported, tensors
from users import small_disk

from maxsep.config import cli
from maxsep.huggingface import transfer

COMMANDS = {
    "no command": ([], "command: none given; takes import or export"),
    "another": (["inport"], "command: got 'inport'; takes import or export"),
    "a mistyped flag": (
        ["import", "--chekpoint=x"],
        r"Unknown command line flag 'chekpoint'\. Did you mean: checkpoint",
    ),
    "no checkpoint": (["import", "--workdir=x"], "--checkpoint: none given; takes the folder of a model"),
    "no such checkpoint": (
        ["import", "--checkpoint=/nowhere", "--workdir=x"],
        r"--checkpoint: got '/nowhere', which is no",
    ),
    "no workdir": (["export", "--checkpoint=x"], "--workdir: none given; takes the folder of a run"),
    "no such run": (
        ["export", "--checkpoint=x", "--workdir=/nowhere"],
        "--workdir: got /nowhere, which does not exist",
    ),
    "a field of the model": (
        ["export", "--checkpoint=x", "--workdir=/nowhere", "--config.model.top_k=1"],
        r"model\.top_k: is the run's own and cannot be changed here",
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_mistyped_command(capsys, what):
    arguments, says = COMMANDS[what]
    assert converted(*arguments) == cli.USER_ERROR
    assert re.match(f"error: {says}", capsys.readouterr().err)


def test_nothing_is_written_over_and_what_a_kill_left_is_swept_away(tmp_path, capsys):
    partial = tmp_path / "run.partial"
    (partial / "checkpoints").mkdir(parents=True)
    (partial / "left").write_text("")
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    assert not partial.exists() and not (run / "left").exists()
    assert {path.name for path in run.iterdir()} == {"config.json", "checkpoints"}
    out = exported(run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    capsys.readouterr()
    for command in ("import", "export"):
        where = (f"--checkpoint={out}", f"--workdir={run}")
        assert converted(command, *where) == cli.USER_ERROR
        assert re.fullmatch(r"error: --\w+: got .*, which is there already; takes a new .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("step", ["7", "best", "newest"])
def test_an_export_of_a_step_that_is_not_there(tmp_path, capsys, step):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    out = tmp_path / "out"
    assert converted("export", f"--workdir={run}", f"--checkpoint={out}", f"--step={step}") == cli.USER_ERROR
    assert capsys.readouterr().err.startswith("error: --step: got ")
    assert list(tmp_path.iterdir()) == [run]


def test_a_full_disk_ends_an_export_and_an_import_in_one_line(tmp_path, capsys):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    with small_disk(tmp_path / "disk", "16k"):
        for command, flag in (("export", "checkpoint"), ("import", "workdir")):
            where = {"workdir": run, "checkpoint": GOLDEN / "olmoe_odd"} | {flag: tmp_path / "disk" / "new"}
            assert converted(command, *(f"--{name}={path}" for name, path in where.items())) == cli.USER_ERROR
            err = capsys.readouterr().err
            assert re.fullmatch(rf"error: --{flag}: .*\n", err), err
            assert not any((tmp_path / "disk").iterdir())


@pytest.mark.parametrize(("command", "what"), [("import", "load"), ("export", "store")])
def test_a_signal_leaves_nothing(tmp_path, capsys, monkeypatch, command, what):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(transfer, what, lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    where = {"workdir": run, "checkpoint": GOLDEN / "olmoe_odd"}
    where |= {"checkpoint" if command == "export" else "workdir": tmp_path / "new"}
    before = signal.getsignal(signal.SIGTERM)
    assert converted(command, *(f"--{name}={path}" for name, path in where.items())) == cli.STOPPED
    assert capsys.readouterr().err == "error: interrupted; nothing is left of it\n"
    assert list(tmp_path.iterdir()) == [run]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_model_is_not_taken_for_a_run(capsys, complete):
    status, _, err = complete(f"--workdir={GOLDEN / 'olmoe_odd'}", "--prompt=1")
    assert status == cli.USER_ERROR
    assert re.fullmatch(
        r"error: .*config\.json: is a Hugging Face model's; takes a run's, as python -m .* makes one.*\n", err
    )


def test_several_files_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "FILE_BYTES", 9_000)
    run = imported(GOLDEN / "mixtral_even", tmp_path / "run")
    out = exported(run, tmp_path / "out")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert all((out / name).stat().st_size < 9_000 + 5_000 for name in files), "tensors, and a header"
    content = json.loads((out / "model.safetensors.index.json").read_text())
    found = tensors(out)
    assert content["weight_map"].keys() == found.keys()
    assert content["metadata"]["total_size"] == sum(w.nbytes for w in found.values())
    assert all(w.dtype == ml_dtypes.bfloat16 for w in found.values())
    again = imported(out, tmp_path / "again")
    assert exported(again, tmp_path / "out2") and tensors(tmp_path / "out2").keys() == found.keys()
