"""The rows of a plan: what each layout and mesh needs and takes on a cluster, and which is the best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from maxsep.config import Config, runs
from maxsep.config.cluster import Cluster
from maxsep.measure import schedule
from maxsep.planning.prices import Cost, UnknownRateError, price, rate

DEFAULT_POOL = 0.75  # of a GPU's memory: what JAX takes by itself
LARGER_POOL = 0.92  # what train.py lets it take (parallel/start.py), which leaves a GPU of 80 GB some 6 GB
REACHED = 0.65  # share of a roofline that machines reach, for the range: docs/plan.md, "Planned beside measured"
ROOFLINE = (1.0, 1 / REACHED)  # measured steps over a roofline's, where nobody has measured the cluster
ALIKE = 1e-3  # seconds of two orders of the devices that differ by less are the same
SPEEDS = ("step_seconds", "tokens_per_second_per_device", "mfu", "energy_joules_per_token")
SOURCE = {  # of the figures
    "compiled": ("memory_bytes", "flops", "communication_bytes", "link_bytes"),
    "roofline": ("link_seconds", "products_seconds", "memory_seconds", "exposed_seconds", *SPEEDS),
}
PARTS = {  # of a step: they add up to it
    "products": "products_seconds",
    "memory-bound work": "memory_seconds",
    "exposed communication": "exposed_seconds",
}


@dataclass(frozen=True)
class Row:
    """A layout on a mesh. Bytes, FLOPs and seconds are of one device and step; of what did not compile all are None."""

    name: str  # as ma:4x4
    layout: str
    mesh: dict[str, int]
    error: str | None = None  # why it did not compile
    inner: str | None = None  # mesh axis of neighbouring devices
    flags: list[str] | None = None  # of train.py, for this row
    fits: bool = False  # in the larger pool
    memory_fits_default_pool: bool = False
    memory_bytes: dict[str, int] | None = None  # at the peak, by kind (measure/buffers.py), and their total
    memory_bytes_of_a_device: float | None = None  # that a device must have for it to fit
    flops: float | None = None  # of matrix products
    model_flops: float | None = None  # of those that the model needs
    bubble: float | None = None  # share of a pipeline's time in which a stage waits
    communication_bytes: dict[str, float] | None = None  # operands of collectives, by role
    collectives: list[dict] | None = None  # by role, kind and whether they are started ahead: prices.Sent
    link_bytes: dict[str, float] | None = None  # that go over links inside a node, and between nodes
    link_seconds: dict[str, float] | None = None  # what they take there, whatever runs beside them
    products_seconds: float | None = None  # at the device's peak
    memory_seconds: float | None = None  # for the bytes that kernels wait for beyond their products
    exposed_seconds: float | None = None  # of collectives, with nothing beside them
    step_seconds: float | None = None
    tokens_per_second_per_device: float | None = None
    mfu: float | None = None
    energy_joules_per_token: float | None = None  # at the devices' power limit
    ranges: dict[str, list[float]] | None = None  # of the last four: at the fastest likely step, and at the slowest
    not_priced: dict[str, int] | None = None  # what is in no figure of time and FLOPs, and how often it is there
    attention_kernel: str | None = None
    compile_cpu_seconds: float | None = None


def of(configs: Sequence[Config], found: Sequence[dict[str, Any]], cluster: Cluster) -> list[Row]:
    """A row for each config, and one more where another order of the devices (`mesh.inner`) takes another time.

    Sorted: what fits first, the fastest first; what did not compile last.

    Args:
        configs: with layout and mesh.
        found: what `compilation.compiled` has found of each, or an `error`.
        cluster: with all its rates.
    """
    rows = [row for config, facts in zip(configs, found, strict=True) for row in _orders(config, facts, cluster)]
    return sorted(rows, key=lambda row: (row.error is not None, not row.fits, row.step_seconds or 0))


def _orders(config: Config, facts: dict[str, Any], cluster: Cluster) -> list[Row]:
    row = Row(runs.name(config.layout, config.mesh), config.layout, config.mesh.sizes)
    if "error" in facts:
        return [replace(row, error=facts["error"])]
    program = schedule.from_json(facts["schedule"])
    own, other = facts["inner"], {"attention": "expert", "expert": "attention"}[facts["inner"]]
    try:
        costs = {inner: price(program, cluster, facts["nodes"][inner]) for inner in (own, other)}
    except UnknownRateError as e:
        return [replace(row, error=f"compiled, but {e}")]
    if config.mesh.inner != "auto" or abs(costs[other].step / costs[own].step - 1) < ALIKE:
        del costs[other]
    return [_filled(replace(row, inner=inner), config, facts, program, cost, cluster) for inner, cost in costs.items()]


def _filled(
    row: Row, config: Config, facts: dict[str, Any], program: schedule.Schedule, cost: Cost, cluster: Cluster
) -> Row:
    total, chosen = facts["memory"]["total"], config.mesh.inner != "auto" or row.inner != facts["inner"]
    default, larger = DEFAULT_POOL if cluster.gpu else 1, pool(cluster)
    roles: Counter[str] = Counter()
    for (role, _, _), sent in cost.sent.items():
        roles[role] += sent.operand_bytes
    least, most = cluster.spread or ROOFLINE
    speeds, *ends = (
        _speeds(step, facts, config.model.products, cluster)
        for step in (cost.step, cost.step * least, cost.step * most)
    )
    links = ("inside", "between")
    return replace(
        row,
        flags=[*runs.flags(config.layout, config.mesh), *([f"--config.mesh.inner={row.inner}"] if chosen else [])],
        fits=total <= larger * cluster.memory_bytes,
        memory_fits_default_pool=total <= default * cluster.memory_bytes,
        memory_bytes=facts["memory"],
        memory_bytes_of_a_device=total / larger,
        flops=program.flops().total(),
        model_flops=facts["model_flops"] / cluster.devices,
        bubble=facts["bubble"],
        communication_bytes=dict(roles),
        collectives=[
            {"role": role, "kind": kind, "ahead": ahead} | vars(sent) for (role, kind, ahead), sent in cost.sent.items()
        ],
        link_bytes={link: cost.total(f"{link}_bytes") for link in links},
        link_seconds={link: cost.total(f"{link}_seconds") for link in links},
        products_seconds=cost.products,
        memory_seconds=cost.memory,
        exposed_seconds=cost.exposed,
        **speeds,
        ranges={name: [end[name] for end in ends] for name in SPEEDS},
        not_priced=program.unknown,
        attention_kernel=facts["kernel"],
        compile_cpu_seconds=facts["cpu_seconds"],
    )


def pool(cluster: Cluster) -> float:
    """The share of a device's memory that a program may have."""
    return LARGER_POOL if cluster.gpu else 1


