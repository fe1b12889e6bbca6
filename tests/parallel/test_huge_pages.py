"""A program on the CPU starts anew with huge pages, once, as it was, and only where they are of use."""

import os
import subprocess
import sys

import pytest

from maxsep.config.paths import REPOSITORY
from maxsep.parallel import accelerators, huge_pages

OURS = f"{huge_pages.TUNABLE}=1"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without accelerators that gives huge pages on request; what is started anew there."""
    monkeypatch.setattr(accelerators, "DEVICES", tmp_path)
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.35", raising=False)
    monkeypatch.setattr(sys, "argv", [__file__])
    for name in ("JAX_PLATFORMS", huge_pages.TUNABLES):
        monkeypatch.setenv(name, "")
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(os.environ[huge_pages.TUNABLES]))
    return started


def test_other_tunables_stay(machine, monkeypatch):
    monkeypatch.setenv(huge_pages.TUNABLES, "glibc.malloc.check=1")
    huge_pages.ensure()
    assert machine == [f"glibc.malloc.check=1:{OURS}"]


def test_it_goes_on_where_it_cannot_start_anew(machine, monkeypatch):
    def refused(*command):
        raise PermissionError

    monkeypatch.setattr(os, "execv", refused)
    huge_pages.ensure()
    assert os.environ[huge_pages.TUNABLES] == ""


def test_a_program_on_the_cpu_of_a_machine_with_gpus(machine, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    huge_pages.ensure()
    assert machine == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    huge_pages.ensure()
    assert machine == [OURS]


@pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch: monkeypatch.setenv(huge_pages.TUNABLES, f"{huge_pages.TUNABLE}=0"),
        lambda monkeypatch: huge_pages.ENABLED.write_text("[always] madvise never\n"),
        lambda monkeypatch: huge_pages.ENABLED.unlink(),
        lambda monkeypatch: monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.34"),
        lambda monkeypatch: monkeypatch.setattr(os, "confstr", lambda name: None),
        lambda monkeypatch: monkeypatch.delattr(os, "confstr"),
        lambda monkeypatch: monkeypatch.setattr(sys, "argv", ["-"]),
    ],
    ids=["the user's", "always there", "no Linux", "old glibc", "another libc", "no libc", "standard input"],
)
def test_left_alone(machine, monkeypatch, change):
    change(monkeypatch)
    huge_pages.ensure()
    assert machine == []


def test_the_same_command(tmp_path):
    """A process of its own: arguments, options of Python's, standard input and the process are those it was given."""
    enabled = tmp_path / "enabled"
    enabled.write_text("[madvise]")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; from pathlib import Path\n"
        "from maxsep.parallel import huge_pages\n"
        f"huge_pages.ENABLED = Path({str(enabled)!r})\n"
        "os.confstr = lambda name: 'glibc 2.36'\n"
        "print('started', flush=True)\n"
        "huge_pages.ensure()\n"
        f"print(os.environ[{huge_pages.TUNABLES!r}], os.getpid(), sys.argv[1:], sys.flags.dev_mode, sys.stdin.read())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != huge_pages.TUNABLES}
    command = [sys.executable, "-X", "dev", str(script), "two words", "--x="]
    environment |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        said, _ = process.communicate("input")
    assert said == f"started\nstarted\n{OURS} {process.pid} ['two words', '--x='] True input\n"
