"""Standard input, output and error, however a program is started: it ends with a status of the table, and says why."""

import os
import subprocess
import sys

import pytest

from maxsep.config import cli

# A command that prints a line which many encodings lack, and writes a file by whose number it shows what it opened.
COMMAND = """
import sys
from maxsep.config import cli
def main(args):
    with open(sys.argv[1], "w") as file:
        file.write(str(file.fileno() > 2))
    print("… \\udcff")
    print("more", flush=True)
sys.exit(cli.run(main, lambda values: None, "doc", argv=["command"]))
"""


def run(tmp_path, redirected: str = "", **environment):
    """The command in a shell, with these redirections."""
    command = f'"{sys.executable}" -c "$COMMAND" "{tmp_path}/file" {redirected}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, env=os.environ | environment | {"COMMAND": COMMAND}
    )
    file = tmp_path / "file"
    return done.returncode, done.stdout, done.stderr.decode(), file.read_text() if file.exists() else None


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(tmp_path, encoding):
    status, out, err, _ = run(tmp_path, PYTHONIOENCODING=encoding)
    first = "…".encode(encoding, errors="backslashreplace")
    assert (status, out, err) == (cli.DONE, first + b" \\udcff\nmore\n", "")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_is_silent_and_its_number_is_no_files(tmp_path, closed):
    assert run(tmp_path, closed) == (cli.DONE, b"", "", "True")


def test_a_full_disk_is_told(tmp_path):
    status, _, err, _ = run(tmp_path, ">/dev/full")
    assert (status, err) == (cli.SAVE_FAILED, "error: standard output: No space left on device\n")


def test_a_reader_that_has_gone_ends_it_quietly(tmp_path):
    code = COMMAND.replace('print("… \\udcff")', "[print('x' * 1000, flush=True) for _ in range(1000)]")
    piped = f'"{sys.executable}" -c "$COMMAND" "{tmp_path}/file" | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", piped], capture_output=True, env=os.environ | {"COMMAND": code})
    assert (done.returncode, done.stderr) == (cli.UNREAD, b"")
