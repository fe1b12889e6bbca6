"""The rows of a plan: what each layout and mesh needs and takes on a cluster, and which is the best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from maxsep.config import Config, runs
from maxsep.config.cluster import Cluster
from maxsep.measure import schedule
from maxsep.planning.prices import Cost, UnknownRateError, price

DEFAULT_POOL = 0.75  # of a GPU's memory: what JAX takes
LARGER_POOL = 0.92  # with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, which leaves a GPU of 80 GB some 6 GB
REACHED = 0.7  # share of a roofline's speed that machines reach: docs/plan.md, "Planned and measured"
ALIKE = 1e-3  # seconds of two orders of the devices that differ by less are the same
SPEEDS = ("step_seconds", "tokens_per_second_per_device", "mfu", "energy_joules_per_token")
SOURCE = {  # of the figures
    "compiled": ("memory_bytes", "flops", "communication_bytes", "link_bytes"),
    "roofline": ("link_seconds", "products_seconds", "memory_seconds", "exposed_seconds", *SPEEDS),
}


def of(configs: Sequence[Config], found: Sequence[dict[str, Any]], cluster: Cluster) -> list[dict[str, Any]]:
    """A row for each config, and one more where another order of the devices (`mesh.inner`) takes another time.

    Sorted: what fits first, the fastest first; what did not compile last.

    Args:
        configs: with layout and mesh.
        found: what `compilation.compiled` has found of each, or an `error`.
        cluster: with all its rates.
    """
    rows = [row for config, facts in zip(configs, found, strict=True) for row in _orders(config, facts, cluster)]
    return sorted(rows, key=lambda row: (row["error"] is not None, not row["fits"], row["step_seconds"] or 0))


def _orders(config: Config, facts: dict[str, Any], cluster: Cluster) -> list[dict[str, Any]]:
    named = {"layout": config.layout, "mesh": config.mesh.sizes, "name": runs.name(config.layout, config.mesh)}
    if "error" in facts:
        return [named | dict.fromkeys(FIGURES) | {"fits": False, "error": facts["error"]}]
    program = schedule.from_json(facts["schedule"])
    other = {"attention": "expert", "expert": "attention"}[facts["inner"]]
    try:
        costs = {inner: price(program, cluster, facts["nodes"][inner]) for inner in (facts["inner"], other)}
    except UnknownRateError as e:
        return [named | dict.fromkeys(FIGURES) | {"fits": False, "error": str(e)}]
    if config.mesh.inner != "auto" or abs(costs[other].step / costs[facts["inner"]].step - 1) < ALIKE:
        del costs[other]
    out = []
    for inner, cost in costs.items():
        chosen = config if inner == facts["inner"] else replace(config, mesh=replace(config.mesh, inner=inner))
        own = [] if chosen.mesh.inner == "auto" else [f"--config.mesh.inner={inner}"]
        flags = [*runs.flags(config.layout, config.mesh), *own]
        figures = _figures(config, facts, cluster, program, cost)
        out.append(named | {"inner": inner, "flags": flags} | figures | {"error": None})
    return out


FIGURES = (
    "inner",
    "flags",
    "memory_bytes",
    "memory_fits_default_pool",
    "flops",
    "model_flops",
    "bubble",
    "communication_bytes",
    "collectives",
    "link_bytes",
    "link_seconds",
    "products_seconds",
    "memory_seconds",
    "exposed_seconds",
    *SPEEDS,
    "ranges",
    "not_priced",
    "attention_kernel",
    "compile_cpu_seconds",
)


def _figures(
    config: Config, facts: dict[str, Any], cluster: Cluster, program: schedule.Schedule, cost: Cost
) -> dict[str, Any]:
    total, room = facts["memory"]["total"], cluster.memory_bytes
    pools = (DEFAULT_POOL, LARGER_POOL) if cluster.gpu else (1, 1)
    peak = cluster.flops.get({"float32": "tf32"}.get(config.model.dtype, config.model.dtype))
    peak = peak or cluster.flops.get(config.model.dtype)
    roles: Counter[str] = Counter()
    for (role, _, _), sent in cost.sent.items():
        roles[role] += sent.operand_bytes

    def speeds(step: float) -> dict[str, float | None]:
        speed = facts["tokens"] / step / cluster.devices
        mfu = None if peak is None else facts["model_flops"] / cluster.devices / step / peak
        energy = None if cluster.watts is None else cluster.watts / speed
        return dict(zip(SPEEDS, (step, speed, mfu, energy), strict=True))

    best, worst = speeds(cost.step), speeds(cost.step / REACHED)
    return {
        "fits": total <= pools[1] * room,
        "memory_bytes": facts["memory"],
        "memory_fits_default_pool": total <= pools[0] * room,
        "flops": program.flops().total(),
        "model_flops": facts["model_flops"] / cluster.devices,
        "bubble": facts["bubble"],
        "communication_bytes": dict(roles),
        "collectives": [
            {"role": role, "kind": kind, "asynchronous": ahead, **vars(sent)}
            for (role, kind, ahead), sent in cost.sent.items()
        ],
        "link_bytes": {link: cost.total(f"{link}_bytes") for link in ("inside", "between")},
        "link_seconds": {link: cost.total(f"{link}_seconds") for link in ("inside", "between")},
        "products_seconds": cost.products,
        "memory_seconds": cost.memory,
        "exposed_seconds": cost.exposed,
        **best,
        "ranges": {name: [best[name], worst[name]] for name in best},
        "not_priced": program.unknown,
        "attention_kernel": facts["kernel"],
        "compile_cpu_seconds": facts["cpu_seconds"],
    }


def best(rows: Sequence[dict[str, Any]], cluster: Cluster) -> tuple[str | None, str]:
    """The name of the best row, the first, and why it is in one sentence; None: nothing fits."""
    good = [row for row in rows if row["error"] is None]
    fitting = [row for row in good if row["fits"]]
    if not good:
        return None, "No layout compiled."
    if not fitting:
        least = min(good, key=lambda row: row["memory_bytes"]["total"])
        room = (LARGER_POOL if cluster.gpu else 1) * cluster.memory_bytes
        need = f"{least['memory_bytes']['total'] / 1e9:.1f} GB of the {room / 1e9:.1f} GB that a device has for it"
        return None, f"Nothing fits: {least['name']} comes closest and needs {need}."
    first = fitting[0]
    others = [row for row in fitting if row["name"] != first["name"]]
    if not others:
        return first["name"], f"{first['name']} is the only one that fits."
    second = others[0]
    parts = {name: second[f"{key}_seconds"] - first[f"{key}_seconds"] for name, key in PARTS.items()}
    part = max(parts, key=parts.get)
    ours, theirs = (row[f"{PARTS[part]}_seconds"] for row in (first, second))
    gain = second["step_seconds"] / first["step_seconds"] - 1
    why = f"{ours:.3g} s of {part} in a step, not {theirs:.3g} s"
    return first["name"], f"{first['name']} is {gain:.1%} faster than {second['name']}, the next that fits: {why}."


PARTS = {"products": "products", "memory-bound work": "memory", "exposed communication": "exposed"}


def limit(row: dict[str, Any]) -> str:
    """The part that takes most of a step, and its share."""
    part = max(PARTS, key=lambda part: row[f"{PARTS[part]}_seconds"])
    return f"{part} {row[f'{PARTS[part]}_seconds'] / row['step_seconds']:.0%} of the step"
