"""train.py from command line to exit status: what a run writes, prints, refuses, and goes on with."""

import json
import re
import shutil
import string
from pathlib import Path

import kill
import numpy as np
import pytest
from runs import SMALL, checkpoints, snapshot, steps
from tokenizers import Tokenizer, models

import train
from maxsep.config import cli
from maxsep.data import preparation
from maxsep.training.run import Run

STEPS = "--config.train.steps="


def test_what_a_run_writes_and_prints(call, workdir):
    status, out, err = call(workdir)
    assert (status, err) == (cli.DONE, "")
    written = {path.name for path in workdir.iterdir()}
    assert written == {"config.json", "checkpoints", "metrics.jsonl", "summary.json", "tensorboard", "lock"}
    summary = json.loads((workdir / "summary.json").read_text())
    rows = kill.figures(workdir)
    assert summary["steps"] == 4 and summary["mesh"] == {"stage": 1, "attention": 1, "expert": 1}
    assert summary["train_loss"] == rows[4, "train"]["loss"] < rows[1, "train"]["loss"]
    assert summary["eval_loss"] == rows[4, "eval"]["loss"]
    assert summary["eval_perplexity"] == pytest.approx(np.exp(summary["eval_loss"]))
    assert f"parameters        {summary['parameters']:,}\n" in out
    assert "layout            ma: stage 1 x attention 1 x expert 1\n" in out
    assert f"held-out loss  {summary['eval_loss']:.4f} nats/token" in out
    assert f"unigram        {summary['unigram_entropy']:.4f} nats/token on the same tokens" in out
    assert f"complete a text: python infer.py --workdir={workdir} '--prompt=Return the'\n" in out
    assert f"train on, at the last learning rate: python train.py --workdir={workdir} {STEPS}8\n" in out


@pytest.mark.parametrize(
    ("changed", "trained", "evaluated", "saved"),
    [
        ({"train__log_every": 0}, [5], [5], [5]),
        (
            {"train__log_every": 2, "train__eval_every": 2, "train__checkpoint_every": 3},
            [2, 4, 5],
            [2, 4, 5],
            [3, 5],
        ),
    ],
)
def test_intervals(call, workdir, changed, trained, evaluated, saved):
    assert call(workdir, train__steps=5, **changed)[0] == cli.DONE
    assert (steps(workdir, "train"), steps(workdir, "eval")) == (trained, evaluated)
    assert checkpoints(workdir) == saved


def test_a_finished_run_says_so(call, finished):
    before = kill.figures(finished), kill.state(finished), checkpoints(finished)
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").write_text(json.dumps(summary | {"steps": 2}))  # killed when it had run on to 4
    status, out, err = call(finished)
    assert (status, err) == (cli.DONE, "")
    assert "this run has finished its 4 steps; it resumes with more --config.train.steps\n" in out
    assert "compiling" not in out
    assert (kill.figures(finished), kill.state(finished), checkpoints(finished)) == before
    assert json.loads((finished / "summary.json").read_text()) == summary | {"seconds": None}
    assert call(finished, train__steps=3)[0] == cli.DONE
    assert kill.figures(finished) == before[0]


def test_with_more_steps_it_goes_on_with_its_schedule(call, finished, workdir):
    """As if it had never stopped, with other intervals too."""
    status, out, _ = call(finished, train__steps=6, train__eval_every=1)
    assert status == cli.DONE and f"resuming from step 4 in {finished}\n" in out
    assert (steps(finished, "train"), steps(finished, "eval")) == ([1, 2, 3, 4, 5, 6], [4, 5, 6])
    rates = [row["learning_rate"] for (_, split), row in kill.figures(finished).items() if split == "train"]
    assert rates[4:] == pytest.approx([1e-3, 1e-3])  # a tenth of the peak, since step 4
    config = json.loads((finished / "config.json").read_text())["config"]
    assert config["optimizer"]["decay_steps"] == 4 and config["train"]["steps"] == 6
    assert call(workdir, train__steps=6, optimizer__decay_steps=4)[0] == cli.DONE
    gone_on, whole = ([kill.figures(run)[step, "train"]["loss"] for step in range(1, 7)] for run in (finished, workdir))
    assert gone_on == pytest.approx(whole, rel=1e-12) and whole[-1] < whole[0] - 0.1


