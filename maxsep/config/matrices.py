"""A model's matrices by their shape letters: what its parameters, operations and bytes are counted from."""

import math
from typing import NamedTuple

from maxsep.config.schema import ModelConfig
from maxsep.config.segments import moe_layers


class Matrix(NamedTuple):
    """Matrices of one shape, of all layers together."""

    letters: str  # of one of them
    count: int  # how many there are
    used: float  # share of them that a token is multiplied with
    hidden: int = 0  # the size of `m`, which dense layers and shared experts have each their own of

    def size(self, sizes: dict[str, int]) -> int:
        """Parameters of all of them, if the other letters have these `sizes`."""
        return self.count * math.prod((sizes | {"m": self.hidden})[letter] for letter in self.letters)


def sizes(model: ModelConfig) -> dict[str, int]:
    """The size of each letter's dimension but `m`; `v` without the rows that only pad the vocabulary."""
    return {
        "l": model.layers,
        "d": model.d_model,
        "h": model.heads,
        "k": model.n_kv_heads,
        "q": model.head_size,
        "e": model.experts,
        "f": model.d_ff,
        "v": model.vocab_size,
    }


def matrices(model: ModelConfig) -> tuple[Matrix, ...]:
    """All matrices of a model; norms' scales are none."""
    of_mlp = 3 if model.activation == "swiglu" else 2
    embedding = () if model.tied_embedding else (Matrix("vd", 1, 0),)  # looked up
    return (
        Matrix("dhq", 2 * model.layers, 1),  # queries, output
        Matrix("dkq", 2 * model.layers, 1),  # keys, values
        Matrix("dm", of_mlp * model.dense_layers, 1, model.dense_d_ff or 0),
        Matrix("de", moe_layers(model), 1),  # routers
        Matrix("dm", of_mlp * moe_layers(model), 1, model.shared_experts * model.d_ff),
        Matrix("d", moe_layers(model) * model.shared_gate, 1),
        Matrix("edf", of_mlp * moe_layers(model), model.top_k / model.experts),
        Matrix("vd", 1, 1),  # the output head
        *embedding,
    )


def parameters(model: ModelConfig) -> int:
    """Parameters of a model, the rows that only pad the embedding not counted."""
    normed = {"none": 0, "head": 2, "all": model.heads + model.n_kv_heads}[model.qk_norm]  # heads with a scale
    norms = model.layers * (2 * model.d_model + normed * model.head_size) + model.d_model
    return sum(matrix.size(sizes(model)) for matrix in matrices(model)) + norms
