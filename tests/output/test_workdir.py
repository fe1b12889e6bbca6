"""What a run's folder says, and which changes of its config are refused."""

import contextlib
import dataclasses
import json
from operator import attrgetter
from types import SimpleNamespace

import jax
import pytest

from maxsep.config import Config, ConfigError, cli, fields, from_config_dict
from maxsep.config.mixture import parse
from maxsep.config.validate import validate
from maxsep.output import workdir as folder


def replaced(config, path, value):
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: inner})


def another(field):
    """A value of the field's type that is not its default."""
    default = field.default
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if isinstance(default, str):
        return default + "x"
    if field.path == "data.mixture":
        return parse("web:1:DIR")
    return {int: 7, float: 0.5, str: "x"}[next(t for t in (int, float, str) if field.hint in (t, t | None))]


@pytest.fixture
def run(workdir):
    workdir.mkdir()
    folder.write_config(workdir, folder.resolve(Config()), "corpus-1", "tokenizer-1")
    return workdir


@pytest.mark.parametrize("field", list(fields()), ids=lambda field: field.path)
def test_every_field_may_change_or_is_refused_by_name(run, field):
    changed = replaced(Config(), field.path, another(field))
    listed = any(
        field.path == name or (name.endswith(".") and field.path.startswith(name)) for name in folder.RESUME_MAY_CHANGE
    )
    if listed:
        assert attrgetter(field.path)(folder.check_resume(run, changed, "corpus-1")) == another(field)
    else:
        with pytest.raises(ConfigError, match=rf"^{field.path}: got .* which may not change$") as caught:
            folder.check_resume(run, changed, "corpus-1")
        assert repr(another(field)) in str(caught.value)


def test_what_may_change_exists():
    paths = [field.path for field in fields()]
    for name in folder.RESUME_MAY_CHANGE:
        assert name in paths or (name.endswith(".") and any(p.startswith(name) for p in paths))


def test_another_corpus_is_refused(run):
    folder.check_resume(run, Config(), "corpus-1")
    folder.check_resume(run, Config())
    with pytest.raises(ConfigError, match=r"^data\.source: got another corpus"):
        folder.check_resume(run, Config(), "corpus-2")


@pytest.mark.parametrize(
    ("own", "given", "content", "accepted"),
    [
        ("a.json", "a.json", "tokenizer-1", True),
        ("a.json", "b.json", "tokenizer-1", True),
        ("a.json", "b.json", "tokenizer-2", False),
        ("a.json", "a.json", "tokenizer-2", False),
        ("gpt2", "gpt2:50257", "tokenizer-1", True),
        ("gpt2", "bytes", "tokenizer-2", False),
    ],
)
def test_a_tokenizer_is_known_by_its_content(workdir, own, given, content, accepted):
    workdir.mkdir()
    folder.check_tokenizer(workdir, Config(), "any, as there is no run yet")
    started = replaced(Config(), "data.tokenizer", own)
    folder.write_config(workdir, folder.resolve(started), "corpus-1", "tokenizer-1")
    asked = replaced(Config(), "data.tokenizer", given)
    if accepted:
        folder.check_tokenizer(workdir, asked, content)
        return
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer: got '{given}'.* has '{own}', whose ids may not change"):
        folder.check_tokenizer(workdir, asked, content)


@pytest.mark.parametrize(("given", "accepted"), [("a.json", True), ("b.json", True), ("gpt2", False)])
def test_a_run_without_its_tokenizers_content_goes_by_the_name(workdir, given, accepted):
    workdir.mkdir()
    started = folder.resolve(replaced(Config(), "data.tokenizer", "a.json"))
    folder.write_config(workdir, started, "corpus-1", "tokenizer-1")
    record = json.loads((workdir / "config.json").read_text())
    del record["tokenizer"], record["checksum"]
    (workdir / "config.json").write_text(json.dumps(record))
    with contextlib.nullcontext() if accepted else pytest.raises(ConfigError, match=r"^data\.tokenizer: got 'gpt2'"):
        folder.check_tokenizer(workdir, replaced(Config(), "data.tokenizer", given), "tokenizer-2")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "tensorboard"])
def test_what_another_program_has_made_is_not_written_over(workdir, name):
    (workdir / name).mkdir(parents=True)  # whatever it is
    with pytest.raises(ConfigError, match=rf"^--workdir: got {workdir}, which has a {name} but no config.json"):
        folder.check_start(workdir, Config(), training=True)
    (workdir / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        folder.check_start(workdir, Config(), training=True)


def test_what_is_not_of_a_run_may_lie_beside_it(workdir):
    (workdir / "checkpoints").mkdir(parents=True)  # as a kill right at the start leaves it
    (workdir / "log.txt").write_text("mine")
    folder.check_start(workdir, Config(), training=True)


@pytest.mark.parametrize("old, new", [("0.001", "0.002"), ("corpus-1", "corpus-2"), ('"seed": 0', '"seed": 1')])
def test_a_changed_config_json_is_told(run, old, new):
    path = run / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"^{path}: damaged, or edited: it does not have its checksum"):
        folder.check_resume(run, Config())


