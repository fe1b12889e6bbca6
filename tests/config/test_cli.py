"""Command lines: mistakes end with status 2, one line that names the field, and nothing created."""

import dataclasses
import json
import os
import subprocess
import sys

import kill
import pytest
from absl import flags

import train
from maxsep.config import ConfigError, cli
from maxsep.config.paths import REPOSITORY

TRAIN = {"define": train.define, "doc": train.__doc__, "default_config": "configs/tiny.py"}


def parsed(*arguments, define=train.define, commands=(), default_config="configs/tiny.py"):
    return cli.parse(["train.py", *arguments], define, default_config, commands)


# What is wrong: the arguments, and what the line has to name. FILES lies in the test's folder, see `files`.
MISTAKES = {
    # flags
    "unknown flag": (["--bogus=1"], "'bogus'"),
    "mistyped flag": (["--workdri=x"], "Did you mean: workdir"),
    "flag without value": (["--workdir"], "--workdir"),
    "unknown mode": (["--mode=fly"], "--mode=fly"),
    "stray argument": (["tiny"], "'tiny'"),
    # config files
    "no such config": (["--config=configs/huge.py"], "--config: got 'configs/huge.py'"),
    "config without value": (["--config"], "--config"),
    "broken config": (["--config={files}/broken.py"], "broken.py:4: NameError: name 'undefined' is not defined"),
    "config that is no Python": (["--config={files}/syntax.py"], "syntax.py: SyntaxError"),
    "config without get_config": (["--config={files}/empty.py"], "no function get_config"),
    "config of another type": (["--config={files}/string.py"], "returned str; takes a ConfigDict"),
    "config with an unknown field": (["--config={files}/field.py"], "model.layer: no such field"),
    # config values
    "mistyped section": (["--config.modle.layers=2"], "did you mean model.layers?"),
    "mistyped field": (["--config.train.batchsize=2"], "did you mean train.batch_size?"),
    "no section": (["--config.learning_rate=2"], "did you mean optimizer.learning_rate?"),
    "whole section": (["--config.mesh=8"], "mesh: is a section"),
    "word for an integer": (["--config.model.layers=two"], "model.layers: got 'two'; takes an integer"),
    "fraction for an integer": (["--config.train.steps=1.5"], "train.steps: got '1.5'; takes an integer"),
    "word for an optional number": (["--config.model.capacity_factor=x"], "model.capacity_factor: got 'x'"),
    "boolean for an optional number": (["--config.model.kv_heads=True"], "model.kv_heads: got True"),
    "number for a boolean": (["--config.optimizer.zero1=2"], "optimizer.zero1: got '2'; takes True or False"),
    "not a number": (["--config.optimizer.learning_rate=nan"], "optimizer.learning_rate: got nan"),
    "number beyond float32": (["--config.optimizer.learning_rate=1e60"], "optimizer.learning_rate: got 1e+60"),
    "unknown activation": (["--config.model.activation=relu"], "model.activation: got 'relu'"),
    "too many choices": (["--config.model.top_k=17"], "model.top_k: got 17"),
    # mesh shapes
    "mesh that does not divide the experts": (
        ["--config.mesh.expert=3"],
        "mesh: got expert 3; takes mesh.expert=2 or mesh.expert=4, as layout ma splits train.batch_size",
    ),
    "mesh that does not divide the heads": (
        ["--config.mesh.attention=32"],
        "mesh: got attention 32; takes mesh.attention=16, as layout ma splits model.heads (16) over it",
    ),
    "mesh that does not divide the batch": (["--config.mesh.expert=16", "--config.train.batch_size=8"], "batch_size"),
    "mesh larger than the machine": (
        ["--config.mesh.expert=16"],
        "mesh: got stage 1 x attention 4 x expert 16",
    ),
    "model larger than the machine": (["--config.model.d_ff=2000000000"], "model: got "),
    # data and tokenizers
    "unknown source": (["--config.data.source=hub"], "data.source: got 'hub'"),
    "source without path": (["--config.data.source=tfds"], "data.path: got None"),
    "path without source": (["--config.data.path=text.jsonl"], "data.path: got 'text.jsonl'"),
    "no such dataset": (["--config.data.source=tfds", "--config.data.path={files}/c4"], "data.path: got '{files}/c4'"),
    "folder without dataset": (["--config.data.source=tfds", "--config.data.path={files}"], "data.path: "),
    "no such file": (["--config.data.source=files", "--config.data.path={files}/*.txt"], "data.path: got "),
    "file of another kind": (["--config.data.source=files", "--config.data.path={files}/*.py"], "data.path: got "),
    "broken text": (["--config.data.source=files", "--config.data.path={files}/a.jsonl"], "a.jsonl"),
    "cache that is a file": (["--config.data.cache={files}/empty.py"], "data.cache: got "),
    "unknown tokenizer": (["--config.data.tokenizer=gpt5"], "data.tokenizer: got 'gpt5'"),
    "too many ids": (["--config.data.tokenizer=gpt2:60000"], "data.tokenizer: got 'gpt2:60000'"),
    "more ids than rows": (["--config.data.tokenizer=gpt2"], "model.vocab_size: got 8192"),
    "no such tokenizer": (["--config.data.tokenizer={files}/tokenizer.json"], "data.tokenizer: got "),
    "broken tokenizer": (["--config.data.tokenizer={files}/broken.json"], "data.tokenizer: got "),
    # workdirs
    "workdir that is a file": (["--workdir={files}/empty.py"], "--workdir: got"),
    "workdir in a file": (["--workdir={files}/empty.py/run"], "--workdir: got"),
    "evaluation without a run": (["--mode=eval"], "--workdir: got"),
    "empty workdir": (["--workdir="], "--workdir: got ''"),
    "workdir of nobody": (["--workdir=~nobody-here/run"], "--workdir: got '~nobody-here/run'"),
    "workdir with too long a name": ([f"--workdir={'x' * 300}"], "--workdir: got 'xxx"),
    # URLs, until buckets work
    "workdir in a bucket": (["--workdir=gs://bucket/run"], "--workdir: got 'gs://bucket/run', a URL; takes a path"),
    "weights in a bucket": (
        ["--config.train.init_from=s3://bucket/run"],
        "train.init_from: got 's3://bucket/run', a URL",
    ),
    "config on a page": (["--config=https://page/tiny.py"], "--config: got 'https://page/tiny.py', a URL"),
    "text in a bucket": (
        ["--config.data.source=files", "--config.data.path=s3://bucket/*.jsonl"],
        "data.path: got 's3://bucket/*.jsonl', a URL",
    ),
    "dataset in a bucket": (
        ["--config.data.source=tfds", "--config.data.path=gs://tfds-data/datasets", "--config.data.name=c4"],
        "data.path: got 'gs://tfds-data/datasets', a URL",
    ),
    "tokenizer on a hub": (["--config.data.tokenizer=hf://gpt2/tokenizer.json"], "data.tokenizer: got 'hf://gpt2/tok"),
    "cache in a bucket": (["--config.data.cache=gs://bucket/cache"], "data.cache: got 'gs://bucket/cache', a URL"),
    # flag files
    "flag file that is not there": (["--flagfile={files}/none.txt"], "--flagfile: "),
    "flag file without a name": (["--flagfile"], "--flagfile: "),
    "mistyped field in a flag file": (["--flagfile={files}/flags"], "modle.layers: no such field"),
    "weights of nobody": (["--config.train.init_from=~nobody-here"], "train.init_from: got '~nobody-here'"),
    "more steps than int32 counts": (["--config.optimizer.warmup_steps=3000000000"], "optimizer.warmup_steps: got 3"),
    "broken split of the default corpus": (["--config.data.split=nonsense["], "data.split: got nonsense["),
    "broken held-out split of files": (
        ["--config.data.source=files", "--config.data.path={files}/a.jsonl", "--config.data.eval_split=test"],
        "data.eval_split: got test",
    ),
}