@pytest.mark.parametrize(
    "changed",
    [
        {"train__seed": 1},
        {"train__batch_size": 16},
        {"train__accumulation": 2},
        {"optimizer__learning_rate": 0.5},
        {"optimizer__decay_steps": 9},
        {"data__sequence_length": 16},
        {"data__max_tokens": 2000},
        {"model__d_ff": 32},
        {"model__capacity_factor": 1.0},
        {"train__init_from": "runs/other"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_a_run_means_may_not_change(call, finished, changed):
    before = snapshot(finished)
    status, _, err = call(finished, train__steps=6, **changed)
    field = next(iter(changed)).replace("__", ".")
    assert status == cli.USER_ERROR and re.fullmatch(rf"error: {field}: got .* which may not change\n", err)
    assert snapshot(finished) == before


def test_another_corpus_is_refused(call, finished, tmp_path):
    before = snapshot(finished)
    same, other = tmp_path / "same", tmp_path / "other"
    same.mkdir(), other.mkdir()
    kill.text(other, paragraphs=61)
    status, _, err = call(finished, data__path=other / "text.txt")
    assert status == cli.USER_ERROR and re.fullmatch(r"error: data.source: got another corpus than .*\n", err)
    assert snapshot(finished) == before
    assert call(finished, data__path=kill.text(same))[0] == cli.DONE


def test_a_tokenizer_may_move_but_not_change(call, workdir, tmp_path):
    first, moved, other = (tmp_path / name / "tokenizer.json" for name in ("first", "moved", "other"))
    characters = [*string.printable, *map(chr, range(256, 412)), "</s>"]  # as many ids as `bytes` has: one program
    for path, ordered in ((first, characters), (moved, characters), (other, characters[::-1])):
        path.parent.mkdir()
        Tokenizer(models.BPE({token: i for i, token in enumerate(ordered)}, [])).save(str(path))
    assert call(workdir, data__tokenizer=first)[0] == cli.DONE
    before = snapshot(workdir)
    for arguments in ([], ["--mode=eval"]):
        status, _, err = call(workdir, *arguments, data__tokenizer=other, train__steps=6)
        refused = (
            f"error: data.tokenizer: got '{other}'; the run in {workdir} has '{first}', whose ids may not change\n"
        )
        assert (status, err) == (cli.USER_ERROR, refused)
        assert snapshot(workdir) == before
    status, out, err = call(workdir, data__tokenizer=moved, train__steps=6)
    assert status == cli.DONE and "resuming from step 4" in out, err


@pytest.mark.parametrize(("attention", "expert"), [(1, 1), (2, 2)])
def test_evaluation_alone_tells_the_same_and_changes_nothing(call, finished, attention, expert):
    before = snapshot(finished)
    status, out, err = call(finished, "--mode=eval", mesh__attention=attention, mesh__expert=expert)
    assert (status, err) == (cli.DONE, "")
    loss = kill.figures(finished)[4, "eval"]["loss"]
    assert "step 4\n" in out
    assert float(re.search(r"held-out loss +([\d.]+) nats", out)[1]) == pytest.approx(loss, abs=1e-4)
    assert snapshot(finished) == before


def test_nothing_to_evaluate(call, workdir):
    status, _, err = call(workdir, "--mode=eval")
    assert status == cli.USER_ERROR and err.startswith("error: --workdir: ")
    workdir.mkdir()
    status, _, err = call(workdir, "--mode=eval")
    assert (status, err) == (
        cli.USER_ERROR,
        f"error: --workdir: got {workdir}, which has no checkpoint; takes the folder of a run that saved one\n",
    )
    assert not any(workdir.iterdir())


def test_from_the_parameters_of_another_run(call, finished, workdir, tmp_path):
    """With rates so small that no parameter and no bias moves; the other run balanced by none."""
    run, still = tmp_path / "next", {"train__init_from": finished, "optimizer__learning_rate": 1e-30}
    still["model__router_bias_rate"] = 1e-30
    assert call(run, train__steps=2, **still)[0] == cli.DONE
    (source, parameters) = ({k: v for k, v in kill.state(x).items() if "params" in k} for x in (finished, run))
    assert parameters == source
    assert steps(run, "train") == [1, 2]
    assert kill.figures(run)[2, "eval"]["loss"] == kill.figures(finished)[4, "eval"]["loss"]
    shutil.rmtree(finished)  # it is not needed to go on
    assert call(run, train__steps=3, **still)[0] == cli.DONE


def test_parameters_that_are_not_there_are_told_before_data_is_prepared(call, finished, tmp_path, monkeypatch):
    workdir, empty = tmp_path / "next", tmp_path / "empty"
    status, _, err = call(workdir, train__init_from=finished, model__d_ff=32)
    assert status == cli.USER_ERROR and re.fullmatch(r"error: .*experts.* is float64\[.*\] there and .*\n", err)
    (empty / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(preparation, "ensure", None)
    for path in (tmp_path / "nowhere", empty):
        status, _, err = call(workdir, train__init_from=path)
        takes = "which has no checkpoint; takes the folder of a run that saved one"
        assert (status, err) == (cli.USER_ERROR, f"error: train.init_from: got {path}, {takes}\n")
    assert not workdir.exists()


def test_a_result_that_is_not_finite_is_told_as_such(call, workdir, monkeypatch):
    figures = Run.figures
    monkeypatch.setattr(Run, "figures", lambda *args, **options: figures(*args, **options) | {"loss": np.nan})
    monkeypatch.setattr(Run, "evaluate", lambda *_: {"loss": np.nan, "perplexity": np.nan, "seconds": 1.0})
    for _ in range(2):  # as a new run, and as one that is finished
        status, out, err = call(workdir)
        assert (status, err) == (cli.DONE, "")
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["train_loss"] is None and summary["eval_loss"] is None and summary["eval_perplexity"] is None
        assert "held-out loss  nan nats/token" in out and "train loss     nan nats/token" in out


@pytest.mark.parametrize("profile", ["2:3", "3:4", "1:1"])
def test_profile(call, workdir, profile):
    assert call(workdir, train__profile=profile, train__log_every=0)[0] == cli.DONE
    assert list(workdir.glob("profile/**/*.xplane.pb"))
    assert steps(workdir, "train") == [4]


def test_a_profile_whose_first_step_was_done_before(call, finished):
    assert call(finished, train__steps=6, train__profile="3:5")[0] == cli.DONE
    assert list(finished.glob("profile/**/*.xplane.pb"))


def test_the_workdir_alone_is_enough_to_go_on(call, finished, monkeypatch, capsys):
    """The run's own config is what the flags change, with another name of its folder too."""

    def run(*arguments):
        status = cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=["train.py", *arguments])
        return status, *capsys.readouterr()

    status, out, err = run("--workdir", str(finished), "--mode=eval")
    assert (status, err) == (cli.DONE, "") and "step 4\n" in out
    status, out, err = run(f"--workdir={finished}", f"{STEPS}5", "--config.train.eval_every=1")
    assert (status, err) == (cli.DONE, "") and "result after step 5\n" in out
    status, _, err = run(f"--workdir={finished}", "--config.model.d_ff=32")
    assert status == cli.USER_ERROR and err.startswith("error: model.d_ff: got 32; the run in ")
    status, _, err = run(f"--workdir={finished}", "--config=configs/tiny.py")
    assert status == cli.USER_ERROR and "which may not change" in err
    (finished / "config.json").write_text("{")
    status, _, err = run(f"--workdir={finished}")
    assert status == cli.USER_ERROR and "config.json cannot be read" in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_told(call):
    status, _, err = call("/proc/run")
    assert status == cli.USER_ERROR and re.fullmatch(r"error: --workdir: .*/proc.*\n", err)


def test_without_a_workdir_it_lies_where_one_stands(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train.py", *kill.flags(data, **SMALL, name="mine")]
    assert cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=argv) == cli.DONE
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]
