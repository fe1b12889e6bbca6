"""Models to be spoilt, and what an import says of them."""

import shutil

import pytest
from conversion import GOLDEN, converted

from maxsep.config import cli


@pytest.fixture
def model(tmp_path):
    """A copy of a golden model, of the family of that name, to be spoilt."""

    def copied(name):
        return shutil.copytree(GOLDEN / name, tmp_path / "model")

    return copied


@pytest.fixture
def refused(tmp_path, capsys):
    """The one line that an import ends with; nothing is left of it."""

    def refused(folder):
        workdir = tmp_path / "run"
        assert converted("import", f"--checkpoint={folder}", f"--workdir={workdir}") == cli.USER_ERROR
        out, err = capsys.readouterr()
        assert "Traceback" not in out and err.startswith("error: ") and err.count("\n") == 1
        assert not workdir.exists() and not workdir.with_name("run.partial").exists()
        return err

    return refused
