"""The compilations of a layout for a cluster, a process of its own: `python -m maxsep.planning.compilation JOB OUT`.

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

from maxsep.config import Config, from_config_dict, runs
from maxsep.config.cluster import Cluster, Gpu, Tpu
from maxsep.output.durable import write_json
from maxsep.planning import target


def job(
    config: Config, ids: int | None, cluster: Cluster, cudnn: str | None, decode: dict[str, int] | None = None
) -> dict[str, Any]:
    """What is to be compiled, as JSON: the programs of `config` for a cluster; `ids` are the tokenizer's.

    `decode`: None for the train step; for inference the `batch` of prompts, `context` tokens each, and `new` tokens.
    """
    name = runs.name(config.layout, config.mesh)
    if decode is not None:
        name += f", batch {decode['batch']}, context {decode['context']}"
    made = {"name": name, "config": dataclasses.asdict(config), "ids": ids, "cluster": dataclasses.asdict(cluster)}
    return made | {"cudnn": cudnn, "decode": decode}


def compiled(
    config: Config, ids: int | None, cluster: Cluster, cudnn: str | None, decode: dict[str, int] | None = None
) -> dict[str, Any]:
    """Compiles what train.py or infer.py runs, and reads the programs.

    Returns:
        `memory`: bytes per device by kind, at the peak, and their `total`: of training the kinds of `buffers.by_kind`,
        of inference `weights`, `cache` and `rest`. `schedule`: of `schedule.to_json`, of the step, or of decoding, in
        which a token is one turn of a loop; `prefill`: that of prefill. `inner`: what `mesh.inner` is or auto chooses.
        `nodes`: of each partition, under either choice. `model_flops`, `tokens`: of a step. `bubble`. `kernel`: of
        attention. `cpu_seconds` of this process until now.
    """
    from maxsep.parallel.start import settle

    settle(config, cluster.devices if cluster.simulated else 1)

    import jax

    from maxsep.parallel import mesh, order

    devices = _devices(cluster, cudnn)
    options = target.attempts(config.model.products) if cluster.gpu else [{}]
    # The order of the devices changes no instruction, and XLA has complaints about another than this.
    with jax.set_mesh(mesh.mesh_of(mesh.arranged(devices, config.mesh, "expert"))):
        found = _training(config, ids, options) if decode is None else _decoding(config, ids, options, **decode)
    near, places = cluster.devices_per_node, range(cluster.devices)
    orders = {inner: mesh.arranged(places, config.mesh, inner).ravel() for inner in ("attention", "expert")}
    return found | {
        "inner": order.inner(config, near),
        "nodes": {inner: [int(device) // near for device in order] for inner, order in orders.items()},
        "cpu_seconds": time.process_time(),
    }


def _training(config: Config, ids: int | None, options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from maxsep.measure import buffers, schedule
    from maxsep.training.run import Run

    run = Run(config, end_of_text=0, ids=ids)  # any id: what it costs does not depend on it
    module, plan = _compile(run.lower_train_step(), options)
    return {
        "memory": buffers.by_kind(module, plan, run.abstract_state) | {"total": plan.peak},
        "schedule": schedule.to_json(schedule.of(module, 1 - run.bubble, run.filled)),
        "model_flops": run.flops,
        "tokens": run.tokens,
        "bubble": run.bubble,
        "kernel": run.program.kernel,
    }


def _decoding(
    config: Config, ids: int | None, options: Sequence[dict[str, Any]], batch: int, context: int, new: int
) -> dict[str, Any]:
    """Prefill and decoding of as many prompts of as many tokens, greedy."""
    import functools

    import jax
    import jax.numpy as jnp

    from maxsep.inference import generate
    from maxsep.inference.program import Program
    from maxsep.inference.sampling import Sampling
    from maxsep.measure import memory, schedule
    from maxsep.parallel.sharding import on_mesh

    platform = jax.sharding.get_mesh().devices.flat[0].platform
    program, sampling = Program(config, end_of_text=0, ids=ids, platform=platform), Sampling.of(0.0)
    shape, (whole, rows) = generate.Shape.of(program, batch, context, new), generate.shardings(program)
    weights = on_mesh(jax.eval_shape(program.weights, on_mesh(program.abstract)))
    prompts = jax.ShapeDtypeStruct((shape.rows, shape.length), jnp.int32, sharding=whole)
    arrays = (prompts, *[jax.ShapeDtypeStruct((shape.rows,), jnp.int32, sharding=rows)] * 3)
    prefill = functools.partial(program.prefill, slots=shape.slots, most=shape.most)
    state = on_mesh(jax.eval_shape(prefill, weights, *arrays, sampling))
    first, at_first = _compile(generate.lower_prefill(program, weights, arrays, shape, sampling), options)
    each, at_each = _compile(generate.lower_decode(program, weights, state, sampling), options)
    sizes = {"weights": memory.bytes_on_device(weights), "cache": memory.bytes_on_device(state.cache)}
    total = max(at_first.peak, at_each.peak)

    def used(tokens: int) -> float:
        """Of a device's experts, those that some token chooses where all are as likely; it has one at least."""
        model, single = config.model, program.single
        # Devices whose experts are others, or other parts of the same, share their tokens.
        apart = max(1, single.ways("b") // single.ways("e") // single.ways("f"))
        chosen = 1 - (1 - model.top_k / model.experts) ** max(1, tokens / apart)
        return max(1, model.experts / single.ways("e") * chosen)

    filled = 1 / program.single.ways(
        "e"
    )  # a device has all choices of those that share its tokens, and computes its own
    return {
        "memory": sizes | {"rest": total - sum(sizes.values()), "total": total},
        "schedule": schedule.to_json(schedule.of(each, 1, filled, used(batch))),
        "prefill": schedule.to_json(schedule.of(first, 1, filled, used(batch * context))),
        "kernel": None,
    }


def _compile(lowered, attempts: Sequence[dict[str, Any]]) -> tuple:
    """Compiles with the first options with which XLA can: the program, and its memory."""
    from jax.errors import JaxRuntimeError

    from maxsep.measure import buffers

    for number, options in enumerate(attempts, 1):
        with tempfile.TemporaryDirectory() as folder:
            try:
                lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True} | options)
                return buffers.read(Path(folder))
            except JaxRuntimeError as e:
                if target.SPILLS not in str(e) or number == len(attempts):
                    raise
    raise AssertionError("no options")


def _devices(cluster: Cluster, cudnn: str | None) -> list:
    """In the order of their neighbourhood."""
    import jax
    from jax.experimental import topologies

    if cluster.simulated:
        return jax.devices()[: cluster.devices]
    if cluster.tpu:
        name = f"{cluster.tpu.name}:{cluster.tpu.slices[cluster.devices]}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        return sorted(found.devices, key=lambda device: device.id)
    text = target.description(cluster, cudnn)
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=target.topology(cluster))
    return sorted(found.devices, key=lambda device: device.id)


def main(named: str, out: str) -> None:
    gc.disable()  # the process is short
    values = json.loads(Path(named).read_text(encoding="utf-8"))
    gpu, tpu = (values["cluster"].pop(kind) for kind in ("gpu", "tpu"))
    if tpu:
        tpu["slices"] = {int(chips): shape for chips, shape in tpu["slices"].items()}
    cluster = Cluster(gpu=gpu and Gpu(**gpu), tpu=tpu and Tpu(**tpu), **values["cluster"])
    from jax.errors import JaxRuntimeError

    try:
        config = from_config_dict(values["config"])
        found = compiled(config, values["ids"], cluster, values["cudnn"], values["decode"])
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
