"""maxsep.convert as its user calls it, in this process; what an imported model computes; what a model's files hold."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import wide
from safetensors import safe_open

from maxsep import convert
from maxsep.config import Config, MeshConfig, cli
from maxsep.config.stored import read_config
from maxsep.inference.load import load
from maxsep.inference.program import Program, _held
from maxsep.parallel import collectives
from maxsep.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parent / "huggingface" / "golden"


def converted(*arguments) -> int:
    """The status of the command."""
    argv = ["convert", *map(str, arguments)]
    return cli.run(
        convert.main, convert.define, convert.__doc__, commands=convert.COMMANDS, argv=argv, found=convert.FOUND
    )


def imported(checkpoint: Path, folder: Path, *flags: str) -> Path:
    assert converted("import", f"--checkpoint={checkpoint}", f"--workdir={folder}", *flags) == cli.DONE
    return folder


def exported(folder: Path, checkpoint: Path, *flags: str) -> Path:
    assert converted("export", f"--workdir={folder}", f"--checkpoint={checkpoint}", *flags) == cli.DONE
    return checkpoint


def on(folder: Path, layout: str, mesh: tuple[int, int], dtype: str) -> Config:
    """The config of an imported model, on a mesh of attention × expert devices."""
    config = read_config(folder)[0]
    return replace(config, layout=layout, mesh=MeshConfig(1, *mesh), model=replace(config.model, dtype=dtype))


def logits(config: Config, folder: Path, tokens_s: list[int]) -> np.ndarray:
    """The scores [s, V] after each token of a text, of the model in `folder` with `config`."""
    with wide(config), jax.set_mesh(make_mesh(config)):
        program = Program(config, end_of_text=-1)
        weights, _ = load(program, folder, "latest")
        layout = program.layout
        tokens_bs = np.repeat(np.asarray(tokens_s, np.int32)[None], layout.ways("b"), axis=0)
        length_b = np.full(len(tokens_bs), tokens_bs.shape[1], np.int32)

        def on_device(weights, tokens_bs, length_b):
            tokens_bs, length_b = collectives.vary((tokens_bs, length_b))

            def attend(attention, x_bsd, nothing):
                return attention.train(x_bsd, None), nothing

            x_bsd = program._prompt_states(weights, tokens_bs, length_b, attend, [None] * config.model.layers)[0]
            return program._merged(layout, weights).logits(x_bsd)[None]

        rows = P(layout.axes("b"))
        arrays = (jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), rows)) for x in (tokens_bs, length_b))
        out_specs = _held(layout.axes("b"), layout.axes("s"))
        scores = jax.jit(jax.shard_map(on_device, in_specs=(program.weight_specs, rows, rows), out_specs=out_specs))(
            weights, *arrays
        )
        return np.asarray(scores)[0, 0, :, : config.model.vocab_size]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
