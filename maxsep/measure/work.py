"""What one instruction of a compiled program computes and moves: its matrix products, and its bytes of memory."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from maxsep.kernels import HIGHEST, ROWS, WEIGHTS
from maxsep.measure.hlo import Array, Instruction, Module

PLAIN = (  # custom calls without products
    "AllocateBuffer",
    "TopK",
    "__cub$DeviceRadixSort",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
)
TRITON = "__gpu$xla.gpu.triton"  # kernels of Pallas
# A pass of attention, in products of queries and keys: forward two, backward five (recomputed scores are one of them).
FORWARD, BACKWARD = 2, 5
# What takes neither time nor memory of its own.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
)
SLICES = ("dynamic-slice", "slice", "gather")


def product(module: Module, instruction: Instruction, filled: float = 1) -> Counter[str] | None:
    """Floating-point operations of one matrix product, by the type of its operands: `bf16`, `f32`, `f32 highest`.

    "highest" is what asks for the type's own precision where a device has a faster one. Of a library's call they follow
    from its shapes. None: of this library's call nobody has said how. What is no product has none; nor has a fusion,
    whose products are instructions of its own. Of a grouped product's rows the share `filled` counts.
    """
    if instruction.opcode == "dot":
        return _dot(module, instruction)
    if instruction.opcode == "convolution":
        return _convolution(module, instruction)
    if (target := instruction.target) is None or target in PLAIN:
        return Counter()
    if re.match(r"__cublas\$(gemm|lt\$matmul)", target):
        return _dot(module, instruction)
    if target.startswith("__cudnn$fmha"):
        return _attention(module, instruction)
    if target == TRITON and (kernel := re.search(rf"/({ROWS}|{WEIGHTS})({HIGHEST})?/", instruction.path)):
        return _grouped(module, instruction, kernel, filled)
    return None


def flops(module: Module, kernel: Instruction, filled: float = 1) -> Counter[str]:
    """The same of all that a kernel, perhaps a fusion, computes; library calls of unknown products count nothing."""
    inside = [i for called in kernel.called for i in module.within(called)]
    return sum((product(module, i, filled) or Counter() for i in (kernel, *inside)), Counter())


def _dot(module: Module, dot: Instruction) -> Counter[str]:
    """The contracted dimensions are written {1} by XLA, ["1"] in what it passes to cuBLAS."""
    left = module.arrays(dot.operands[0])[0]
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', dot.attributes)[1]
    depth = math.prod(left.dims[int(dim)] for dim in re.findall(r"\d+", contracted))
    highest = " highest" if re.search(r'operand_precision(={|":\[")highest', dot.attributes, re.IGNORECASE) else ""
    return Counter({left.dtype + highest: 2 * dot.arrays[0].elements * depth})


def _convolution(module: Module, call: Instruction) -> Counter[str]:
    """What XLA makes of a product for TPUs: a batch, or the heads, may be dimensions with a window.

    Of each such dimension count the places of the window that meet an element: others are padding.
    """
    left, right = (module.arrays(operand)[0] for operand in call.operands[:2])
    inputs, weights, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", call.attributes).groups()
    window = dict(re.findall(r"(\w+)=(\S+?)(?=[ }])", (re.search(r"window=\{(.*?\})", call.attributes) or ["", ""])[1]))
    spatial = sorted(set(outputs) - {"b", "f"})

    def each(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    result, met = call.arrays[0].dims, 1
    names = ("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
    for dim, *of in zip(spatial, *(each(*name) for name in names), strict=True):
        pad = int(of[2].partition("_")[0])
        size, stride, dilated, apart = (int(of[at]) for at in (0, 1, 3, 4))
        last = (left.dims[inputs.index(dim)] - 1) * dilated
        places = (np.arange(result[outputs.index(dim)]) * stride)[:, None] + np.arange(size) * apart - pad
        met *= int(((places >= 0) & (places <= last) & (places % dilated == 0)).sum())
    depth = right.dims[weights.index("i")]
    highest = " highest" if re.search(r"operand_precision={highest", call.attributes) else ""
    one = result[outputs.index("b")] * result[outputs.index("f")]
    return Counter({left.dtype + highest: 2 * one * met * depth})


def _grouped(module: Module, call: Instruction, kernel: re.Match, filled: float) -> Counter[str]:
    """Ours: rows [R, K] with matrices [E, K, N], or with rows [R, N] for the gradient of these."""
    x, other = (module.arrays(operand)[0] for operand in call.operands[-2:])
    widths = call.arrays[0].dims[-1] if kernel[1] == ROWS else other.dims[-1]
    highest = " highest" if kernel[2] else ""
    return Counter({x.dtype + highest: 2 * filled * x.elements * widths})


def _attention(module: Module, call: Instruction) -> Counter[str]:
    """cuDNN's: queries are [b, s, h, q], keys [b, t, k, q]. A causal mask halves the products, which it skips."""
    queries, keys = (module.arrays(operand)[0] for operand in call.operands[:2])
    (batch, length, heads, size), of_keys = queries.dims, keys.dims[1]
    one = 2 * batch * heads * length * of_keys * size
    causal = 2 if re.search(r'"mask_type":\s*"[A-Z_]*CAUSAL', call.attributes) else 1
    return Counter({queries.dtype: one * (BACKWARD if "Backward" in call.target else FORWARD) / causal})


