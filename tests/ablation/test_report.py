"""The report: what it shows of results, and that each file stands for itself."""

import json
import re

import pytest
from results import result

from maxsep.ablation import report

NAMES = ("tp:8x2", "pp:2x1x8", "tp_pp:2x8x1", "ma:4x4", "zero:4x4")
FACTS = {"command": "`python -m maxsep.ablate`"}


def written(folder, results, failed=None, draw=False):
    report.write(folder, "Ablation: <tiny>", FACTS, results, failed or {}, draw)
    return tuple((folder / f"ablation.{kind}").read_text(encoding="utf-8") for kind in ("md", "html", "json"))


def table(markdown: str, title: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    lines = markdown.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def test_the_studys_tables_have_its_metrics(tmp_path):
    decoded = [
        {"shape": {"context": n}, "tpot_seconds": {"p50": n / 1e4}, "floor_share": 0.1} for n in (16, 32, 64, 128)
    ]
    planned = {"tp:8x2": 2.5, "tp_pp:2x8x1": 2.0, "ma:4x4": 1.6}
    results = [result(name, decode=decoded, planned_seconds=planned.get(name)) for name in NAMES]
    results[3]["tokens_per_second"] = 1500.0
    results[3]["decode"] = [one | {"tpot_seconds": {"p50": one["tpot_seconds"]["p50"] / 2}} for one in decoded]
    markdown, _, data = written(tmp_path, results)
    performance = table(markdown, "The study's table: performance")
    assert performance["metric"] == [
        "TP (tp:8x2)", "PP (pp:2x1x8)", "TP, PP (tp_pp:2x8x1)", "MA (ma:4x4)", "MA against TP, PP"
    ]  # fmt: skip
    assert performance["TPOT, ms/token"] == ["6.40", "6.40", "6.40", "3.20", "-50.0%"]
    assert performance["throughput, tokens/s"] == ["1,000", "1,000", "1,000", "1,500", "+50.0%"]
    assert table(markdown, "The study's table: TPOT by length, ms")["128"] == ["12.80"] * 3 + ["6.40", "+50.0%"]
    shares = table(markdown, "The study's table: communication, share of a step")
    assert shares["attention all-reduce"] == ["25.0%"] * 4 and shares["total"] == ["25.0%"] * 4
    memory = table(markdown, "The study's table: memory per device, MB")
    assert (memory["weights"], memory["total"]) == (["4"] * 4, ["20"] * 4)
    assert table(markdown, "Matrix products")["zero:4x4"] == ["3", "2", "1.50"]
    lists = table(markdown, "The study's lists: scaling, load, quality, energy")
    assert lists["predicted speed-up over TP, PP"] == ["0.80", "not measured here", "1.00", "1.25"]
    assert lists["energy per token, mJ"] == ["not measured here"] * 4 and "nvidia-smi" in markdown
    assert lists["least and most used expert"] == ["20.00%, 60.00%"] * 4
    assert json.loads(data)["agreement"]["apart"] == []


def test_what_was_not_measured_says_so_with_the_command(tmp_path):
    unknown = dict.fromkeys(("sent", "flops", "memory", "parts", "decode", "mfu"))
    markdown, _, _ = written(tmp_path, [result(name, device_kind="NVIDIA", **unknown) for name in NAMES])
    assert table(markdown, "The study's table: performance")["TPOT, ms/token"][:4] == ["not measured here"] * 4
    assert "the same command with `--decode` measures decoding" in markdown
    assert table(markdown, "The study's table: memory per device, MB")["total"] == ["not measured here"] * 4
    assert table(markdown, "Runs")["ma:4x4"][-2] == "unknown"
    assert "simulated" not in markdown


def test_a_failed_run_is_a_row_that_says_why(tmp_path):
    markdown, page, data = written(tmp_path, [result(), result("tp:8x2")], {"ma:8x2": "mesh: <too> | many"})
    assert "| ma:8x2 | failed: mesh: <too> \\| many |" in markdown
    assert "failed: mesh: &lt;too&gt; | many</td>" in page
    assert json.loads(data)["failed"] == {"ma:8x2": "mesh: <too> | many"}


def test_a_fault_is_a_warning_on_the_page(tmp_path):
    results = [result(name) for name in NAMES]
    results[1]["losses"][2] += 1e-6
    markdown, page, _ = written(tmp_path, results)
    assert markdown.splitlines()[2].startswith("**WARNING: losses are not the same: pp:2x1x8 above")
    assert '<p class="warning">' in page


def test_nothing_that_ended_is_a_report_too(tmp_path):
    markdown, _, data = written(tmp_path, [], {"ma:4x4": "no"})
    assert "there is nothing to compare" in markdown and json.loads(data)["agreement"] is None


def test_the_page_needs_no_other_file(tmp_path):
    pytest.importorskip("matplotlib")
    results = [result(name) for name in NAMES]
    results[2]["losses"][1] = None
    _, page, _ = written(tmp_path, results, draw=True)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["communication.png", "drops.png", "load.png", "losses.png", "memory.png", "time.png"]
    sources = re.findall(r'(?:src|href)="(.{0,40})', page)
    assert len(sources) == len(pictures) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and "&lt;tiny&gt;" in page
