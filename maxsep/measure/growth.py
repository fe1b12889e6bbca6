"""How a step grows: with tokens, with the length of sequences, with experts, one at a time from one config."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from maxsep.config import Config, ConfigError
from maxsep.config.validate import validate

TOKENS, SEQUENCE, EXPERTS = "tokens", "sequence", "experts"
AXES = {  # what each series' values are
    TOKENS: "times the batch",
    SEQUENCE: "tokens per sequence, as many tokens per step",
    EXPERTS: "experts, as many active per token",
}


class Point(NamedTuple):
    series: str  # one of AXES
    value: int
    config: Config


def points(config: Config, values: dict[str, list[int]]) -> list[Point]:
    """The configs to measure, series by series: `values` of each.

    Raises:
        ConfigError: one of them cannot be; `--grow_SERIES` says which.
    """
    return [
        Point(series, value, _grown(config, series, value)) for series, several in values.items() for value in several
    ]


def _grown(config: Config, series: str, value: int) -> Config:
    train, data, model = config.train, config.data, config.model
    flag = f"--grow_{series}: got {value}"
    match series:
        case "tokens":
            train = replace(train, batch_size=train.batch_size * value)
        case "sequence":
            tokens = train.batch_size * data.sequence_length
            if tokens % value:
                raise ConfigError(f"{flag}; takes what divides the {tokens} tokens of a step")
            train, data = replace(train, batch_size=tokens // value), replace(data, sequence_length=value)
        case "experts":
            model = replace(model, experts=value)
    grown = replace(config, train=train, data=data, model=model)
    try:
        validate(grown)
    except ConfigError as e:
        raise ConfigError(f"{flag}, with which {e}") from e
    return grown


def measured(points: list[Point], measure: Callable[[Config], list[dict]]) -> Iterator[dict]:
    """What `measure` makes of each config, one config once, with `series` and `value` beside."""
    known: list[tuple[Config, list[dict]]] = []
    for point in points:
        results = next((found for config, found in known if config == point.config), None)
        if results is None:
            results = measure(point.config)
            known.append((point.config, results))
        yield from (result | {"series": point.series, "value": point.value} for result in results)
