"""The report of an ablation: ablation.md, ablation.json, pictures, and an ablation.html that needs no other file."""

import base64
import html
import re
from pathlib import Path

from maxsep.ablation import pictures
from maxsep.ablation.compare import Agreement, against_one_peak, agreement, efficiency
from maxsep.ablation.tables import Table, all_tables
from maxsep.output.durable import write_json, write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; font-size: .87em; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child, td.words { text-align: left; }
.wide { overflow-x: auto; }
.note { color: #555; font-size: .87em; }
.warning { background: #fde8e8; border-left: 4px solid #c00; padding: .5rem 1rem; }
img { max-width: 100%; }
"""


def write(
    folder: Path, title: str, facts: dict[str, str], results: list[dict], failed: dict[str, str], draw: bool
) -> Agreement | None:
    """Writes all of it, and returns how far the losses agree.

    Args:
        folder: where to.
        title: of the page.
        facts: what all runs share, by name.
        results: of the runs that ended well.
        failed: why, of the others, by name.
        draw: make the pictures.
    """
    results, agreed = against_one_peak(results), agreement(results)
    simulated = any(result["device_kind"] == "cpu" for result in results)
    tables = all_tables(results, failed, simulated)
    drawn = pictures.draw(results, agreed, folder) if draw and results else {}
    said = agreed.text if agreed else "fewer than two runs have ended: there is nothing to compare"
    said = f"{said[0].upper()}{said[1:]}."
    write_json(
        folder / "ablation.json",
        {
            "facts": facts,
            "agreement": None
            if agreed is None
            else {
                "largest_relative_difference": agreed.difference,
                "of_runs": agreed.of_runs,
                "steps": agreed.steps,
                "apart": agreed.apart,
                "text": agreed.text,
            },
            "scaling_efficiency": efficiency(results),
            "runs": results,
            "failed": failed,
        },
    )
    write_text(folder / "ablation.md", _markdown(title, said, facts, tables, drawn))
    write_text(folder / "ablation.html", _page(title, said, facts, tables, drawn, folder))
    return agreed


def _markdown(title: str, said: str, facts: dict, tables: list[Table], drawn: dict[str, str]) -> str:
    lines = [f"# {title}", "", f"**{said}**", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, caption in drawn.items():
        lines += ["", f"![{caption}]({name})", "", f"*{caption}.*"]
    for table in tables:
        lines += ["", f"## {table.title}", ""]
        lines += [_row(table.head), _row(["---", *["---:"] * (len(table.head) - 1)])]
        lines += [_row(row) for row in table.rows]
        lines += [line for note in table.notes for line in ("", note)]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _page(title: str, said: str, facts: dict, tables: list[Table], drawn: dict[str, str], folder: Path) -> str:
    kind = "warning" if said.startswith("WARNING") else "verdict"
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="{kind}"><b>{html.escape(said)}</b></p>', "<ul>"]
    parts += [f"<li>{_inline(name)}: {_inline(value)}</li>" for name, value in facts.items()]
    parts.append("</ul>")
    for name, caption in drawn.items():
        data = base64.b64encode((folder / name).read_bytes()).decode()
        text = html.escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{text}.</figcaption></figure>")
    for table in tables:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
        parts += [f"<h2>{html.escape(table.title)}</h2>", '<div class="wide"><table>', f"<tr>{head}</tr>"]
        parts += [_html_row(row, len(table.head)) for row in table.rows]
        parts.append("</table></div>")
        parts += [f'<p class="note">{_inline(note)}</p>' for note in table.notes]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """Of Markdown what our notes have: commands between backticks."""
    return re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text))


def _html_row(cells: list[str], width: int) -> str:
    out = [f"<td>{html.escape(cell)}</td>" for cell in cells]
    if len(cells) < width:  # a run that failed: why
        out[-1] = f'<td class="words" colspan="{width - len(cells) + 1}">{html.escape(cells[-1])}</td>'
    return f"<tr>{''.join(out)}</tr>"
