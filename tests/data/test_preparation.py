"""A config's corpus, and the command that prepares it ahead of training."""

import dataclasses
import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from corpora import ENVIRONMENT, TEXTS, config, ensure, run
from tokenizers import Tokenizer, models, pre_tokenizers

from maxsep import prepare
from maxsep.config import Config, ConfigError, DataConfig, ModelConfig, cli
from maxsep.data import docstrings, packing, preparation
from maxsep.data.splits import Sides


def test_what_is_prepared_is_opened(files, tmp_path):
    log = []
    first = ensure(files, tmp_path / "cache", log)
    assert log
    log.clear()
    second = ensure(files, tmp_path / "cache", log)
    assert not log and first.fingerprint == second.fingerprint
    assert first.description == second.description and str(files) in first.description


def test_the_fingerprint_is_of_tokens_and_lengths(files, tmp_path):
    made = [
        ensure(files, tmp_path / "cache", **data).fingerprint
        for data in (
            {},
            {"sequence_length": 32},
            {"tokenizer": "gpt2:300"},
            {"eval_split": "train[80%:]"},
            {"max_tokens": 1000},
        )
    ]
    assert len(set(made)) == len(made)
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_bytes(files.read_bytes())
    assert ensure(elsewhere, tmp_path / "other").fingerprint == made[0]


def test_the_number_of_workers_changes_nothing(files, tmp_path, small_units, capsys):
    whole = ensure(files, tmp_path / "cache")
    figures = tmp_path / "figures.json"
    assert run(files, tmp_path / "other", "--workers=2", f"--json={figures}") == 0
    figures = json.loads(figures.read_text())
    assert figures["fingerprint"] == whole.fingerprint
    assert figures["unigram_entropy"] == whole.unigram_entropy
    assert figures["train"]["tokens"] == whole.train.targets + 1
    assert f"{figures['eval']['records']:,} records" in capsys.readouterr().out


@pytest.mark.parametrize("stop", range(1, 9, 2))
def test_finished_shards_are_kept(files, tmp_path, small_units, monkeypatch, stop):
    whole = ensure(files, tmp_path / "other")
    written = []
    write = packing.write_shard

    def write_some(path, records):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, records)

    monkeypatch.setattr(packing, "write_shard", write_some)
    assert run(files, tmp_path / "cache", "--workers=1") == 75
    (partial,) = (tmp_path / "cache" / "records").glob("*.partial")
    monkeypatch.setattr(packing, "write_shard", lambda path, records: written.append(path.name) or write(path, records))
    again = ensure(files, tmp_path / "cache")
    assert again.fingerprint == whole.fingerprint and again.unigram_entropy == whole.unigram_entropy
    assert again.description == whole.description
    assert len(written) - len(set(written)) <= 1, "only a split's last shard is written again"
    assert not partial.exists()
    assert {path.suffix for path in again.folder.iterdir()} == {".json", ".array_record"}


KILLED = """
import pathlib, sys, time
from maxsep import prepare
from maxsep.config import cli
from maxsep.data import packing

if __name__ == "__main__":
    packing.SHARD_TOKENS = 1024
    write = packing.write_shard

    def slow(path, records):
        while path.name.startswith("train-00003") and not pathlib.Path("signalled").exists():
            time.sleep(0.01)
        return write(path, records)

    packing.write_shard = slow
    sys.exit(cli.run(prepare.main, prepare.define, prepare.__doc__, "configs/tiny.py"))
"""


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_preparation_goes_on(files, tmp_path, monkeypatch, how, status):
    monkeypatch.setattr(packing, "SHARD_TOKENS", 1024)
    whole = ensure(files, tmp_path / "other")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    data = {"source": "files", "path": files, "sequence_length": 16, "tokenizer": "bytes", "cache": tmp_path / "cache"}
    command = [sys.executable, script, "--workers=2", *(f"--config.data.{k}={v}" for k, v in data.items())]
    own = {"start_new_session": True, "env": ENVIRONMENT, "cwd": tmp_path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **own) as process:
        while process.poll() is None and not glob.glob("cache/records/*.partial/train-00001*", root_dir=tmp_path):
            time.sleep(0.005)
        process.send_signal(how)
        (tmp_path / "signalled").touch()
        stderr = process.stderr.read().decode()
        assert process.wait() == status, stderr
    assert how == signal.SIGKILL or "resumes from here" in stderr
    _wait_until_gone(process.pid)
    assert ensure(files, tmp_path / "cache").fingerprint == whole.fingerprint


