"""The model that is certified: the user's, as small as the meshes allow, in float64.

What decides which device does what stays: heads, experts, the router, segments, accumulation, remat, dropout, ZeRO-1.
Widths, vocabulary, layers, sequences and batches become the least that every mesh divides.
"""

import dataclasses
import math
from collections.abc import Sequence
from operator import attrgetter

from maxsep.config import Config, ModelConfig, fields
from maxsep.config.layouts import row

HEAD_SIZE, VOCAB, GROUP, MICRO_BATCHES = 8, 250, 4, 4  # cuDNN's attention takes heads of multiples of 8


def scaled(config: Config, runs: Sequence[Config]) -> Config:
    """The config that each of `runs` is certified with, but for its layout and mesh.

    Args:
        config: the user's.
        runs: the same on the layouts and meshes that are compared.
    """

    def ways(letter: str) -> int:
        """The parts that any of the runs splits a dimension into, all at once."""
        sizes = (math.prod(run.mesh.sizes[axis] for axis in row(run.layout).get(letter, ())) for run in runs)
        return math.lcm(*sizes)

    model, stages = config.model, ways("l")
    moe = 2 * stages if stages > 1 else 2
    dense = min(model.dense_layers, 1)
    width = math.lcm(model.heads, 16)
    drops = model.capacity_factor is not None
    small = dataclasses.replace(
        model,
        layers=moe + dense,
        dense_layers=dense,
        d_model=width,
        head_dim=HEAD_SIZE,
        d_ff=math.lcm(ways("f"), ways("m"), 16),
        dense_d_ff=math.lcm(ways("m"), 32) if dense else None,
        vocab_size=VOCAB,
        # Without a group each device drops by itself: another mesh would drop others.
        capacity_group=GROUP if drops else None,
        attention_kernel="xla",
        dtype="float64",
        float32_precision="highest",
    )
    accumulation = max(stages, min(config.train.accumulation, MICRO_BATCHES))
    batch = accumulation * math.lcm(ways("b"), 2)
    train = dataclasses.replace(config.train, steps=10, batch_size=batch, accumulation=accumulation, init_from=None)
    data = dataclasses.replace(config.data, sequence_length=GROUP * math.lcm(ways("s"), 8), tokenizer=f"ids:{VOCAB}")
    # A long warm-up would leave ten steps without a change; at 1e-2 rounding grows tenfold with each step.
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3, warmup_steps=2, decay_steps=20)
    return dataclasses.replace(config, model=small, train=train, data=data, optimizer=optimizer)


def in_own_type(config: Config, small: Config) -> Config:
    """`small` as the run computes: in its dtype, with its kernels, where they can run.

    Every token goes to all experts, and nothing is dropped at random: a choice between two experts that rounding turns
    over, and another mask for a row in another place, would hide what the type loses.
    """
    own, kernel = config.model, config.model.attention_kernel
    model = dataclasses.replace(
        small.model,
        dtype=own.dtype,
        float32_precision=own.float32_precision,
        attention_kernel="auto" if kernel == "cudnn" else kernel,
        top_k=own.experts,
        router_top_groups=own.router_groups,
        router_bias_rate=0.0,
        expert_dropout=0.0,
    )
    return dataclasses.replace(small, model=model)


def with_choices(model: ModelConfig, small: ModelConfig) -> ModelConfig:
    """`model`, of `in_own_type`, with the choices of `small`."""
    return dataclasses.replace(model, top_k=small.top_k, router_top_groups=small.router_top_groups)


def changed(config: Config, small: Config) -> dict[str, tuple]:
    """The fields that differ: what the user's config has, and what was certified."""
    pairs = ((f.path, attrgetter(f.path)(config), attrgetter(f.path)(small)) for f in fields())
    apart = ("layout", "mesh.stage", "mesh.attention", "mesh.expert")
    return {path: (old, new) for path, old, new in pairs if old != new and path not in apart}