@pytest.fixture
def files(tmp_path):
    """A folder of config files with mistakes."""
    folder = tmp_path / "files"
    folder.mkdir()
    view = "from configs import base\n\ndef get_config():\n"
    (folder / "broken.py").write_text(view + "    return undefined\n")
    (folder / "syntax.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("")
    (folder / "a.jsonl").write_text('{"text": "One."}\nTwo.\n')
    (folder / "broken.json").write_text("{}")
    (folder / "flags").write_text("# of a colleague\n--config.modle.layers=2\n")
    (folder / "string.py").write_text("def get_config():\n    return 'model'\n")
    field = (
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'model': {'layer': 2}})\n"
    )
    (folder / "field.py").write_text(field)
    return folder


def status_and_error(arguments, workdir, capsys):
    """What train.py returns, and its standard error; a workdir among the arguments goes before `workdir`."""
    status = cli.run(train.main, argv=["train.py", f"--workdir={workdir}", *arguments], **TRAIN)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_with_status_2_and_one_line(arguments, named, files, workdir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(files.iterdir())
    status, error = status_and_error([argument.format(files=files) for argument in arguments], workdir, capsys)
    assert status == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert named.format(files=files) in error
    assert not workdir.exists()
    assert sorted(p for p in files.iterdir() if p.name != "__pycache__") == before


def test_a_run_of_another_model_is_left_alone(workdir, capsys):
    workdir.mkdir()
    config = json.dumps({"config": dataclasses.asdict(parsed("--config.model.layers=4").config), "corpus": "0"})
    (workdir / "config.json").write_text(config)
    status, error = status_and_error(["--config.model.layers=2"], workdir, capsys)
    assert status == 2, error
    assert error.startswith("error: model.layers: got 2; the run in ")
    assert error.count("\n") == 1
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert (workdir / "config.json").read_text() == config


@pytest.mark.parametrize(
    "arguments", [["--bogus=1"], ["--config.mesh.expert=3"], ["--config=configs/seed.py"]], ids=lambda a: a[0]
)
def test_the_same_from_a_shell(arguments, workdir):
    command = [sys.executable, "-W", "error", "train.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=kill.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    "argument",
    [
        "--config.mesh.expert=3",
        "--config.train.init_from=/nowhere",
        "--config.data.source=files --config.data.path=/nowhere/*.txt",
        "--config.data.source=tfds --config.data.path=/nowhere",
        "--config.data.tokenizer=/nowhere/tokenizer.json",
        "--workdir={run} --config.model.layers=7",
        "--workdir={run} --mode=eval",
    ],
)
def test_a_mistake_is_answered_before_jax_is_imported(argument, workdir):
    """Importing it and starting its backend takes seconds."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"config": dataclasses.asdict(parsed().config), "corpus": "0"}))
    code = "import sys, train\nfrom maxsep.config import cli\n"
    code += "status = cli.run(train.main, train.define, '', 'configs/tiny.py', argv=['train.py', *sys.argv[1:]])\n"
    code += "assert status == 2\nassert 'jax' not in sys.modules"
    arguments = argument.format(run=workdir).split()
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, check=True, capture_output=True)


def test_help_and_wrong_values_are_answered_before_numpy_is_imported():
    code = "import sys, train\nfrom maxsep.config import cli\nfor argument in sys.argv[1:]:\n"
    code += "    print(cli.run(train.main, train.define, '', 'configs/tiny.py', argv=['train.py', argument]))\n"
    code += "assert 'numpy' not in sys.modules"
    arguments = ["--help", "--bogus", "--config.model.layer=2", "--config.model.layers=x", "--config.mesh.expert=3"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-len(arguments) :] == ["0", "2", "2", "2", "2"]


def test_overrides():
    args = parsed(
        "--config=" + str(REPOSITORY / "configs" / "base.py"),
        "--config.model.capacity_factor=1.25",
        "--config.train.profile=3:4",
        "--config.optimizer.clip_norm=2",
        "--config.optimizer.decay_steps=500",
        "--config.model.layers",
        "6",
        "--config.train.deterministic",
        "--noconfig.data.cross_document_attention",
        "--config.data.source=files",
        "--config.data.path=12",
    )
    config = args.config
    assert (config.model.capacity_factor, config.train.profile, config.optimizer.clip_norm) == (1.25, "3:4", 2.0)
    assert (config.optimizer.decay_steps, config.model.layers, config.data.path) == (500, 6, "12")
    assert config.train.deterministic
    assert not config.data.cross_document_attention


@pytest.mark.parametrize("other", ["__init__.py", "base.py"])
def test_configs_are_this_projects_own_and_what_lies_beside_the_file(other, tmp_path):
    """Not a package of that name in the current folder, which `python -m` looks into first."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / other).write_text("raise ImportError('of another project')\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("LENGTH = -1\n")
    lines = ["config = tiny.get_config()", "config.data.sequence_length = beside.LENGTH", "return config"]
    view = "from configs import beside, tiny\n\ndef get_config():\n    " + "\n    ".join(lines) + "\n"
    (tmp_path / "mine" / "config.py").write_text(view)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "maxsep.prepare", "--config=mine/config.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: data.sequence_length: got -1; "), done.stderr