def _wait_until_gone(group):
    """Fails by pytest's own limit, or the suite's, if a worker outlives its parent."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)


def test_a_large_source_is_prepared_ahead(files, tmp_path, monkeypatch, capsys):
    """The command that the message tells prepares it."""
    asked = config(files, tmp_path / "cache")
    flags = [f"--config.data.{name}={value}" for name, value in dataclasses.asdict(asked.data).items()]
    monkeypatch.setattr(sys, "argv", ["train.py", "--workdir=x", "--config", "configs/tiny.py", *flags, "--mode=train"])
    monkeypatch.setattr(preparation, "LARGE", 100)
    monkeypatch.chdir(cli.REPOSITORY)
    with pytest.raises(ConfigError) as error:
        ensure(files, tmp_path / "cache")
    message = str(error.value)
    assert message.startswith("data.path: ") and "\n" not in message
    assert all(word in message for word in (" tokens, ", " GB of disk, ", " minutes on "))
    assert not list((tmp_path / "cache").glob("records/*"))
    command = shlex.split(message.partition("first run: ")[2])
    assert command[:3] == ["python", "-m", "maxsep.prepare"]
    assert command[3:] == ["--config=configs/tiny.py", *flags]
    assert cli.run(prepare.main, prepare.define, prepare.__doc__, "configs/tiny.py", argv=command[2:]) == 0
    assert ensure(files, tmp_path / "cache").train.targets > 100
    limited = ensure(files, tmp_path / "cache", max_tokens=50, eval_max_tokens=40)
    assert limited.train.targets == 49


@pytest.mark.parametrize(
    "data, field",
    [
        ({"path": "/nowhere/*.jsonl"}, "data.path"),
        ({"path": __file__}, "data.path"),
        ({"source": "tfds", "path": "/nowhere"}, "data.path"),
        ({"source": "tfds", "path": os.path.dirname(__file__), "name": "c4/en"}, "data.name"),
        ({"split": "all"}, "data.split"),
        ({"split": "train"}, "data.split"),
        ({"max_tokens": 1}, "data.max_tokens"),
        ({"eval_max_tokens": 1}, "data.eval_max_tokens"),
        ({"max_tokens": 16}, "data.sequence_length"),
        ({"sequence_length": 1_000_000}, "data.sequence_length"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "data.tokenizer"),
        ({"cache": "/dev/null/cache"}, "data.cache"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(files, tmp_path, data, field):
    with pytest.raises(ConfigError, match=rf"^{field}: ") as error:
        ensure(files, tmp_path / "cache", **data)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/records/*.partial"))


def word_level(folder, *words, unknown=True):
    """The path of a tokenizer that knows these words."""
    names = ["</s>", *words, *["<unk>"] * unknown]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_cannot_be_encoded_is_named(files, tmp_path, capsys, workers):
    made = word_level(tmp_path, "text", *map(str, range(150)), unknown=False)
    flags = f"--workers={workers}", f"--config.data.tokenizer={made}", "--config.model.vocab_size=512"
    assert run(files, tmp_path / "cache", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: data\.tokenizer: {made} cannot encode {files}:1[5-9]\d \(WordLevel error: .*UNK", error)
    assert not list(tmp_path.glob("cache/records/*.partial"))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_has_no_token_is_told_once(files, tmp_path, small_units, capsys, workers):
    words = sum(len(text.split()) for text in TEXTS)
    unknown = sum(word == "199" for text in TEXTS for word in text.split())
    made = word_level(tmp_path, "text", *map(str, range(199)))
    flags = f"--workers={workers}", f"--config.data.tokenizer={made}", "--config.model.vocab_size=512"
    told = f"WARNING: data.tokenizer: {made}: {unknown} pieces of the text ({unknown / words:.2%}) have no token"
    for first in (True, False):
        assert run(files, tmp_path / "cache", *flags) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
        assert lines == [f"{told} and become <unk>"] * first


def test_a_tokenizer_of_other_text_is_refused(files, tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: got .* pieces of the text \(99\.\d+%\) have no token"):
        ensure(files, tmp_path / "cache", tokenizer=str(word_level(tmp_path, "17")))
    assert not list(tmp_path.glob("cache/records/*.partial"))


def test_a_limit_scales_what_has_no_token(files, tmp_path):
    """Else a large part, of which little is taken, would have more that is unknown than tokens."""
    log = []
    made = word_level(tmp_path, "text", *map(str, range(0, 200, 2)))
    ensure(files, tmp_path / "cache", log, tokenizer=str(made), max_tokens=100, eval_max_tokens=20)
    (line,) = [line for line in log if "WARNING" in line]
    assert 20 < int(re.search(r"(\d+) pieces", line)[1]) < 40


def test_the_same_text_elsewhere_is_named_as_configured(files, tmp_path):
    ensure(files, tmp_path / "cache")
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(files.read_bytes())
    log = []
    assert str(moved) in ensure(moved, tmp_path / "cache", log).description and not log


def dies(part):
    """As a worker that the system kills where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def test_a_killed_worker_is_one_line(tmp_path):
    with pytest.raises(cli.Exit, match=r"^--workers: got 2, but one of them was killed .*; takes fewer") as error:
        parts = [(name, Sides(train=((0, 1),))) for name in "ab"]
        packing.pack(tmp_path, dies, parts, packing.Packing("bytes", 16, None, None), 2, print)
    assert error.value.status == cli.USER_ERROR


