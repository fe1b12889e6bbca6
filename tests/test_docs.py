"""The documentation says what is there: the reference is the schema's, and every file, field and command exists.

python tests/test_docs.py       # writes docs/reference.md anew
"""

import re
import shlex
import sys
import tomllib
import types
import typing
from itertools import groupby
from pathlib import Path

import pytest

from maxsep import ablate, bench, certify, convert, launch, plan, prepare
from maxsep.certification import certificate
from maxsep.config import CHOICES, Config, cli, fields
from maxsep.config.mixture import Shares
from maxsep.output.workdir import RESUME_MAY_CHANGE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # train.py is a script beside the package

import infer  # noqa: E402
import train  # noqa: E402

REFERENCE = ROOT / "docs" / "reference.md"
PAGES = [p for pattern in ("*.md", "docs/*.md", "configs/**/*.py") for p in sorted(ROOT.glob(pattern))]
TOOLS = {
    "train.py": {"define": train.define, "default_config": "configs/tiny.py"},
    "infer.py": {"define": infer.define, "default_config": "configs/tiny.py"},  # whose run need not be there
    "maxsep.ablate": {"define": ablate.define, "default_config": ablate.DEFAULT},
    "maxsep.certify": {"define": certify.define, "default_config": certify.DEFAULT},
    "maxsep.launch": {"define": launch.define},
    "maxsep.convert": {
        "define": convert.define,
        "commands": convert.COMMANDS,
        "found": cli.Found(lambda argv: (Config(), argv), convert.FOUND.takes),  # what it converts need not be there
    },
    "maxsep.plan": {"define": plan.define, "default_config": plan.DEFAULT},
    "maxsep.prepare": {"define": prepare.define, "default_config": "configs/tiny.py"},
    "maxsep.bench": {"define": bench.define, "default_config": "configs/bench.py", "commands": bench.COMMANDS},
}
TYPES = {int: "integer", float: "number", bool: "True, False", str: "text", Shares: "sources"}

INTRODUCTION = """\
# Config reference

Every setting, as `maxsep/config/schema.py` has it. A config file sets them (`config.train.steps = 300`), a flag
overrides them (`--config.train.steps=300`; `=None` where None is taken). `python train.py --help
--config=configs/small.py` lists them with that config's values. `resume` marks those that may change when a run
goes on, see [running](running.md).

Which values fit each other is checked before anything starts: `maxsep/config/validate.py`.

This page is written by `python tests/test_docs.py`; a test compares them.
"""


def reference() -> str:
    def row(field):
        optional = isinstance(field.hint, types.UnionType)
        (hint,) = (t for t in typing.get_args(field.hint) or [field.hint] if t is not types.NoneType)
        takes = ", ".join(f"`{choice}`" for choice in CHOICES[field.path]) if field.path in CHOICES else TYPES[hint]
        may_change = field.path in RESUME_MAY_CHANGE or f"{field.path.partition('.')[0]}." in RESUME_MAY_CHANGE
        cells = (
            f"`{field.path}`",
            takes + ", None" * optional,
            f"`{field.default}`",
            field.comment,
            "yes" if may_change else "",
        )
        return f"| {' | '.join(cells)} |"

    parts = [INTRODUCTION]
    for section, group in groupby(fields(), lambda field: field.path.rpartition(".")[0]):
        table = ["| field | takes | default | what it is | resume |", "|---|---|---|---|---|", *map(row, group)]
        parts.append("\n".join([f"## {section or 'The run'}", "", *table, ""]))
    return "\n".join(parts)


def test_the_reference_is_the_schema():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "python tests/test_docs.py writes it anew"


def test_the_rules_of_resuming_are_the_codes():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.split("## What may change")[1].split("\n## ")[0], re.MULTILINE)
    assert {name.replace("*", "") for row in rows for name in re.findall("`(.*?)`", row)} == set(RESUME_MAY_CHANGE)


def test_the_exit_statuses_are_the_codes():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|", page.split("## Exit statuses")[1].split("\n## ")[0], re.MULTILINE)
    statuses = {cli.DONE, cli.USER_ERROR, cli.CRASHED, cli.RESTART, cli.NONFINITE, cli.SAVE_FAILED, cli.STOPPED}
    assert set(map(int, rows)) == statuses | {130, cli.UNREAD, certificate.FAILED}


def commands(text: str) -> list[list[str]]:
    """The commands of ours that stand in a block, comments left out."""
    lines = re.findall(
        r"^(?:    )?(?:[\w$ .<-]*&& )?(python (?:train\.py|infer\.py|-m maxsep\.\w+)(?: .*)?)$", text, re.MULTILINE
    )
    found = [shlex.split(line.partition("#")[0])[1:] for line in lines]
    for command in found:
        if "--" in command:  # launch, and what it starts
            end = command.index("--")
            found.append(command[end + 1 :])
            del command[end:]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"\b(?:maxsep|configs|docs|tests|benchmarks)/(?:[a-z_]+/)*[a-z_]+\.\w+", text):
        assert Path(path).exists(), path
    for script in re.findall(r"\bpython ([\w/]+\.py)", text):
        assert Path(script).exists(), script
    paths = {field.path for field in fields()}
    for path in re.findall(r"(?:--config\.|`)((?:mesh|train|optimizer|data|model)\.[a-z_0-9]+)", text):
        assert path in paths or path in ("train.py", "model.safetensors"), path
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert extra in extras
    for first, *arguments in commands(text):
        tool, arguments = (arguments[0], arguments[1:]) if first == "-m" else (first, arguments)
        cli.parse([tool, *(a for a in arguments if a != "--help")], **TOOLS[tool])  # raises where one is wrong
    known = {"config", "flagfile", "help"} | {name for tool in TOOLS.values() for name in flags_of(tool["define"])}
    for name in re.findall(r"`--(\w+)", text):
        assert name in known, name


def flags_of(define) -> list[str]:
    values = cli.flags.FlagValues()
    define(values)
    return list(values)


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in (
        "pip install -c constraints.txt -e . && python train.py",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ):
        assert f"\n    {command}\n" in text


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
