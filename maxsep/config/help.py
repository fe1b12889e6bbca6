"""How --help looks: flags in one column, what they do in the other."""

import re
import textwrap
from collections.abc import Iterable

from absl import flags

Entry = tuple[str, str]  # a flag as it is written, and what it does


def page(doc: str, usage: str, general: Iterable[Entry], own: flags.FlagValues, heading: str, fields: Iterable[Entry]):
    """The page of a tool: its docstring, `usage`, flags, its `own` among them, and config fields under a heading."""
    lines = [doc.strip(), "", f"usage: {usage} [--flag=value ...]", ""]
    for entry in (*general, *map(_of_flag, (own[name] for name in sorted(own)))):
        lines += _lines(*entry)
    if heading:
        lines += ["", heading]
        for entry in fields:
            lines += _lines(*entry)
    return "\n".join(lines)


def _of_flag(flag: flags.Flag) -> Entry:
    choices = getattr(flag.parser, "enum_values", None)
    value = "|".join(choices) if choices else "true|false" if flag.boolean else "VALUE"
    text = re.sub(r"^<.*?>: ", "", flag.help)  # absl's list of choices
    return f"--{flag.name}={value}", text if flag.default in (None, []) else f"{text} (default {flag.default})"


def _lines(left: str, right: str) -> list[str]:
    text = textwrap.wrap(right, 66) or [""]
    first = [f"  {left:<44} {text[0]}"] if len(left) <= 44 else [f"  {left}", " " * 47 + text[0]]
    return [line.rstrip() for line in first + [" " * 47 + line for line in text[1:]]]
