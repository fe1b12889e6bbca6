"""Files that are replaced at once."""

import json
import math
import os
import stat

import pytest

from maxsep.config import ConfigError, cli, paths
from maxsep.output import durable


def test_json_is_strict_and_replaced_at_once(tmp_path):
    path = tmp_path / "summary.json"
    durable.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        durable.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    durable.write_json(path, {"loss": math.nan, "mesh": {"attention": 4}, "rows": [1.0, math.inf, (2, "a")]})
    assert json.loads(path.read_text()) == {"loss": None, "mesh": {"attention": 4}, "rows": [1.0, None, [2, "a"]]}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def written(file, text: str = "[1]\n") -> None:
    durable.write_asked("--json", str(file), text)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file.json", tmp_path / "link.json"
    link.symlink_to("elsewhere/file.json")
    for text in ("of a link that leads to nothing yet", "and of one that leads to a file"):
        written(link, text)
        assert link.is_symlink() and target.read_text() == text
    durable.write_json(link, {"a": 1})  # also a file of a run's folder that the user has put elsewhere
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}


def test_what_is_no_file_is_written_to(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    written(fifo)
    assert os.read(reader, 99) == b"[1]\n" and stat.S_ISFIFO(fifo.stat().st_mode)
    end, pipe = os.pipe()  # as a shell makes one of >(command)
    written(f"/dev/fd/{pipe}")
    assert os.read(end, 99) == b"[1]\n"
    with (tmp_path / "out.txt").open("w") as out:  # standard output that goes to a file
        out.write("said before\n")
        out.flush()
        written(f"/dev/fd/{out.fileno()}")
    assert (tmp_path / "out.txt").read_text() == "said before\n[1]\n"
    for descriptor in (reader, end, pipe):
        os.close(descriptor)


def test_a_device_stays_one(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a device")
    null = tmp_path / "null"
    os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    written(null)
    assert stat.S_ISCHR(null.stat().st_mode)


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "file.json")
    for file in ("none/file.json", ".", "loop", "nowhere"):
        with pytest.raises(ConfigError, match=r"^--json: got .*; takes a file to write"):
            paths.to_write("--json", str(tmp_path / file))
    with pytest.raises(ConfigError, match="takes a file to write"):
        paths.to_write("--json", "/dev/fd/99")
    with pytest.raises(cli.Exit, match=r"^--json: cannot write /dev/full: No space left on device$") as caught:
        written("/dev/full")
    assert caught.value.status == cli.SAVE_FAILED
