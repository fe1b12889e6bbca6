"""Rates of this machine's devices, measured by a child: `python -m maxsep.planning.rates JOB OUT`.

JOB is a JSON file with `config` and the number of `devices`; what `measured` returns is written to OUT.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from maxsep.config import Config, cli, from_config_dict
from maxsep.output.durable import write_json
from maxsep.parallel.start import settle

SIZES = (2**14, 2**18, 2**22)  # bytes of a device's operand
CHAIN = 4  # collectives in a program, each of what the last has made
REPEATS = 5


def measured(config: Config, devices: int) -> dict[str, Any]:
    """What `devices` devices do at their best, all at once.

    Returns:
        `kind` of device; `flops`, FLOP/s of one device in square products, by type, of which `model.products` is one;
        `memory_bandwidth`, bytes/s of one device; `collectives`: of each a `kind`, the `axes` of a mesh, its
        `groups` of device numbers, `bytes` of a device's operand, and `seconds`.
    """
    import jax

    from maxsep.measure import bandwidth, flops

    found = jax.devices()[:devices]
    rows = max(n for n in range(1, devices + 1) if devices % n == 0 and n * n <= devices)
    whole = _mesh(found, {"all": devices}, jax.sharding.AxisType.Explicit)
    square = _mesh(found, {"attention": rows, "expert": devices // rows}, jax.sharding.AxisType.Auto)
    kinds = {config.model.products: config.model.dtype}
    if found[0].platform == "cpu":
        kinds["float32"] = "float32"  # whatever the model's type is, its router and its head make some
    products = {kind: flops.Product(whole, dtype) for kind, dtype in kinds.items()}
    return {
        "kind": found[0].device_kind,
        "flops": {kind: product.flops / devices / _fastest(product) for kind, product in products.items()},
        "memory_bandwidth": bandwidth.read() / len(jax.devices()),
        "collectives": list(_collectives(square)),
    }


def _mesh(devices: Sequence, sizes: dict[str, int], kind):
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def _collectives(mesh) -> Iterator[dict[str, Any]]:
    """A measurement of each kind of collective, on each axis and on both together, and of each size."""
    import numpy as np

    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    of_axes = {("attention",): places.T, ("expert",): places, ("attention", "expert"): places.reshape(1, -1)}
    for axes, groups in of_axes.items():
        count = groups.shape[1]
        if count == 1:
            continue
        for kind, collective in _kinds(axes, count).items():
            for size in SIZES:
                numbers = size // 4 // count * count
                seconds = _fastest(_chained(mesh, collective, numbers)) / CHAIN
                yield {
                    "kind": kind,
                    "axes": axes,
                    "groups": groups.tolist(),
                    "bytes": 4 * numbers,
                    "seconds": seconds,
                }


def _kinds(axis: tuple[str, ...], count: int) -> dict[str, Callable]:
    """By kind, one collective of [n] numbers whose result has [n] numbers again."""
    import jax.numpy as jnp
    from jax import lax

    def gather(x):
        return lax.all_gather(x, axis, tiled=True)[: x.size]

    def scatter(x):
        return jnp.tile(lax.psum_scatter(x, axis, tiled=True), count)

    def switch(x):
        return lax.all_to_all(x.reshape(count, -1), axis, 0, 0, tiled=True).reshape(-1)

    def rotate(x):
        return lax.ppermute(x, axis, [(i, (i + 1) % count) for i in range(count)])

    return {
        "all-gather": gather,
        "reduce-scatter": scatter,
        "all-reduce": lambda x: lax.psum(x, axis),
        "all-to-all": switch,
        "collective-permute": rotate,
    }


def _chained(mesh, collective, numbers: int):
    """Calls a compiled chain of collectives, of so many numbers on each device, and waits for it."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    def chain(x):
        x = x[0]
        for _ in range(CHAIN):
            # What differs from device to device: of the same XLA need not make a sum.
            x = collective(x) * 0.5 + lax.axis_index(mesh.axis_names).astype(x.dtype)
        return x[None]

    spec = P(mesh.axis_names)
    mapped = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.device_put(jnp.ones((mesh.size, numbers), jnp.float32), jax.sharding.NamedSharding(mesh, spec))
    program = mapped.lower(x).compile()
    return lambda: program(x).block_until_ready()


def _fastest(call) -> float:
    from maxsep.measure.timing import timed

    call()
    return min(timed(call, REPEATS)["seconds"])


def main(named: str, out: str) -> None:
    values = json.loads(Path(named).read_text(encoding="utf-8"))
    config, devices = from_config_dict(values["config"]), values["devices"]
    settle(config, devices)
    import jax

    if len(jax.devices()) < devices:
        here = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        print(f"error: --cluster: got {devices} devices; takes at most those of this machine, {here}", file=sys.stderr)
        sys.exit(cli.USER_ERROR)
    write_json(Path(out), measured(config, devices), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
