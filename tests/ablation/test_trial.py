"""`--runs` as configs, each in a folder of its own; and what is wrong with one is said before the first starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from maxsep import ablate
from maxsep.ablation.trial import columns, trials
from maxsep.config import cli, files

STUDY = "configs/ablations/study.py"


def test_the_studys_runs_are_its_strategies_and_every_factorisation():
    runs = files.listed(STUDY, "RUNS")
    config = files.load_config(STUDY)
    found = trials(runs, config, Path("/nowhere"))
    assert list(columns([trial.name for trial in found]).values()) == ["tp:8x2", "pp:2x1x8", "tp_pp:2x8x1", "ma:4x4"]
    for layout in ("ma", "ma_folded"):
        shapes = {trial.config.mesh.shape for trial in found if trial.config.layout == layout}
        assert shapes == {(1, a, 16 // a) for a in (1, 2, 4, 8, 16)}
    assert all(trial.devices == 16 for trial in found)
    assert [trial.config.layout for trial in found].count("zero") == 1


def test_size_study_is_the_seed_config():
    study, seed = files.load_config(f"{STUDY}:study"), files.load_config("configs/seed.py")
    assert study.model == replace(seed.model, remat="full")  # pipelines do not fit without
    assert (study.train.batch_size, study.data.name) == (seed.train.batch_size, seed.data.name)
    assert len(trials(files.listed(STUDY, "RUNS"), study, Path("/nowhere"))) == 14


def test_a_row_of_ones_own_is_a_run():
    layout = "l=stage b=expert s=attention h=attention e=expert v=stage+attention"
    (trial,) = trials([f"{layout}:2X2x04"], files.load_config(STUDY), Path("/a"))
    assert trial.name == f"{layout}:2x2x4"
    assert (trial.config.layout, trial.config.mesh.shape) == (layout, (2, 2, 4))
    assert trial.folder.name == "l-stage-b-expert-s-attention-h-attention-e-expert-v-stage-attention-2x2x4"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--runs=ma"], "--runs: got 'ma'; takes layout:attention x expert"),
        (["--runs=ma:4x"], "--runs: got 'ma:4x'; takes layout:"),
        (["--runs=ma:0x4"], "--runs: got 'ma:0x4'; takes layout:"),
        (["--runs=ma:4x4,ma:4x4"], "--runs: got ma:4x4 twice"),
        (["--runs="], "--runs: none given; takes layout:"),
        (["--runs=,ma:4x4"], "--runs: got ''; takes layout:"),
        (["--runs=mars:4x4"], "--runs: mars:4x4: layout: got 'mars'; takes ma, ma_folded,"),
        (["--runs=ma:3x4"], "--runs: ma:3x4: mesh: got attention 3; takes"),
        (["--runs=ma:4x4,pp:4x1x4"], "--runs: pp:4x1x4: train.accumulation: got 2; takes at least 4"),
        (["--runs=ma:4x4", "--config=configs/none.py"], "--config: got 'configs/none.py', which is no file"),
        (["--config=configs/tiny.py"], "--runs: none given, and configs/tiny.py has no RUNS"),
        (
            ["--config=configs/tiny.py", "--size=study"],
            "--config: got configs/tiny.py:study; takes configs/tiny.py alone",
        ),
        (["--plan=none.json"], "--plan: got none.json (FileNotFoundError"),
        (["--plan=pyproject.toml"], "--plan: got pyproject.toml (JSONDecodeError"),
        (["--size=huge"], "--size: got 'huge'; takes tiny or study"),
        (["--config.layout=tp"], "layout: is set by each run of --runs; takes no flag here"),
        (["--config.mesh.expert=2"], "mesh.expert: is set by each run of --runs; takes no flag here"),
        (["--config.model.d_modle=64"], "model.d_modle: no such field; did you mean model.d_model?"),
        (
            ["--workdir=/dev/null/ablation"],
            "--workdir: got /dev/null/ablation, but /dev/null is not a folder to write to",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, says, tmp_path, capsys):
    workdir = [] if any("workdir" in argument for argument in arguments) else [f"--workdir={tmp_path / 'ablation'}"]
    assert ablate.run(["ablate", *workdir, *arguments]) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {says}")
    assert not any(tmp_path.iterdir())