@pytest.mark.parametrize("path", ["model.capacity_factor", "model.capacity_group", "data.path", "train.init_from"])
def test_none_is_a_value_of_an_optional_field(path, tmp_path):
    file = tmp_path / "config.py"
    values = {"model.capacity_factor": "1.0", "model.capacity_group": "32"}
    lines = [f"    config.{p} = {v}" for p, v in values.items() if path != "model.capacity_factor" or p == path]
    view = "from configs import tiny\n\ndef get_config():\n    config = tiny.get_config()\n"
    file.write_text(view + "\n".join([*lines, "    return config\n"]))
    section, _, name = path.partition(".")
    config = parsed(f"--config={file}", f"--config.{path}=None").config
    assert getattr(getattr(config, section), name) is None


def test_the_config_may_come_after_its_overrides():
    config = parsed("--config.model.layers=6", "--config", str(REPOSITORY / "configs" / "base.py")).config
    assert (config.name, config.model.layers) == ("base", 6)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--workdir=a --mode=eval", "--workdir=a"),
        ("--workdir a --config b.py --config.train.steps 5 --mode eval", "--config=b.py --config.train.steps 5"),
        (
            "--config.train.deterministic --noconfig.optimizer.zero1 x --config.data.path=*.txt",
            "--config.train.deterministic --noconfig.optimizer.zero1 x --config.data.path=*.txt",
        ),
        ("--mode=eval", ""),
    ],
)
def test_what_of_a_command_line_names_its_config(given, meant):
    assert cli.config_arguments(["train.py", *given.split()]) == meant.split()


