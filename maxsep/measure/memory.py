"""What a program takes on a device: its state by kind, and all of it as the compiler counts it, before it runs."""

import math

import jax

from maxsep.parallel.sharding import axes_of


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
