"""`layout=auto`: training starts on the best row of a plan for `cluster`, which process 0 makes for its job.

The plan is made by a child, `python -m maxsep.planning.auto JOB OUT`: the process that trains must settle what JAX
starts with, which is the row's mesh. A run that has begun keeps its row.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from maxsep.cluster import child
from maxsep.cluster.job import ALONE, Job
from maxsep.cluster.signals import Stop
from maxsep.config import Config, ConfigError, MeshConfig, cli, from_config_dict
from maxsep.config.cluster import TAKES, cluster_of, load_cluster
from maxsep.config.layouts import AUTO
from maxsep.config.stored import read_config
from maxsep.output.durable import write_json
from maxsep.parallel import accelerators

FIELD = "cluster"  # the setting that errors name
INNER = "--config.mesh.inner="


def check(config: Config, folder: Path) -> None:
    """Refuses what cannot be planned, before anything slow.

    Raises:
        ConfigError: there is no such cluster, no layout fits its number of devices, or what compiles for it is missing.
    """
    if config.layout != AUTO or _begun(config, folder) is not None:
        return
    if config.cluster is None:
        _gpus()
        return
    from maxsep.planning import candidates, target

    cluster = load_cluster(config.cluster, FIELD)
    candidates.every(config, cluster.devices, FIELD)
    target.versions(cluster, FIELD)


def settled(config: Config, folder: Path, job: Job = ALONE) -> tuple[Config, dict[str, Any] | None]:
    """The config on the layout and mesh that it trains on, the same in all processes of the job.

    Returns:
        the config, and of its plan what the run's `config.json` keeps: `cluster`, `row` (as ma:4x4), `layouts` (how
        many were planned), `reason`, `seconds` (that planning took), `step_seconds` (the range), `memory_bytes`. None:
        the layout was not planned.

    Raises:
        ConfigError: nothing fits, or this machine's accelerators are not known.
        cli.Exit: planning was stopped, or has failed.
    """
    found = job.agree(_begun(config, folder) if job.first else None)[0]
    if found is None:
        if config.layout != AUTO:
            return config, None
        here = None if config.cluster else job.agree([job.members[job.index].host, _gpus(job)])
        job.at("planning")
        found = job.agree(_planned(config, here) if job.first else None)[0]
    layout, mesh, cluster, plan = found
    if config.layout != AUTO:
        same = (layout, mesh) == (config.layout, dataclasses.asdict(config.mesh))
        return config, plan if same else None
    if config.mesh.inner != "auto":
        mesh["inner"] = config.mesh.inner
    return replace(config, layout=layout, mesh=MeshConfig(**mesh), cluster=cluster), plan


def _begun(config: Config, folder: Path) -> list | None:
    """Layout, mesh, cluster and plan of the run in `folder`; None: there is none, or it moves to another cluster."""
    if not (folder / "config.json").exists():
        return None
    stored, record = read_config(folder)
    if config.cluster not in (None, stored.cluster):
        return None
    return [stored.layout, dataclasses.asdict(stored.mesh), stored.cluster, record.get("plan")]


def _planned(config: Config, here: list | None) -> list:
    """As `_begun`, of a new plan."""
    cluster, began = config.cluster or _cluster(here), time.monotonic()
    _say(f"layout=auto: planning for {cluster}")
    with tempfile.TemporaryDirectory() as scratch, Stop() as stop:
        named, out = Path(scratch, "job"), Path(scratch, "out")
        named.write_text(json.dumps({"config": dataclasses.asdict(config), "cluster": cluster}), encoding="utf-8")
        command = ["-m", "maxsep.planning.auto", str(named), str(out)]
        status = child.run(command, None, os.environ | {"JAX_PLATFORMS": "cpu"}, stop)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if stop.asked:
        raise cli.Exit(cli.STOPPED, f"{stop.asked}: stopped while planning; the same command resumes")
    if "error" in found:
        raise cli.Exit(found["status"], found["error"])
    if status:
        raise cli.Exit(cli.CRASHED, f"planning for {cluster} failed (status {child.shell_status(status)}); see above")
    row, plan = found["row"], found["plan"] | {"seconds": round(time.monotonic() - began, 1)}
    _say(f"planned in {plan['seconds']} s: {row['name']} of {plan['layouts']} layouts and meshes; {plan['reason']}")
    # Where `auto` would choose another order of the devices than the row's, its flags name it.
    inner = [flag.removeprefix(INNER) for flag in row["flags"] if flag.startswith(INNER)]
    mesh = MeshConfig(**row["mesh"], inner=inner[0] if inner else config.mesh.inner)
    return [row["layout"], dataclasses.asdict(mesh), cluster, plan]


def _gpus(job: Job = ALONE) -> list[str]:
    """Names of the GPUs of this process.

    Raises:
        ConfigError: there is none.
    """
    names = accelerators.nvidia_gpus()
    if not names:
        got = "none given beside layout=auto, and this machine has no NVIDIA GPU that nvidia-smi tells of"
        raise ConfigError(f"{FIELD}: {got}; takes {TAKES}, or cpu:1x16 for simulated devices")
    return names if job.gpus is None else [names[at] for at in job.gpus]


def _cluster(here: list) -> str:
    """The cluster that a job's processes are on: of each its host and the names of its GPUs.

    Raises:
        ConfigError: their GPUs differ, or are in none of the clusters that are known.
    """
    kinds = sorted({name for _, names in here for name in names})
    nodes: Counter[str] = Counter()
    for host, names in here:
        nodes[host] += len(names)
    takes = "takes a file like configs/clusters/h100.py, as mine.py:NODESxDEVICES"
    if len(kinds) > 1 or len(set(nodes.values())) > 1:
        got = ", ".join(f"{count} on {host}" for host, count in nodes.items())
        raise ConfigError(f"{FIELD}: got {' and '.join(kinds)}, {got}; takes like nodes of like devices")
    name = cluster_of(kinds[0])
    if name is None:
        raise ConfigError(f"{FIELD}: none given, and no file of configs/clusters is of {kinds[0]!r}; {takes}")
    return f"{name}:{len(nodes)}x{max(nodes.values())}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(named: str, out: str) -> None:
    """The child: the plan of a JOB, {"config", "cluster"}, as {"row", "plan"} or {"error", "status"} in OUT."""
    from maxsep.planning import candidates, kept, planned

    values = json.loads(Path(named).read_text(encoding="utf-8"))
    try:
        config, text = from_config_dict(values["config"]), values["cluster"]
        cluster = load_cluster(text, FIELD)
        configs = candidates.every(config, cluster.devices, FIELD)
        plan = planned.plan(config, text, cluster, configs, kept.folder(), None, _say)
        best = plan.best
        if best is None:
            raise ConfigError(f"layout: got auto for {text}; {plan.reason}")
    except (cli.Exit, ConfigError) as e:
        status, message = cli.outcome(e)
        write_json(Path(out), {"error": message, "status": status}, None)
        return
    kept_of_it = {
        "cluster": text,
        "row": best.name,
        "layouts": len({row.name for row in plan.rows}),
        "reason": plan.reason,
        "step_seconds": best.ranges["step_seconds"],
        "memory_bytes": best.memory_bytes["total"],
    }
    write_json(Path(out), {"row": dataclasses.asdict(best), "plan": kept_of_it}, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