def test_the_mesh_follows_the_machine_only_where_nothing_was_said_about_it():
    assert parsed("--config.train.steps=5").fit_mesh
    assert not parsed(f"--config={REPOSITORY / 'configs' / 'tiny.py'}").fit_mesh
    assert not parsed("--config.mesh.expert=2").fit_mesh


def test_flag_files_are_read_before_anything_else(tmp_path, capsys):
    """As absl reads them: in the place of the flag, one in another, the last value counts."""
    (tmp_path / "inner").write_text("--config.model.layers=7\n")
    (tmp_path / "outer").write_text(
        f"// a comment\n--config={REPOSITORY / 'configs' / 'base.py'}\n\n--flagfile={tmp_path / 'inner'}\n"
        "--config.model.experts=4\n--workdir=x\n"
    )
    found = []
    argv = ["train.py", "--config.model.layers=5", f"--flagfile={tmp_path / 'outer'}", "--config.model.experts=16"]
    assert cli.run(found.append, **TRAIN, argv=argv) == 0
    (args,) = found
    assert (args.config.name, args.config.model.layers, args.config.model.experts) == ("base", 7, 16)
    assert args.flags.workdir == "x" and not args.fit_mesh
    base = f"--config={REPOSITORY / 'configs' / 'base.py'}"
    fields = ["--config.model.layers=5", "--config.model.layers=7", "--config.model.experts=4"]
    assert cli.config_arguments(args.argv) == [base, *fields, "--config.model.experts=16"]
    (tmp_path / "inner").write_text("--help\n")
    assert cli.run(found.append, **TRAIN, argv=argv) == 0 and len(found) == 1
    assert "--config.mesh.attention=" in capsys.readouterr().out


def test_commands():
    assert parsed("fly", commands=("fly", "swim")).command == "fly"
    for arguments in ([], ["walk"], ["fly", "swim"]):
        with pytest.raises(ConfigError, match=r"command: .*; takes fly or swim|unexpected argument 'swim'"):
            parsed(*arguments, commands=("fly", "swim"))


def test_a_tool_without_config():
    assert parsed("--workdir=x", default_config=None).config is None
    for argument in ("--config=configs/tiny.py", "--config.model.layers=2"):
        with pytest.raises(ConfigError, match="--config: this command takes none"):
            parsed(argument, default_config=None)


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (cli.Exit(cli.STOPPED, "stopped"), 75, "error: stopped\n"),
        (ConfigError("a.b: got 1;\n takes 2"), 2, "error: a.b: got 1; takes 2\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
    ids=["exit", "mistake", "interrupt"],
)
def test_exit_statuses(raised, status, line, capsys):
    def main(args):
        raise raised

    assert cli.run(main, **TRAIN, argv=["train.py"]) == status
    assert capsys.readouterr().err == line


def test_a_crash_shows_where(capsys):
    assert cli.run(lambda args: 1 / 0, **TRAIN, argv=["train.py"]) == 70
    assert "Traceback" in (error := capsys.readouterr().err)
    assert "ZeroDivisionError" in error


def test_help_lists_flags_fields_and_the_values_of_the_config(capsys):
    assert cli.run(train.main, **TRAIN, argv=["train.py", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Trains a Mixture-of-Experts transformer")
    assert "--mode=train|eval" in text
    assert "--config.mesh.attention=4 " in text
    assert "experts per token" in text
    assert (
        cli.run(train.main, **TRAIN, argv=["train.py", "--help", f"--config={REPOSITORY / 'configs' / 'seed.py'}"]) == 0
    )
    assert "--config.model.d_ff=16384 " in capsys.readouterr().out


def test_flags_of_two_command_lines_do_not_meet():
    def define(values):
        flags.DEFINE_integer("steps", 3, "steps", flag_values=values)

    assert parsed("--steps=4", define=define).flags.steps == 4
    assert parsed(define=define).flags.steps == 3
    assert "steps" not in flags.FLAGS
