"""The layers of a model, as segments: consecutive layers of one kind."""

from typing import NamedTuple

from maxsep.config.schema import ModelConfig


class Segment(NamedTuple):
    """Layers `first` to `first + layers - 1` of a model, all of one kind."""

    feed_forward: str  # what follows their attention, dense or moe; it names the segment
    layers: int
    first: int


def segments(model: ModelConfig) -> tuple[Segment, ...]:
    """In the order of the layers: the dense ones, then those with a Mixture of Experts."""
    dense = (Segment("dense", model.dense_layers, 0),) if model.dense_layers else ()
    return *dense, Segment("moe", moe_layers(model), model.dense_layers)


def described(model: ModelConfig) -> str:
    """The layers, for people."""
    dense = f" ({model.dense_layers} dense of {model.dense_d_ff})" if model.dense_layers else ""
    shared = f" and {model.shared_experts} shared" if model.shared_experts else ""
    return f"{model.layers} layers of {model.d_model}{dense}, {model.experts} experts of {model.d_ff}{shared}"


def moe_layers(model: ModelConfig) -> int:
    """How many layers have a Mixture of Experts: those that statistics of routing are about."""
    return model.layers - model.dense_layers
