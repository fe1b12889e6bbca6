"""The layers of a model, as segments: consecutive layers of one kind."""

from typing import NamedTuple

from maxsep.config.schema import ModelConfig


class Segment(NamedTuple):
    """Layers `first` to `first + layers - 1` of a model, all of one kind."""

    feed_forward: str  # what follows their attention; it names the segment
    layers: int
    first: int


def segments(model: ModelConfig) -> tuple[Segment, ...]:
    """In the order of the layers."""
    return (Segment("moe", model.layers, 0),)


def described(model: ModelConfig) -> str:
    """The layers, for people."""
    return f"{model.layers} layers of {model.d_model}, {model.experts} experts of {model.d_ff}"


def moe_layers(model: ModelConfig) -> int:
    """How many layers have a Mixture of Experts: those that statistics of routing are about."""
    return model.layers
