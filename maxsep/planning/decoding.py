"""A plan of inference: what prefill and decoding need and take on a cluster, by layout, batch and context."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxsep.config import Config, runs
from maxsep.config.cluster import Cluster
from maxsep.inference.speed import floor_bytes
from maxsep.measure import schedule
from maxsep.measure.report import columns
from maxsep.planning import compilation, planned, session, target
from maxsep.planning.kept import Kept
from maxsep.planning.prices import price
from maxsep.planning.rows import ROOFLINE, pool
from maxsep.planning.table import basis, giga, needed, not_priced, span

TOKENS = "a loop whose length depends on the data, in other"  # of decoding, as measure/schedule.py names it


@dataclass(frozen=True)
class Row:
    """A layout on a mesh with a batch of prompts of one length. Bytes are per device; of what did not compile None."""

    name: str  # as ma:4x4
    layout: str
    mesh: dict[str, int]
    batch: int
    context: int  # tokens of a prompt
    error: str | None = None
    fits: bool = False
    memory_bytes: dict[str, int] | None = None  # weights, cache, the rest, and their total at the peak
    memory_bytes_of_a_device: float | None = None  # that a device must have for it to fit
    ttft_seconds: list[float] | None = None  # to the first token of each prompt, from the fastest likely to the slowest
    tpot_seconds: list[float] | None = None  # per token after the first
    floor_seconds: float | None = None  # to read the weights and the cache that a token needs, by all devices at once
    tokens_per_second_per_device: list[float] | None = None  # of decoding
    exposed_share: float | None = None  # of a token's time: collectives with nothing beside them
    not_priced: dict[str, int] | None = None  # what is in no figure of a time, and how often it is there


def plan(
    configs: Sequence[Config],
    cluster: Cluster,
    sizes: Sequence[tuple[int, int]],
    new: int,
    cache: Path,
    jobs: int | None,
    say: Callable[[str], None],
) -> tuple[list[Row], Cluster]:
    """The rows, and the cluster with all its rates. `sizes`: of each batch its prompts, and tokens per prompt.

    The other arguments and errors are those of `planned.plan`; `new`: tokens per prompt.
    """
    versions, ids = target.versions(cluster), planned.tokenizer_size(configs[0])
    cudnn = target.cudnn(versions)
    asked = [(config, batch, context) for config in configs for batch, context in sizes]
    programs = [
        compilation.job(config, ids, cluster, cudnn, {"batch": batch, "context": context, "new": new})
        for config, batch, context in asked
    ]
    found = session.compile_all(programs, versions, Kept(cache), jobs or planned.at_a_time(), say)
    cluster = planned.rated(cluster, configs[0])
    rows = [_row(*of, new, facts, cluster) for of, facts in zip(asked, found, strict=True)]
    rows.sort(key=lambda row: (row.batch, row.context, row.error is not None, row.tpot_seconds or []))
    return rows, cluster


def _row(config: Config, batch: int, context: int, new: int, facts: dict[str, Any], cluster: Cluster) -> Row:
    row = Row(runs.name(config.layout, config.mesh), config.layout, config.mesh.sizes, batch, context)
    if "error" in facts:
        return dataclasses.replace(row, error=facts["error"])
    nodes, spread = facts["nodes"][facts["inner"]], cluster.spread or ROOFLINE
    prefill, decode = (schedule.from_json(facts[name]) for name in ("prefill", "schedule"))
    first, each = (price(program, cluster, nodes) for program in (prefill, decode))
    # A turn of the loop over tokens, which is the step that is priced.
    unknown = Counter(prefill.unknown) + Counter(decode.unknown) - Counter([TOKENS])
    total = facts["memory"]["total"]
    tpot = [each.step * factor for factor in spread]
    read = floor_bytes(config.model, batch, context + new / 2)
    return dataclasses.replace(
        row,
        fits=total <= pool(cluster) * cluster.memory_bytes,
        memory_bytes=facts["memory"],
        memory_bytes_of_a_device=total / pool(cluster),
        ttft_seconds=[first.step * factor for factor in spread],
        tpot_seconds=tpot,
        floor_seconds=read / cluster.memory_bandwidth / cluster.devices,
        tokens_per_second_per_device=[batch / seconds / cluster.devices for seconds in reversed(tpot)],
        exposed_share=each.exposed / each.step,
        not_priced=dict(unknown),
    )


def text(rows: Sequence[Row], cluster: Cluster) -> list[str]:
    """The lines of a table: of each batch and context the fastest layout first."""
    head = ("batch", "context", "layout:mesh", "GB", "weights", "cache", "fits", "TTFT ms", "TPOT ms", "floor ms")
    cells = []
    for row in rows:
        if row.error is not None:
            continue
        sizes = [giga(row.memory_bytes[kind]) for kind in ("total", "weights", "cache")]
        fits = "yes" if row.fits else f"no: {giga(row.memory_bytes_of_a_device)}"
        times = [span([1e3 * x for x in of]) for of in (row.ttft_seconds, row.tpot_seconds)]
        speed, exposed = span(row.tokens_per_second_per_device), f"{row.exposed_share:.0%}"
        floor_ms = f"{1e3 * row.floor_seconds:.3g}"
        cells.append((str(row.batch), str(row.context), row.name, *sizes, fits, *times, floor_ms, speed, exposed))
    lines = columns([(*head, "tokens/s per device", "exposed"), *cells]) if cells else []
    failed = [f"  {row.name}, batch {row.batch}, context {row.context}: {row.error}" for row in rows if row.error]
    return [
        *lines,
        "",
        *needed(cluster),
        "TTFT: prefill of all prompts. TPOT: a step of decoding, a token per prompt. floor: to read the weights and",
        "the cache that a step needs, by all devices at once. exposed: share of a step in collectives alone.",
        basis(cluster),
        "Steps of a few milliseconds take longer than that on GPUs: what launching a kernel takes is not counted.",
        *not_priced({name for row in rows for name in row.not_priced or ()}),
        *(["", "did not compile:", *failed] if failed else []),
    ]