def moved(module: Module, kernel: Instruction, used: float | None = None) -> int:
    """Bytes that a kernel reads from memory and writes to it, each once: what lies in caches and registers is free.

    Of an operand that is only sliced the slices count; of a result that takes an operand's place, what is written. Of a
    grouped product's matrices count as many as have rows: `used`, or all.
    """
    operands = [_bytes(module.arrays(operand)) for operand in kernel.operands]
    if kernel.opcode == "copy-start":
        return sum(operands) + _bytes(kernel.arrays[:1])
    if kernel.opcode.startswith("fusion") and kernel.called:
        return _of_fusion(module, kernel.called[0])
    if kernel.opcode in SLICES:
        source = module.arrays(kernel.operands[0])[0]
        read = 0 if source.on_chip else sum(array.bytes for array in kernel.arrays)
        return read + _bytes(kernel.arrays) + sum(operands[1:])
    if kernel.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if kernel.opcode == "custom-call":
        if used is not None and kernel.target == TRITON and re.search(f"/{ROWS}", kernel.path):
            matrices = module.arrays(kernel.operands[-1])[0].dims[0]
            operands[-1] = round(operands[-1] * min(1, used / matrices))
        workspaces = ("s8", "u8")
        return sum(operands) + _bytes([array for array in kernel.arrays if array.dtype not in workspaces])
    return sum(operands) + _bytes(kernel.arrays)


def _of_fusion(module: Module, name: str) -> int:
    body = module.computations[name]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in body:
        for operand in instruction.operands:
            users[operand].append(instruction)

    def readers(operand: str) -> Iterator[tuple[Instruction, bool]]:
        """Who reads it, and whether as its first operand: that which is sliced, or updated."""
        for user in users[operand]:
            if user.opcode == "bitcast":
                yield from readers(user.name)
            else:
                yield user, user.operands[0] == operand

    def read(parameter: Instruction) -> int:
        whole, using = _bytes(parameter.arrays), list(readers(parameter.name))
        sliced = [user for user, first in using if first and user.opcode in SLICES]
        updated = [user for user, first in using if first and user.opcode == "dynamic-update-slice"]
        if len(sliced) + len(updated) < len(using):
            return whole
        return min(whole, sum(array.bytes for user in sliced for array in user.arrays))

    def written(result: Instruction) -> int:
        if result.opcode in ("tuple", "bitcast"):
            return sum(written(module.made(operand)) for operand in result.operands)
        if result.opcode == "dynamic-update-slice":
            return _bytes(module.arrays(result.operands[1]))
        return _bytes(result.arrays)

    return sum(read(i) for i in body if i.opcode == "parameter") + written(module.root(name))


def _bytes(arrays: list[Array]) -> int:
    """Of those that lie in the device's memory."""
    return sum(array.bytes for array in arrays if not array.on_chip)
