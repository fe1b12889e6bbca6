"""Other users, and disks that are soon full: the start of a command that is run so, or the test is skipped by name."""

import contextlib
import os
import shutil
import subprocess

import pytest

NOBODY = 12345  # an id that is in no list of users


def _setpriv(*how: str) -> list[str]:
    command = ["setpriv", *how]
    if shutil.which("setpriv") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and setpriv, to be another user")
    return command


def nobody() -> list[str]:
    """A user without a home who may read what root does: Python may lie in root's own folder."""
    return _setpriv(
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    )


def held_to_permissions() -> list[str]:
    """This user; root too may then only read what its permissions say."""
    return _setpriv("--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else []


@contextlib.contextmanager
def small_disk(folder, size: str):
    """Within, a disk of that size is mounted at the folder."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # readers may still be open
