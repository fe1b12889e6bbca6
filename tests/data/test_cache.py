"""The folder of prepared data: several processes at once, full disks, users who may not write."""

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from corpora import ENVIRONMENT, config, ensure, run
from users import NOBODY, held_to_permissions, nobody, small_disk

from maxsep.config import Config, ConfigError, DataConfig
from maxsep.data import packing, preparation


def test_two_at_once_prepare_it_once(files, tmp_path, small_units, monkeypatch):
    count = []
    real = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: count.append(1) or real(*args))
    made, log = [], []
    threads = [
        threading.Thread(target=lambda: made.append(ensure(files, tmp_path / "cache", log).fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and len(set(made)) == 1 and len(count) == 1


def test_who_waits_says_so(files, tmp_path):
    folder = preparation.Preparation(config(files, tmp_path / "cache"), print).folder()
    folder.parent.mkdir(parents=True)
    log = []
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=ensure, args=(files, tmp_path / "cache", log))
        thread.start()
        while not log:
            time.sleep(0.005)
    thread.join()
    assert log[0].startswith("waiting for another process")


def test_a_writer_that_fails_leaves_what_is_finished(files, tmp_path, small_units, monkeypatch):
    """As array_record does where the disk is full."""
    from array_record.python import array_record_module

    whole = ensure(files, tmp_path / "other")

    class Full:
        def __init__(self, path, options):
            open(path, "w").close()

        def write(self, record):
            raise RuntimeError("write() failed:\nNo space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(ConfigError, match=r"^data\.cache: cannot write below .*No space left on device\)$"):
            ensure(files, tmp_path / "cache")
    (partial,) = tmp_path.glob("cache/records/*.partial")
    assert list(partial.glob("*.train")) and not list(partial.glob("*.partial"))
    assert ensure(files, tmp_path / "cache").fingerprint == whole.fingerprint


@pytest.mark.parametrize("ballast", [900, 980, 996])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line(files, tmp_path, capsys, ballast, workers):
    """At the records, at the tokens, at all."""
    files.write_text("".join(json.dumps({"text": random.Random(i).randbytes(200).hex()}) + "\n" for i in range(200)))
    whole = ensure(files, tmp_path / "other")
    cache = tmp_path / "cache"
    with small_disk(cache, "1000k"):
        (cache / "ballast").write_bytes(bytes(ballast << 10))
        assert run(files, cache, f"--workers={workers}") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: data.cache: cannot write below {cache}") and "No space left" in error
        (cache / "ballast").unlink()
        assert ensure(files, cache).fingerprint == whole.fingerprint


def test_a_default_corpus_that_cannot_be_built_leaves_nothing(tmp_path, monkeypatch):
    from maxsep.data import docstrings_builder

    def build(folder, log):
        (folder / "docstrings" / "incomplete.1.0.0").mkdir(parents=True)
        raise RuntimeError("Failed to finalize:\nNo space left on device")

    monkeypatch.setattr(docstrings_builder, "build", build)
    with pytest.raises(ConfigError, match=r"^data\.cache: cannot write below .*No space left on device\)$"):
        preparation.ensure(Config(data=DataConfig(cache=str(tmp_path))), lambda line: None)
    assert not list(tmp_path.glob("docstrings/*/"))


def prepared_by(user, files, cache, *flags):
    """Status and output of the command, as that user without a home."""
    data = {"source": "files", "path": files, "sequence_length": 16, "tokenizer": "bytes"} | cache
    flags = [*(f"--config.data.{name}={value}" for name, value in data.items()), *flags]
    command = [*user, sys.executable, "-m", "maxsep.prepare", "--workers=1", *flags]
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=files.parent)
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_user_without_a_home(files, tmp_path):
    user = nobody()
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", NOBODY, NOBODY)
    status, line = prepared_by(user, files, {"cache": tmp_path / "mine" / "cache"})
    assert status == 0 and "prepared in" in line
    status, line = prepared_by(user, files, {})
    assert (status, line) == (2, "error: data.cache: got None; takes a folder to write to, as this user has no home")


def test_a_cache_that_may_only_be_read(files, tmp_path):
    cache = tmp_path / "cache"
    user = held_to_permissions()
    ensure(files, cache)
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        status, line = prepared_by(user, files, {"cache": cache})
        assert status == 0 and "prepared in" in line
        files.rename(tmp_path / "moved.jsonl")  # whose hash is not known, and cannot be kept
        status, line = prepared_by(user, tmp_path / "moved.jsonl", {"cache": cache})
        assert status == 0 and "moved.jsonl: prepared in" in line
        status, line = prepared_by(user, tmp_path / "moved.jsonl", {"cache": cache}, "--config.data.max_tokens=99")
        assert (status, line) == (2, f"error: data.cache: cannot write below {cache} (Permission denied)")
    finally:
        for folder in folders:
            folder.chmod(0o700)
