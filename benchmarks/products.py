"""Speed of the bench's matrix products alone, float32, on all cores: XLA's, or PyTorch's.

    python benchmarks/products.py
    peers/transformers/bin/python benchmarks/products.py torch

Prints GFLOP/s, the fastest of seven of each.
"""

import math
import sys
import time
from collections.abc import Callable

SIZES = {
    **{"m": 2048, "n": 2048, "k": 2048},
    **{"t": 4096, "d": 256, "h": 256},  # tokens, model, heads × size
    **{"e": 16, "c": 512, "f": 512},  # experts, their rows, their hidden size
    **{"b": 512, "v": 8192},  # tokens of the head's block, vocabulary
    **{"r": 16, "i": 64, "j": 256, "q": 32},  # attention: rows in turn, queries of a block, keys, head size
}
PRODUCTS = {
    "square": "mk,kn->mn",
    "experts, gate or up": "ecd,edf->ecf",
    "experts, down": "ecf,efd->ecd",
    "experts, gradient of rows": "ecf,edf->ecd",
    "experts, gradient of weights": "ecd,ecf->edf",
    "projection": "td,dh->th",
    "projection, gradient of weights": "td,th->dh",
    "head": "bd,vd->bv",
    "head, gradient of states": "bv,vd->bd",
    "head, gradient of the table": "bv,bd->vd",
    "attention, scores": "riq,rjq->rij",
    "attention, values": "rij,rjq->riq",
    "attention, keys, the wide turned": "rij,riq->rjq",
    "attention, keys, the narrow turned": "riq,rij->rqj",
}


def of_xla(equation: str, *shapes: tuple[int, ...]) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    operands = [jax.random.normal(jax.random.key(number), shape) for number, shape in enumerate(shapes)]
    compiled = jax.jit(lambda a, b: jnp.einsum(equation, a, b)).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))


def of_torch(equation: str, *shapes: tuple[int, ...]) -> Callable[[], object]:
    import torch

    operands = [torch.randn(shape) for shape in shapes]
    return lambda: torch.einsum(equation, *operands)


def fastest(product: Callable[[], object], count: int = 7) -> float:
    product()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(library: str = "xla") -> None:
    made = {"xla": of_xla, "torch": of_torch}[library]
    for name, equation in PRODUCTS.items():
        operands = equation.split("->")[0].split(",")
        product = made(equation, *(tuple(SIZES[letter] for letter in letters) for letters in operands))
        flops = 2 * math.prod(SIZES[letter] for letter in set("".join(operands)))
        print(f"{name:36}{flops / fastest(product) / 1e9:6.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
