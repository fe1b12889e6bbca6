"""The tables of an ablation's report, as data: each figure as it is shown, measured here or said not to be."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev

from maxsep.ablation.compare import efficiency
from maxsep.ablation.trial import columns
from maxsep.measure import plots

NOT_HERE = "not measured here"
TO_DECODE = "the same command with `--decode` measures decoding."
TO_SCALE = "`python -m maxsep.ablate --runs=ma:1x1,ma:2x2,ma:4x4`, with the same config and another `--workdir`."
ROLES = ("attention", "dispatch", "embedding, head", "stages", "gradients", "parameters", "statistics")


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def sent(result: dict, wire: bool = False) -> dict[str, float]:
    """Bytes a device and step by role, in the order of `ROLES`."""
    out = Counter()
    for one in result["sent"] or ():
        out[one["role"]] += one["wire_bytes" if wire else "operand_bytes"]
    return {role: out[role] for role in ROLES}


def memory(result: dict) -> dict[str, int]:
    """Bytes a device at the peak by the kinds of `plots.MEMORY`."""
    return plots.memory(result["memory"] or {})


def shares(result: dict) -> dict[str, float]:
    """Share of a step's time that devices spend in collectives, by role."""
    parts = result["parts"] or {}
    return {role: parts.get(f"communication: {role}", 0) for role in ROLES}


def all_tables(results: list[dict], failed: dict[str, str], simulated: bool) -> list[Table]:
    """Every table of the report.

    Args:
        results: of runs that ended well.
        failed: why, of those that did not, by name.
        simulated: devices share this machine's cores.
    """
    tables = [_runs(results, failed, simulated)]
    if not results:
        return tables
    tables += [_sent(results, wire) for wire in (False, True)] + [_memory(results), _products(results)]
    study = columns([result["name"] for result in results])
    chosen = {label: next(r for r in results if r["name"] == name) for label, name in study.items()}
    if chosen:
        tables += [
            _performance(chosen),
            _communication(chosen),
            _study_memory(chosen),
            _lengths(chosen),
            _lists(chosen, results),
        ]
    return tables


def _runs(results: list[dict], failed: dict[str, str], simulated: bool) -> Table:
    scaling = efficiency(results)
    head = ["run", "devices", "loss", "held-out", "s per step", "p10–p90", "tokens/s", "per device", "MFU", "dropped"]
    rows = []
    for result in results:
        step = result["step_seconds"]
        row = [result["name"], str(result["devices"]), f"{result['losses'][-1] or float('nan'):.6f}"]
        row += [f"{result['eval_loss'] or float('nan'):.6f}", f"{step['median']:.4g}"]
        row += [f"{step['p10']:.4g}–{step['p90']:.4g}", f"{result['tokens_per_second']:,.0f}"]
        row += [f"{result['tokens_per_second_per_device']:,.1f}", _percent(result["mfu"])]
        row += [_percent(result["dropped"][-1])]
        rows.append(row + ([f"{scaling[result['name']]:.1%}"] if scaling else []))
    if scaling:
        head.append("scaling efficiency")
    rows += [[name, f"failed: {why}"] for name, why in failed.items()]
    notes = ["Losses in nats per token, of the last step's batch and of the held-out text."]
    if simulated:
        notes.append("Devices are simulated: they share this machine's cores. Times say nothing about accelerators.")
        if scaling:
            notes.append("Nor does scaling efficiency: more simulated devices share the same cores.")
    if scaling:
        notes.append(
            "Scaling efficiency: tokens/s per device over those of the same layout on 4 devices (or its fewest)."
        )
    return Table("Runs", head, rows, notes)


def _sent(results: list[dict], wire: bool) -> Table:
    roles = [role for role in ROLES if any(sent(result)[role] for result in results)]

    def cells(result: dict) -> list[str]:
        of = sent(result, wire)
        return [*(_mega(of[role]) for role in roles), _mega(sum(of.values()))]

    rows = _known(results, "sent", cells, "the compiler did not tell")
    what = "on the wire" if wire else "given to collectives"
    note = "Counted in the compiled program, loops as often as they run; formulas: docs/layouts.md."
    if wire:
        note = (
            "The least that n devices can send, in operands: n − 1 to gather, (n − 1)/n to scatter or for all-to-all, "
            "twice that in an all-reduce, 1 between stages."
        )
    return Table(f"Communication: MB {what}, a device and step", ["run", *roles, "total"], rows, [note])


