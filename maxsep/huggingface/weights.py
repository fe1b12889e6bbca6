"""Weights between a checkpoint's tensors and our parameters: cut to shards, transposed, cast, in either direction."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from maxsep.config import ModelConfig
from maxsep.config.matrices import sizes
from maxsep.huggingface.families import Tensors
from maxsep.parallel.start import cores

ALIGNMENT = 64  # bytes
STRIP = 16  # rows of a source at a time: NumPy transposes narrow strips three times as fast as a whole matrix

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # a part of the tensor of this name


def parameter(tensors: Tensors, model: ModelConfig, abstract: jax.ShapeDtypeStruct, read: Read) -> jax.Array:
    """One of our parameters, read tensor by tensor into the shards that this process has of it.

    Args:
        tensors: where it lies.
        model: of the checkpoint.
        abstract: its shape, dtype and NamedSharding; rows that only pad the vocabulary become 0.
        read: reads a checkpoint's tensors.
    """
    of, there = sizes(model), "".join(tensors.dims)  # letters in the order of a tensor
    first = {dim[0] for dim in tensors.dims}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        cuts = zip(tensors.letters, index, abstract.shape, strict=True)
        ranges = {x: range(*cut.indices(size)) for x, cut, size in cuts}
        out = aligned([len(ranges[x]) for x in tensors.letters], abstract.dtype)
        own = {x: range(ranges[x].start, min(ranges[x].stop, of[x])) for x in tensors.own}  # without padding
        if any(own[x] != ranges[x] for x in own):
            out[...] = 0
            if not all(map(len, own.values())):
                return out

        # What is cut of a tensor, and of a dimension's further letters once they are apart.
        def edge(dim: str, at: int) -> int:
            return at * math.prod(of[x] for x in dim[1:])

        where = tuple(slice(edge(dim, own[dim[0]].start), edge(dim, own[dim[0]].stop)) for dim in tensors.dims)
        apart = [len(own[x]) if x in first else of[x] for x in there]
        further = tuple(slice(None) if x in first else slice(own[x].start, own[x].stop) for x in there)
        kept = tuple(slice(0, len(own[x])) for x in tensors.own)
        order = [there.index(x) for x in tensors.own]

        def fill(at: tuple[int, ...]) -> None:
            numbers = tuple(ranges[x][i] for x, i in zip(tensors.numbered, at, strict=True))
            part = read(tensors.named(numbers), where).reshape(apart)[further]
            copy(out[at][kept], part, order)

        each(fill, np.ndindex(*(len(ranges[x]) for x in tensors.numbered)))
        return out

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, shard)


def each(function: Callable, arguments: Iterable) -> list:
    """What `function`, which copies arrays, returns for each argument; on all cores."""
    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(function, arguments))


def aligned(shape: list[int], dtype) -> np.ndarray:
    """Memory that JAX's CPU devices take over without a copy."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(count + ALIGNMENT, np.uint8)  # zeros would come in small pages, which take a second a GB
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + count].view(dtype).reshape(shape)


def tensor(tensors: Tensors, model: ModelConfig, array: np.ndarray, numbers: tuple[int, ...], dtype) -> np.ndarray:
    """One of a checkpoint's tensors that our parameter `array` is, that of layer and expert `numbers`."""
    of = sizes(model)
    there = "".join(tensors.dims)
    part = array[numbers][tuple(slice(0, of[x]) for x in tensors.own)]
    out = np.empty([of[x] for x in there], dtype)
    copy(out, part, [tensors.own.index(x) for x in there])
    return out.reshape(tensors.shape(of))


def copy(out: np.ndarray, source: np.ndarray, order: list[int]) -> None:
    """Writes `source`, its dimensions in the order `order`, into `out`, cast to its dtype."""
    if out.dtype == source.dtype:  # NumPy moves its own kinds faster than bfloat16
        out, source = (x.view(f"u{x.dtype.itemsize}") for x in (out, source))
    axis = order.index(0)
    if axis == 0:
        out[...] = source.transpose(order)
        return
    for first in range(0, source.shape[0], STRIP):
        strip = source[first : first + STRIP].transpose(order)
        out[(*[slice(None)] * axis, slice(first, first + STRIP))] = strip
