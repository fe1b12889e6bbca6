"""A cluster's rates as this machine reaches them, for `plan --measure`.

Two fits, both of relative errors. Of collectives in a node: seconds = messages × latency + bytes / rate. Of
steps: the shares of the rates that programs reach, which the plan's step then has in place of the rates themselves.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxsep.cluster import child
from maxsep.cluster.signals import Stop
from maxsep.config import Config, ConfigError, cli
from maxsep.config.cluster import RATES, Cluster
from maxsep.measure.schedule import Schedule
from maxsep.planning.links import load
from maxsep.planning.prices import price

PRIOR = 0.1  # weight of a share's logarithm beside a row's: few rows cannot tell the parts of a step apart


def environment(cluster: Cluster) -> dict[str, str]:
    """That of a child that runs on the cluster's devices."""
    return dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if cluster.simulated else {})


def run(command: Sequence[str], log: Path, cluster: Cluster, what: str) -> None:
    """Runs a child of ours on the devices.

    Raises:
        ConfigError: it refuses what it was asked for.
        cli.Exit: a signal has stopped it, or it has failed.
    """
    with Stop() as stop:
        status = child.run(command, log, environment(cluster), stop, shown=False)
    if stop.asked:
        raise cli.Exit(cli.STOPPED, f"{stop.asked}: stopped while measuring; what is compiled is kept")
    if status == cli.USER_ERROR:
        raise ConfigError(child.why(log, status).removesuffix(f" (status {status})"))
    if status:
        raise cli.Exit(cli.CRASHED, f"{what}: {child.why(log, status)}")


def rated(config: Config, cluster: Cluster, folder: Path) -> Cluster:
    """The cluster, of one node, with what its devices reach at their best: as rates of CPUs, as shares of a GPU's.

    Raises:
        ConfigError: this machine has other devices.
    """
    named, out = folder / "rates.job", folder / "rates.out"
    named.write_text(json.dumps({"config": dataclasses.asdict(config), "devices": cluster.devices}), encoding="utf-8")
    run(["-m", "maxsep.planning.rates", str(named), str(out)], folder / "rates.log", cluster, "measuring rates")
    found = json.loads(out.read_text(encoding="utf-8"))
    if cluster.gpu is not None and cluster.gpu.name != found["kind"]:
        raise ConfigError(f"--measure: got devices of {found['kind']}; takes those of --cluster, {cluster.gpu.name}")
    latency, link = _links(found["collectives"])
    if cluster.gpu is None:
        rates = {"memory_bandwidth": found["memory_bandwidth"], "inside": link, "between": link}
        return dataclasses.replace(cluster, flops=found["flops"], latency=latency, **rates)
    reached = {
        "products": min(rate / cluster.flops[kind] for kind, rate in found["flops"].items()),
        "memory": found["memory_bandwidth"] / cluster.memory_bandwidth,
        "links": link / cluster.inside if link else 1.0,
    }
    return dataclasses.replace(cluster, latency=latency, reached=reached)


def _links(collectives: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Seconds of a message beside its bytes, and bytes/s of a device, in one node; without any: 0 and None."""
    from scipy.optimize import nnls

    if not collectives:
        return 0.0, None
    count = 1 + max(place for one in collectives for group in one["groups"] for place in group)
    loads = [load(one["kind"], one["bytes"], one["groups"], [0] * count) for one in collectives]
    seconds = np.array([one["seconds"] for one in collectives])
    parts = np.array([[one.hops, one.inside] for one in loads]) / seconds[:, None]
    (latency, of_a_byte), _ = nnls(parts, np.ones(len(loads)))
    return float(latency), float(1 / of_a_byte) if of_a_byte else None


def fitted(programs: Sequence[tuple[Schedule, Sequence[int]]], seconds: Sequence[float], cluster: Cluster) -> Cluster:
    """The cluster with the shares of its rates with which its steps come closest to those measured, and their spread.

    Args:
        programs: of each row the schedule, and the node of each partition.
        seconds: of each row's step, measured.
        cluster: with all its rates.
    """
    from scipy.optimize import least_squares

    start = dict.fromkeys(RATES, 1.0) | (cluster.reached or {})

    def steps(logs) -> np.ndarray:
        shares = {part: share * np.exp(log) for (part, share), log in zip(start.items(), logs[1:], strict=True)}
        one = dataclasses.replace(cluster, reached=shares, latency=cluster.latency * np.exp(logs[0]))
        return np.array([price(schedule, one, nodes).step for schedule, nodes in programs])

    def misses(logs) -> np.ndarray:
        return np.concatenate([np.log(steps(logs) / np.array(seconds)), PRIOR * logs])

    logs = least_squares(misses, np.zeros(1 + len(start)), diff_step=0.01).x
    reached = {part: float(share * np.exp(log)) for (part, share), log in zip(start.items(), logs[1:], strict=True)}
    over = np.array(seconds) / steps(logs)
    spread = (float(min(over.min(), 1.0)), float(max(over.max(), 1.0)))
    return dataclasses.replace(
        cluster, reached=reached, latency=float(cluster.latency * np.exp(logs[0])), spread=spread
    )


def source(cluster: Cluster, said: str) -> str:
    """A cluster file, for `--cluster=FILE:NODESxDEVICES`; `said` tells where it comes from."""
    values = {f.name: getattr(cluster, f.name) for f in dataclasses.fields(cluster)}
    lines = [
        f"        {name}={value!r}," for name, value in values.items() if name not in ("nodes", "devices_per_node")
    ]
    gpu = ", Gpu" if cluster.gpu else ""
    head = f'"""{said}"""\n\nfrom maxsep.config.cluster import Cluster{gpu}\n\n\n'
    return head + "\n".join(["def get_cluster() -> Cluster:", "    return Cluster(", *lines, "    )", ""])