def _memory(results: list[dict]) -> Table:
    def cells(result: dict) -> list[str]:
        of = memory(result)
        return [*map(_mega, of.values()), _mega(sum(of.values()))]

    rows = _known(results, "memory", cells, "the compiler did not tell")
    notes = [
        "Weights and optimizer state from the arrays; all else is what the compiler's plan has live at the peak.",
        "All else: batch, results, constants, the optimizer's work, gaps.",
    ]
    return Table("Memory: MB per device at the peak", ["run", *plots.MEMORY.values(), "total"], rows, notes)


def _products(results: list[dict]) -> Table:
    def cells(result: dict) -> list[str]:
        done, needed = result["flops"], result["model_flops"]
        return [f"{done / 1e9:,.3g}", f"{needed / 1e9:,.3g}", f"{done / needed:.2f}"]

    rows = _known(results, "flops", cells, "depends on the data, or lies in libraries")
    head = ["run", "in the program", "needed by the model", "ratio"]
    note = (
        "What the program computes beyond the model's need: keys after a query, empty places of experts, recomputation."
    )
    return Table("Matrix products: GFLOP per device and step", head, rows, [note])


def _known(results: list[dict], key: str, cells: Callable[[dict], list[str]], unknown: str) -> list[list[str]]:
    """A row a run: the cells of its figure, or why there is none."""
    return [[result["name"], *([unknown] if result[key] is None else cells(result))] for result in results]


def _study_head(chosen: dict[str, dict]) -> list[str]:
    return [f"{label} ({result['name']})" for label, result in chosen.items()]


def _performance(chosen: dict[str, dict]) -> Table:
    def tpot(result: dict) -> float | None:
        return _of_context(result, result["config"]["data"]["sequence_length"])

    def bandwidth(result: dict) -> float | None:
        length = result["config"]["data"]["sequence_length"]
        found = [one for one in result["decode"] or () if one["shape"]["context"] == length]
        return found[0]["floor_share"] * 100 if found else None

    metrics = {
        "TPOT, ms/token": (lambda r: None if tpot(r) is None else tpot(r) * 1e3, ".2f"),
        "TPS, tokens/s per device": (lambda r: r["tokens_per_second_per_device"], ",.1f"),
        "throughput, tokens/s": (lambda r: r["tokens_per_second"], ",.0f"),
        "MFU, %": (lambda r: None if r["mfu"] is None else r["mfu"] * 100, ".1f"),
        "memory bandwidth used in decoding, %": (bandwidth, ".1f"),
    }
    compared = "TP, PP" in chosen and "MA" in chosen
    rows, missing = [], []
    for name, (of, form) in metrics.items():
        values = [of(result) for result in chosen.values()]
        row = [name, *(NOT_HERE if value is None else format(value, form) for value in values)]
        if compared:
            base, own = of(chosen["TP, PP"]), of(chosen["MA"])
            row.append("" if not base or own is None else f"{own / base - 1:+.1%}")
        rows.append(row)
        missing += [name] if None in values else []
    head = ["metric", *_study_head(chosen)] + (["MA against TP, PP"] if compared else [])
    notes = [
        "The study's GPU utilisation is given as MFU (docs/metrics.md); its memory efficiency as the share of the "
        "memory's measured speed at which a token's weights and cache are read."
    ]
    if missing:
        notes.append(f"{', '.join(missing)}: {TO_DECODE}")
    return Table("The study's table: performance", head, rows, notes)


def _communication(chosen: dict[str, dict]) -> Table:
    names = {
        "attention": "attention all-reduce",
        "dispatch": "MoE all-to-all",
        "gradients": "gradient synchronisation",
        "parameters": "parameter broadcast",
        "embedding, head": "embedding, head",
        "stages": "between stages",
        "statistics": "statistics",
    }
    known = [result["parts"] is not None for result in chosen.values()]
    rows = [
        [name, *(f"{shares(r)[role]:.1%}" if k else NOT_HERE for r, k in zip(chosen.values(), known, strict=True))]
        for role, name in names.items()
    ]
    rows.append(["total", *(f"{sum(shares(r).values()):.1%}" if r["parts"] else NOT_HERE for r in chosen.values())])
    notes = ["Share of all threads' time in a profile of two steps, waiting for other devices included."]
    if not all(known):
        notes.append("Without a share: the profile of train.profile, in the run's folder, opens in xprof or Perfetto.")
    return Table("The study's table: communication, share of a step", ["kind", *_study_head(chosen)], rows, notes)


