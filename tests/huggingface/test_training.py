"""An imported model trains, from train.init_from alone, on any layout, and goes out again."""

import random
import re

import kill
import pytest
from conversion import GOLDEN, exported, imported, tensors
from runs import snapshot

import train
from maxsep.config import cli
from maxsep.config.schema import ModelConfig
from maxsep.config.stored import read_config

LENGTH = 16
SMALL = {
    "train.steps": 2,
    "train.log_every": 1,
    "train.batch_size": 16,
    "optimizer.warmup_steps": 2,
    "data.source": "files",
    "data.sequence_length": LENGTH,
    "data.tokenizer": "ids:64:1",  # the model's own does not end texts
    "model.dtype": "float64",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return imported(GOLDEN / "mixtral_even", tmp_path_factory.mktemp("imported") / "model")


@pytest.fixture
def trained(model, tmp_path, capsys, kept_programs):
    """Calls train.py without a config, to start from the imported model: its status and its errors."""
    dice = random.Random(0)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(f'{{"text": "{" ".join(str(dice.randrange(64)) for _ in range(40))}"}}\n' for _ in range(90))
    )
    data = {"data.path": text, "data.cache": tmp_path / "cache", "train.init_from": model}

    def trained(workdir, **changed):
        values = data | SMALL | {name.replace("__", "."): value for name, value in changed.items()}
        argv = ["train.py", f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]
        with kept_programs():
            status = cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=argv)
        return status, capsys.readouterr().err

    return trained


def test_the_model_and_its_tokenizer_come_from_the_run(model, trained, tmp_path):
    run = tmp_path / "run"
    assert trained(run, model__remat="full") == (cli.DONE, "")
    config, source = read_config(run)[0], read_config(model)[0]
    assert config.model.dtype == "float64" and config.model.remat == "full"
    differ = {f for f in ModelConfig.__dataclass_fields__ if getattr(config.model, f) != getattr(source.model, f)}
    assert differ == {"dtype", "remat"}
    assert config.mesh.devices == 1 and config.name == "from_model"
    assert source.data.tokenizer == "ids:64"
    status, err = trained(tmp_path / "other", data__tokenizer="ids:64")
    assert status == cli.USER_ERROR
    assert err.startswith("error: data.tokenizer: got ids:64; takes ids:64:E, with the id E that ends a text, ")


def test_an_imported_model_is_no_run_to_go_on(model, trained, tmp_path, capsys):
    before = snapshot(model)
    for mode in ("train", "eval"):
        argv = ["train.py", f"--workdir={model}", f"--mode={mode}"]
        assert cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=argv) == cli.USER_ERROR
        err = capsys.readouterr().err
        assert re.fullmatch(
            r"error: --workdir: got .*, an imported model, .*train\.py --workdir=NEW .*init_from=.*\n", err
        )
    assert snapshot(model) == before


@pytest.mark.slow
def test_twenty_losses_are_the_same_on_ma_and_tp(model, trained, tmp_path):
    found = {}
    for layout in ("ma", "tp"):
        how = {"layout": layout, "mesh__attention": 4, "mesh__expert": 4, "train__steps": 20}
        assert trained(tmp_path / layout, optimizer__learning_rate=1e-2, **how)[0] == cli.DONE
        rows = kill.figures(tmp_path / layout)
        found[layout] = [rows[step, "train"]["loss"] for step in range(1, 21)]
    assert found["ma"][0] - found["ma"][-1] > 0.1, "it learns"
    assert found["tp"] == pytest.approx(found["ma"], rel=1e-9)
    before, after = tensors(GOLDEN / "mixtral_even"), tensors(exported(tmp_path / "tp", tmp_path / "out"))
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in before.items()}
    moved = [name for name in before if (before[name].astype("float64") != after[name]).any()]
    assert len(moved) == len(before)