def test_more_steps_leave_the_schedule_alone(run):
    longer = replaced(Config(), "train.steps", 5000)
    assert folder.resolve(longer).optimizer.decay_steps == 5000
    resumed = folder.check_resume(run, longer, "corpus-1")
    assert resumed.optimizer.decay_steps == Config().train.steps and resumed.train.steps == 5000
    with pytest.raises(ConfigError, match=r"^optimizer\.decay_steps: got 5000; .* has 1000,"):
        folder.check_resume(run, replaced(longer, "optimizer.decay_steps", 5000), "corpus-1")


def test_a_run_knows_the_machine_that_it_was_trained_on(run, monkeypatch):
    """So kernels are not checked again there."""
    assert folder.of_this_machine(run)
    with monkeypatch.context() as other:
        other.setattr(folder, "PACKAGES", ("jax",))
        assert not folder.of_this_machine(run)
    with monkeypatch.context() as other:
        other.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100")])
        assert not folder.of_this_machine(run)


def test_config_json_says_what_the_result_depends_on(run):
    record = json.loads((run / "config.json").read_text())
    assert from_config_dict(record["config"]) == folder.resolve(Config()) == folder.read_config(run)[0]
    assert record["corpus"] == "corpus-1"
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "maxsep"} <= record["versions"].keys()
    assert record["devices"] == {"kind": "cpu", "count": 16, "processes": 1}
    assert record["command"] and (record["git_commit"] is None or len(record["git_commit"]) >= 40)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no config.json; takes the folder of a run"),
        ("{", "cannot be read: JSONDecodeError"),
        ("[]", "cannot be read: TypeError"),
        ("{}", "cannot be read: KeyError"),
        ('{"config": {"model": {"dmodel": 3}}}', "model.dmodel: no such field"),
        ('{"config": {"model": {"d_model": "x"}}}', "model.d_model: got 'x'; takes an integer"),
    ],
)
def test_a_bad_config_json_is_told_in_one_line(workdir, content, message):
    workdir.mkdir()
    if content is not None:
        (workdir / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        folder.read_config(workdir)
    assert message in str(caught.value) and str(workdir) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_shorter_than_its_warmup_goes_on(tmp_path):
    short = replaced(Config(), "train.steps", 5)
    folder.write_config(tmp_path, folder.resolve(short), "corpus-1", "tokenizer-1")
    longer = folder.check_resume(tmp_path, replaced(short, "train.steps", 500), "corpus-1")
    validate(folder.read_config(tmp_path)[0])
    assert longer.optimizer.decay_steps == longer.optimizer.warmup_steps


@pytest.fixture
def saved(run):
    """A run with a checkpoint, as far as its folder tells."""
    (run / folder.CHECKPOINTS / "7").mkdir(parents=True)
    return run


def test_a_start_that_cannot_be_is_refused_before_anything_slow(run, saved, tmp_path):
    folder.check_start(saved, Config(), training=True)
    folder.check_start(saved, Config(), training=False)
    for other in (tmp_path / "none", tmp_path):
        folder.check_start(other, Config(), training=True)
        with pytest.raises(ConfigError, match=r"^--workdir: got .*, which has no checkpoint"):
            folder.check_start(other, Config(), training=False)
        with pytest.raises(ConfigError, match=r"^train\.init_from: got .*, which has no checkpoint"):
            folder.check_start(tmp_path, replaced(Config(), "train.init_from", str(other)), training=True)
    folder.check_start(tmp_path, replaced(Config(), "train.init_from", str(saved)), training=True)
    with pytest.raises(ConfigError, match=r"^model\.layers: got 7; the run in "):
        folder.check_start(saved, replaced(Config(), "model.layers", 7), training=True)


def test_what_an_unfinished_save_leaves_is_no_checkpoint(run):
    (run / folder.CHECKPOINTS / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not folder.has_checkpoint(run)
    (run / folder.CHECKPOINTS / "7").mkdir()
    assert folder.has_checkpoint(run)


@pytest.mark.parametrize("late", [0, 2, None])
def test_a_folder_that_processes_see_differently_is_looked_at_again(run, monkeypatch, late):
    """`late`: looks after which the second process sees what the first does; None: never."""
    looks = []
    now = iter(range(1000))
    monkeypatch.setattr(folder.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(folder.time, "monotonic", lambda: next(now))

    def agree(own):
        looks.append(own)
        return [own, own if late is not None and len(looks) > late else [[False, False], False]]

    job = SimpleNamespace(members=["process 0", "process 1"], agree=agree)
    if late is not None:
        assert folder.found_alike(run, job, lambda: [True, True]) == [True, True]
        assert len(looks) == late + 1
        return
    says = rf"^--workdir: {run} still holds something else for process 1 than for process 0 after 30 s; takes a folder"
    with pytest.raises(cli.Exit, match=says) as ended:
        folder.found_alike(run, job, lambda: [True, True])
    assert ended.value.status == cli.RESTART and len(looks) > 20