def _speeds(step: float, facts: dict[str, Any], products: str, cluster: Cluster) -> dict[str, float | None]:
    """`SPEEDS` of a step that takes so many seconds; None where the cluster lacks a rate or its power."""
    speed = facts["tokens"] / step / cluster.devices
    try:
        peak = rate(cluster, {"bfloat16": "bf16", "tf32": "f32", "float32": "f32 highest", "float64": "f64"}[products])
        mfu = facts["model_flops"] / cluster.devices / step / peak
    except UnknownRateError:
        mfu = None
    energy = None if cluster.watts is None else cluster.watts / speed
    return dict(zip(SPEEDS, (step, speed, mfu, energy), strict=True))


def best(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """The best row and why it is, in one sentence; None: nothing fits.

    Args:
        rows: sorted, as `of` gives them.
    """
    compiled = [row for row in rows if row.error is None]
    fitting = [row for row in compiled if row.fits]
    if not compiled:
        return None, "No layout compiled."
    if not fitting:
        least = min(compiled, key=lambda row: row.memory_bytes_of_a_device)
        need = f"devices of {least.memory_bytes_of_a_device / 1e9:.1f} GB"
        return None, f"Nothing fits: {least.name} comes closest, and takes {need}."
    first = fitting[0]
    second = next((row for row in fitting if row.name != first.name), None)
    if second is None:
        alone = len({row.name for row in rows}) == 1
        return first, f"{first.name} " + ("fits." if alone else "is the only one that fits.")
    gained = {part: getattr(second, name) - getattr(first, name) for part, name in PARTS.items()}
    part = max(gained, key=gained.get)
    ours, theirs = (getattr(row, PARTS[part]) for row in (first, second))
    faster = f"{first.name} is {second.step_seconds / first.step_seconds - 1:.1%} faster than {second.name}"
    return first, f"{faster}, the next that fits: {ours:.3g} s of {part} in a step, not {theirs:.3g} s."


def largest_part(row: Row) -> str:
    """The part that takes most of a step, and its share."""
    part = max(PARTS, key=lambda part: getattr(row, PARTS[part]))
    return f"{part} {getattr(row, PARTS[part]) / row.step_seconds:.0%}"