@pytest.mark.parametrize(
    ("content", "field"), [("", "path"), ("\n\n", "path"), ('{"text": "only one"}\n', "split")], ids=repr
)
def test_too_little_text_is_refused(files, tmp_path, content, field):
    files.write_text(content)
    with pytest.raises(ConfigError, match=rf"^data\.{field}: got .*, which holds no text"):
        ensure(files, tmp_path / "cache")


def test_a_mistake_in_a_worker_is_the_users_line(files, tmp_path, capsys):
    files.write_text('{"text": "fine"}\n' * 20 + "not JSON\n")
    assert run(files, tmp_path / "cache", "--workers=2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: data.path: {files}:21 is not JSON")


def test_a_model_with_too_few_ids_is_refused(files, tmp_path):
    made = config(files, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: got 256; takes at least 257"):
        preparation.ensure(Config(data=made.data, model=ModelConfig(vocab_size=256)), print)


@pytest.mark.slow
def test_the_default_corpus(tmp_path):
    """Of all of this environment's packages."""
    made = Config(data=DataConfig(tokenizer="gpt2:8192", sequence_length=128, cache=str(tmp_path)))
    corpus = preparation.ensure(made, lambda line: None).corpora["docstrings"]
    assert corpus.eval.targets > 100_000 and corpus.train.targets > 1_000_000
    assert 6 < corpus.unigram_entropy < 7.5


def test_the_default_corpus_is_opened_without_what_built_it(tmp_path, monkeypatch):
    """Of one of its packages."""
    one, log = {"optax": "optax"}, []
    monkeypatch.setattr(docstrings, "PACKAGES", one)
    made = Config(data=DataConfig(tokenizer="gpt2:8192", sequence_length=128, cache=str(tmp_path)))
    corpus = preparation.ensure(made, log.append).corpora["docstrings"]
    assert any(line.strip().startswith("optax") for line in log) and "docstrings" in corpus.description
    heavy = "tensorflow_datasets", "pyarrow", "tokenizers", "grain", "jax"
    code = (
        "import sys\nfrom maxsep.config import *\nfrom maxsep.data import docstrings, preparation\n"
        f"docstrings.PACKAGES = {one}\n"
        f"corpus = preparation.ensure(Config(data={made.data!r}), print)\n"
        f"print(corpus.fingerprint, *[name for name in {heavy} if name in sys.modules])"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert again.stdout.split() == [corpus.fingerprint]
