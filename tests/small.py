"""Small configs for tests, on any mesh shape, and text that a model soon learns."""

import os
from dataclasses import replace

import numpy as np

from maxsep.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from maxsep.config.validate import validate

# MAXSEP_TEST_SEED=1 and so on give every test that uses this file other weights and text: none may need a lucky one.
SEED = int(os.environ.get("MAXSEP_TEST_SEED", "0"))

MESHES = [(1, 1), (2, 2), (4, 4), (1, 16), (16, 1), (2, 8), (8, 2)]  # attention × expert

MA_IN_STAGES = "l=stage b=expert s=attention h=attention e=expert v=stage+attention"

ROWS = {  # of each layout two meshes of 16 devices
    "ma": [(4, 4), (2, 8)],
    "ma_folded": [(4, 4), (2, 8)],
    "tp": [(8, 2), (4, 4)],
    "pp": [(2, 1, 8), (4, 1, 4)],
    "tp_pp": [(2, 8, 1), (4, 2, 2)],
    MA_IN_STAGES: [(2, 4, 2), (4, 2, 2)],
    "zero": [(4, 4), (2, 2, 4)],
}


def config(mesh: tuple[int, ...] = (1, 1), layout: str = "ma", **sections: dict) -> Config:
    """A valid config that every mesh shape of 16 devices divides, with `sections` (`model={"top_k": 1}`) changed.

    `mesh` is attention × expert, or stage × attention × expert.

    Two layers of 16 with 16 heads and 16 experts, 16 sequences of 32 tokens, 200 ids.
    """
    base = Config(
        name="small",
        layout=layout,
        mesh=MeshConfig(*(1, *mesh)[-3:]),
        train=TrainConfig(steps=20, batch_size=16, seed=SEED),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        data=DataConfig(sequence_length=32, tokenizer="tokenizer.json"),
        model=ModelConfig(
            layers=2,
            d_model=16,
            heads=16,
            head_dim=4,
            experts=16,
            d_ff=32,
            vocab_size=200,
            exchange_factor=16.0,  # room for all: programs without further rounds, but where a test asks for them
        ),
    )
    made = replace(base, **{name: replace(getattr(base, name), **fields) for name, fields in sections.items()})
    validate(made)
    return made


def named(mesh: tuple[int, ...]) -> str:
    return "x".join(map(str, mesh))


def text(config: Config, steps: int) -> np.ndarray:
    """Batches [steps, accumulation, micro-batch, S + 1]: after each id one of four others, some ids much rarer."""
    rng = np.random.default_rng([SEED, 0])
    ids, train = config.model.vocab_size, config.train
    follows = (ids * rng.random((ids, 4)) ** 3).astype(np.int32)
    rows = steps * train.batch_size
    out = np.empty((rows, config.data.sequence_length + 1), np.int32)
    out[:, 0] = rng.integers(ids, size=rows)
    for i in range(1, out.shape[1]):
        out[:, i] = follows[out[:, i - 1], rng.integers(4, size=rows)]
    return out.reshape(steps, train.accumulation, train.batch_size // train.accumulation, -1)
