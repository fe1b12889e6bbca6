"""One compilation for a cluster, a process of its own: `python -m maxsep.planning.compilation JOB OUT`.

JOB is a JSON file with what `job` makes; what `compiled` finds is written to OUT, or the `error` with which XLA refuses
the program.
"""

import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxsep.config import Config, from_config_dict
from maxsep.config.cluster import Cluster, Gpu
from maxsep.output.durable import write_json
from maxsep.planning import target


def job(config: Config, ids: int | None, cluster: Cluster, cudnn: str | None) -> dict[str, Any]:
    """What is to be compiled, as JSON: the step of `config` for a cluster; `ids` are the tokenizer's."""
    return {"config": dataclasses.asdict(config), "ids": ids, "cluster": dataclasses.asdict(cluster), "cudnn": cudnn}


def compiled(config: Config, ids: int | None, cluster: Cluster, cudnn: str | None) -> dict[str, Any]:
    """Compiles the train step that train.py runs, and reads the program.

    Returns:
        `memory`: bytes per device by kind, at the peak, as `buffers.by_kind` has them, and their `total`. `schedule`:
        of `schedule.to_json`. `inner`: what `mesh.inner` is or auto chooses. `nodes`: of each partition, under either
        choice. `model_flops`, `tokens`: of a step. `bubble`. `kernel`: of attention. `cpu_seconds` of this
        process until now.
    """
    from maxsep.parallel.start import settle

    settle(config, 1 if cluster.gpu else cluster.devices)

    import jax

    from maxsep.measure import buffers, schedule
    from maxsep.parallel import mesh, order
    from maxsep.training.run import Run

    devices = _devices(cluster, cudnn)
    # The order of the devices changes no instruction, and XLA has complaints about another than this.
    with jax.set_mesh(mesh.mesh_of(mesh.arranged(devices, config.mesh, "expert"))), tempfile.TemporaryDirectory() as d:
        run = Run(config, end_of_text=0, ids=ids)  # any id: what it costs does not depend on it
        _compile(run.lower_train_step(), target.attempts(config.model.products) if cluster.gpu else [{}], d)
        module, plan = buffers.read(Path(d))
    near, places = cluster.devices_per_node, range(cluster.devices)
    orders = {inner: mesh.arranged(places, config.mesh, inner).ravel() for inner in ("attention", "expert")}
    return {
        "memory": buffers.by_kind(module, plan, run.abstract_state) | {"total": plan.peak},
        "schedule": schedule.to_json(schedule.of(module, 1 - run.bubble, run.filled)),
        "inner": order.inner(config, near),
        "nodes": {inner: [int(device) // near for device in order] for inner, order in orders.items()},
        "model_flops": run.flops,
        "tokens": run.tokens,
        "bubble": run.bubble,
        "kernel": run.program.kernel,
        "cpu_seconds": time.process_time(),
    }


def _compile(lowered, attempts: Sequence[dict[str, Any]], folder: str) -> None:
    """Compiles with the first options with which XLA can, and dumps the program."""
    from jax.errors import JaxRuntimeError

    for number, options in enumerate(attempts, 1):
        try:
            lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True} | options)
            return
        except JaxRuntimeError as e:
            if target.SPILLS not in str(e) or number == len(attempts):
                raise


def _devices(cluster: Cluster, cudnn: str | None) -> list:
    """In the order of their neighbourhood."""
    import jax
    from jax.experimental import topologies

    if cluster.gpu is None:
        return jax.devices()[: cluster.devices]
    text = target.description(cluster, cudnn)
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=target.topology(cluster))
    return sorted(found.devices, key=lambda device: device.id)


def main(named: str, out: str) -> None:
    gc.disable()  # the process is short
    values = json.loads(Path(named).read_text(encoding="utf-8"))
    gpu = values["cluster"].pop("gpu")
    cluster = Cluster(gpu=gpu and Gpu(**gpu), **values["cluster"])
    from jax.errors import JaxRuntimeError

    try:
        found = compiled(from_config_dict(values["config"]), values["ids"], cluster, values["cudnn"])
    except JaxRuntimeError as e:  # by XLA, which will always say so
        found = {"error": _line(e)}
    write_json(Path(out), found, None)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as e:
        sys.exit(f"error: {_line(e)}")
