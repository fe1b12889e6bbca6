import glob
import os
import subprocess
import sys

import pytest
from users import held_to_permissions

from maxsep.config.paths import REPOSITORY
from maxsep.data.matching import matching

PATTERNS = [
    "*.txt",
    "**/*.txt",
    "*/*.txt",
    "a/**/*.txt",
    "**/x*",
    "a/[!z]*.txt",
    "a/x.txt",
    "**/b/*",
    "a**/x.txt",
    "?/**/x.txt",
    ".*/*.txt",
    "./a/../a/?.txt",
    "no/*",
    "x.txt/*",
    "**",
]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("x.txt", "y.txt", "a/x.txt", "a/b/x.txt", "a/b/z.txt", "b/c/x.txt", ".hidden/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("where", ["here", "from the root"])
def test_without_links_it_is_what_glob_finds(tree, pattern, where):
    pattern = pattern if where == "here" else str(tree / pattern)
    found = glob.glob(pattern, recursive=True)
    assert matching(pattern) == sorted(path for path in found if not path.endswith("/")), "but for the folder itself"


def test_a_file_is_there_once_by_whatever_name_it_goes(tree):
    once = matching("**/x.txt")
    assert matching("**/**/x.txt") == matching("**/**/**/x.txt") == once
    assert len(glob.glob("**/**/x.txt", recursive=True)) > len(once)
    os.symlink("a/x.txt", "link.txt")
    os.link("a/x.txt", "hard.txt")
    for name in ("0loop", "1loop", "a/b/2loop"):  # from one, glob would go round 40 times; from three, for years
        os.symlink(str(tree), name)
    os.symlink("self.txt", "self.txt")
    os.symlink(str(tree / "a"), "folder")
    found = matching("**/[!s]*.txt")
    assert len(found) == 6 and len({os.stat(path).st_ino for path in found}) == 6
    assert not [path for path in found if "loop" in path], "the name without a detour"


def test_the_same_text_in_two_files_is_two_files(tree):
    (tree / "copy.txt").write_text("x.txt")
    assert "copy.txt" in matching("*.txt") and "x.txt" in matching("*.txt")


def printed(folder, *patterns):
    """What a user without root's rights finds there, or the error."""
    code = f"from maxsep.data.matching import matching\nprint(*[matching(pattern) for pattern in {patterns}])"
    command = [*held_to_permissions(), sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout or done.stderr.splitlines()[-1]


@pytest.fixture
def shut(tree):
    """The tree, of which the folder a/b may not be read."""
    (tree / "a" / "b").chmod(0)
    yield tree
    (tree / "a" / "b").chmod(0o700)


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*/x.txt", "a/b/*.txt", "a/b/x.txt", "**/b/x.txt"])
def test_a_folder_that_may_not_be_read_is_named(shut, pattern):
    named = f"data.path: got {pattern!r}, where the folder 'a/b' cannot be read; takes folders that this user may read"
    assert printed(shut, pattern) == f"maxsep.config.schema.ConfigError: {named}"


def test_a_folder_that_is_not_asked_for_may_be_shut(shut):
    assert printed(shut, "a/*.txt", "b/**/x.txt", "*/*.txt") == "['a/x.txt'] ['b/c/x.txt'] ['a/x.txt']\n"


def test_home_is_expanded(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert matching("~/x.txt") == [str(tree / "x.txt")]
