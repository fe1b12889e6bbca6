"""What a program takes on a device: its state by kind, and all of it as the compiler counts it, before it runs."""

import math

import jax

from maxsep.config import ConfigError
from maxsep.config.cluster import cluster_of
from maxsep.parallel.sharding import axes_of
from maxsep.parallel.start import device_memory


def bytes_on_device(tree) -> int:
    """Bytes of one device's parts of abstract arrays, or arrays, that know their sharding."""

    return sum(math.prod(dims_on_device(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def dims_on_device(x) -> tuple[int, ...]:
    """Dimensions of one device's part of an array, abstract or not, that knows its sharding."""
    if x.sharding is None or not x.ndim:
        return x.shape
    sizes, spec = x.sharding.mesh.shape, x.sharding.spec
    return tuple(size // math.prod(sizes[axis] for axis in axes_of(spec, dim)) for dim, size in enumerate(x.shape))


def of_state(state) -> dict[str, int]:
    """Bytes a device of a `TrainState`, and of its gradients: they are summed where they arise, one for each weight.

    Buffers count as weights.
    """
    gradients, optimizer = bytes_on_device(state.params), bytes_on_device(state.optimizer)
    return {"weights": bytes_on_device(state.variables), "gradients": gradients, "optimizer": optimizer}


def of_program(compiled) -> dict[str, int] | None:
    """Bytes a device of a compiled program: `arguments`, and the most `temporaries` at a time. None: not told."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return {"arguments": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}


def fitting(lowered: jax.stages.Lowered, what: str, takes: str) -> jax.stages.Compiled:
    """A program, compiled, if this process's devices have the memory for it. Simulated devices have no limit.

    Args:
        lowered: the program.
        what: it is, for people.
        takes: what would do instead.

    Raises:
        ConfigError: it needs more than a device has. It was not run.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:  # TPUs' compiler counts by itself
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise ConfigError(f"memory: {what} does not fit ({' '.join(str(e).split())[:200]}); takes {takes}") from e
    have, stats = device_memory(), compiled.memory_analysis()
    if stats is None or math.isinf(have):
        return compiled
    need = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    need += stats.temp_size_in_bytes
    if need > have:
        got = f"got {need / 1e9:.1f} GB per device for {what}, where XLA may take {have / 1e9:.1f} GB"
        raise ConfigError(f"memory: {got}; takes {takes}")
    return compiled


def plan_command() -> str:
    """The command that tells what fits machines like this one's."""
    kind, count = jax.local_devices()[0].device_kind, len(jax.local_devices())
    alone = jax.process_count() == 1
    cluster = f"{cluster_of(kind) or 'CLUSTER'}:{f'1x{count}' if alone else 'NODESxDEVICES'}"
    return f"`python -m maxsep.plan --config=FILE --cluster={cluster}`"
