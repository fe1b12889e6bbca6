"""A plan: the rows of a config's layouts and meshes on a cluster, and the best of them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maxsep.config import Config, paths, runs
from maxsep.config.cluster import Cluster
from maxsep.config.validate import tokenizer_ids
from maxsep.measure import schedule
from maxsep.measure.schedule import Schedule
from maxsep.parallel.start import cores
from maxsep.planning import compilation, rows, session, simulated, target
from maxsep.planning.kept import Kept
from maxsep.planning.rows import Row


@dataclass(frozen=True)
class Plan:
    """What was found of each layout and mesh."""

    config: Config
    configs: Sequence[Config]  # the same on each layout and mesh
    found: list[dict[str, Any]]  # of each, what `compilation.compiled` returns
    named: str  # the cluster, as it was asked for
    cluster: Cluster  # with all its rates

    @cached_property
    def rows(self) -> list[Row]:
        """Sorted, as `rows.of` makes them."""
        return rows.of(self.configs, self.found, self.cluster)

    @property
    def best(self) -> Row | None:
        """None: nothing fits."""
        return rows.best(self.rows)[0]

    @property
    def reason(self) -> str:
        """Why the best row is that, in one sentence."""
        return rows.best(self.rows)[1]

    @property
    def title(self) -> str:
        """What was planned, in a line."""
        return title(self.config, self.named, self.cluster)

    def program(self, row: Row) -> tuple[Schedule, list[int]]:
        """What the row's program does, and the node of each of its partitions."""
        names = [runs.name(config.layout, config.mesh) for config in self.configs]
        facts = self.found[names.index(row.name)]
        return schedule.from_json(facts["schedule"]), facts["nodes"][row.inner]

    def to_json(self) -> dict[str, Any]:
        """For programs: docs/plan.md has the fields."""
        layouts = [dataclasses.asdict(row) for row in self.rows]
        plan = {"config": self.config.name, "cluster": self.named, "layouts": layouts}
        return plan | {"best": self.best and self.best.name, "reason": self.reason, "source": rows.SOURCE}


def title(config: Config, named: str, cluster: Cluster) -> str:
    """What is planned for which devices, in a line."""
    shape = f"{cluster.nodes} nodes of {cluster.devices_per_node}" if cluster.nodes > 1 else "one node"
    return f"{config.name} on {named}: {cluster.devices} x {cluster.device}, {shape}"


def plan(
    config: Config,
    named: str,
    cluster: Cluster,
    configs: Sequence[Config],
    cache: Path,
    jobs: int | None,
    say: Callable[[str], None],
) -> Plan:
    """Compiles what is not kept yet, and prices it.

    Args:
        config: whatever its layout and mesh are.
        named, cluster: what to plan for, as it was written and as `load_cluster` reads it.
        configs: the config on each layout and mesh, checked.
        cache: folder of what compilations have found.
        jobs: programs to compile at a time; None: half of the cores.
        say: takes a line of progress.

    Raises:
        ConfigError: the cache cannot be written, or the extra `cuda` is missing.
        cli.Exit: a signal has stopped it.
    """
    versions = target.versions(cluster)
    cudnn, ids = target.cudnn(versions), tokenizer_size(config)
    asked = [compilation.job(one, ids, cluster, cudnn) for one in configs]
    found = session.compile_all(asked, versions, Kept(cache), jobs or at_a_time(), say)
    return Plan(config, configs, found, named, rated(cluster, config))


def at_a_time() -> int:
    """Programs to compile at a time: half of the cores."""
    return max(1, cores() // 2)


def rated(cluster: Cluster, config: Config) -> Cluster:
    """The cluster with all its rates: those that simulated devices lack are measured."""
    return simulated.measured(cluster, config.model.dtype) if cluster.simulated else cluster


def tokenizer_size(config: Config) -> int | None:
    """Number of the tokenizer's ids; None where only a file could tell, and it is not here."""
    from maxsep.data import tokenizer

    name = config.data.tokenizer
    if (ids := tokenizer_ids(name)) is not None or not paths.named("data.tokenizer", name).is_file():
        return ids
    return tokenizer.of(config).vocab_size