def _study_memory(chosen: dict[str, dict]) -> Table:
    found = [memory(result) if result["memory"] else None for result in chosen.values()]
    rows = [
        [name, *(NOT_HERE if of is None else _mega(of[kind]) for of in found)] for kind, name in plots.MEMORY.items()
    ]
    rows.append(["total", *(NOT_HERE if of is None else _mega(sum(of.values())) for of in found)])
    return Table("The study's table: memory per device, MB", ["kind", *_study_head(chosen)], rows, [])


def _lengths(chosen: dict[str, dict]) -> Table:
    own = next(iter(chosen.values()))["config"]["data"]["sequence_length"]
    lengths = contexts(own)
    compared = "TP" in chosen and "MA" in chosen
    rows = []
    for length in lengths:
        values = [_of_context(result, length) for result in chosen.values()]
        row = [str(length), *(NOT_HERE if value is None else f"{value * 1e3:.2f}" for value in values)]
        if compared:
            base, ours = _of_context(chosen["TP"], length), _of_context(chosen["MA"], length)
            row.append("" if not base or ours is None else f"{1 - ours / base:+.1%}")
        rows.append(row)
    head = ["tokens of context", *_study_head(chosen)] + (["gain of MA over TP"] if compared else [])
    notes = ["The study's lengths are a quarter, a half, once and twice that of training; so are these."]
    if any(NOT_HERE in row for row in rows):
        notes.append(TO_DECODE)
    return Table("The study's table: TPOT by length, ms", head, rows, notes)


def _lists(chosen: dict[str, dict], results: list[dict]) -> Table:
    scaling = efficiency(results)

    def extremes(result: dict) -> str:
        shares = [share for layer in result["expert_shares"] for share in layer]
        return f"{min(shares):.2%}, {max(shares):.2%}"

    base = chosen.get("TP, PP", {}).get("planned_seconds")

    def planned(result: dict) -> str:
        return f"{base / own:.2f}" if (own := result.get("planned_seconds")) and base else NOT_HERE

    metrics = {
        "scaling efficiency": lambda r: f"{scaling[r['name']]:.1%}" if scaling else NOT_HERE,
        "standard deviation of experts' shares": lambda r: f"{fmean(map(pstdev, r['expert_shares'])):.4f}",
        "least and most used expert": extremes,
        "load-balancing loss": lambda r: f"{r['load_balancing_loss']:.4f}",
        "experts used": lambda r: f"{r['experts_used']:.1%}",
        "held-out perplexity": lambda r: f"{r['eval_perplexity'] or float('nan'):.2f}",
        "steps to the last loss": lambda r: str(r["steps"][-1]),
        "seconds to the last loss": lambda r: f"{r['step_seconds']['median'] * r['steps'][-1]:.1f}",
        "predicted speed-up over TP, PP": planned,
        "energy per token, mJ": lambda r: NOT_HERE,
        "power usage effectiveness; CO2 per token": lambda r: NOT_HERE,
    }
    rows = [[name, *(of(result) for result in chosen.values())] for name, of in metrics.items()]
    notes = [
        "Shares of the choices in the last step, before drops; a layout does not change them, nor the steps to a loss.",
        "Energy: on NVIDIA GPUs, power in W beside the run, over tokens/s: "
        "`nvidia-smi --query-gpu=power.draw --format=csv,noheader --loop-ms=200`. "
        "Power usage effectiveness and CO2 are the data centre's.",
    ]
    if base is None:
        how = "`python -m maxsep.plan --json=plan.json` for a cluster, with the same config; `--plan=plan.json` here"
        notes.append(f"Predicted speed-up: {how}, and a run of `tp_pp`.")
    if not scaling:
        notes.append(f"Scaling efficiency: {TO_SCALE}")
    return Table("The study's lists: scaling, load, quality, energy", ["metric", *_study_head(chosen)], rows, notes)


def contexts(sequence_length: int) -> list[int]:
    """The lengths at which decoding is measured."""
    return sorted({max(1, sequence_length // 4), max(1, sequence_length // 2), sequence_length, 2 * sequence_length})


def _of_context(result: dict, length: int) -> float | None:
    found = [one for one in result["decode"] or () if one["shape"]["context"] == length]
    return found[0]["tpot_seconds"]["p50"] if found else None


def _mega(count: float) -> str:
    return f"{count / 1e6:,.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
