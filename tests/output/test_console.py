"""Lines for people, on a terminal and in a file."""

import contextlib
import os
import pty
import subprocess
import sys

from maxsep.output import console


def test_a_line_shows_what_the_row_has():
    row = {"step": 12, "split": "train", "loss": 6.25, "tokens_per_second": 5120.4, "mfu": None, "layers": {}}
    assert console.line(row, 300) == "step  12/300  loss 6.2500  tok/s 5,120"
    row = {"step": 300, "split": "eval", "loss": None, "perplexity": 1234.5}
    assert console.line(row, 300) == "step 300/300  eval loss nan  perplexity 1,234.5"


def test_a_table_is_aligned():
    assert console.table("run", {"a": 1, "long": "x"}) == "run\n  a     1\n  long  x"


def test_plain_lines_in_a_file(capsys):
    with console.Progress(10) as progress:
        progress.print("one [bold]line[/bold]")
        progress.step(5)
    assert capsys.readouterr().out == "one [bold]line[/bold]\n"


def test_a_bar_on_a_terminal():
    code = (
        "from maxsep.output import console\n"
        "with console.Progress(10, 3) as progress:\n"
        "    progress.print('one [bold]line[/bold]')\n"
        "    progress.step(5)\n"
        "    progress.print('two')\n"
    )
    main, other = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=other, check=True, env={**os.environ, "TERM": "xterm"})
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal whose other side has closed with an error
        while chunk := os.read(main, 4096):
            shown += chunk
    os.close(main)
    assert b"one [bold]line[/bold]" in shown and b"5/10" in shown
