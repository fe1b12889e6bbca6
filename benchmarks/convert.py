"""What an import and an export of a model cost, beside a plain copy of its files: `python benchmarks/convert.py`.

Makes a Mixtral of random bfloat16 weights in several files, and measures seconds and peak memory of each command.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from maxsep.config import ModelConfig, cli
from maxsep.config.matrices import parameters, sizes
from maxsep.huggingface import model_config
from maxsep.huggingface.families import FAMILIES, numbers, tensors
from maxsep.huggingface.folder import INDEX

FAMILY = FAMILIES["mixtral"]
LAYER = 1.09e9  # bytes of a layer of `shape`, about


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_float("gigabytes", 4.0, "size of the model", lower_bound=0.1, flag_values=values)
    flags.DEFINE_float("file_gigabytes", 1.0, "size of a file", lower_bound=0.1, flag_values=values)
    flags.DEFINE_string("folder", None, "where to write (default: the system's temporary folder)", flag_values=values)


def main(args: cli.Args) -> None:
    layers = max(1, round(args.flags.gigabytes * 1e9 / LAYER))
    shape = ModelConfig(
        layers=layers, d_model=2048, heads=16, kv_heads=4, head_dim=128, experts=16, d_ff=5120, vocab_size=32_000,
        rope_theta=1e6, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.flags.folder) as name:
        folder = Path(name)
        model, run, out = (folder / part for part in ("model", "run", "out"))
        size = make(shape, model, args.flags.file_gigabytes * 1e9)
        print(
            f"{parameters(shape):,} parameters, {size / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} files"
        )
        copied = seconds(["cp", "-r", str(model), str(folder / "copy")])[0]
        subprocess.run(["sync"], check=True)
        shutil.rmtree(folder / "copy")
        print(f"{'cp -r':<8}{copied:>8.1f} s{size / 1e9 / copied:>8.2f} GB/s")
        for command, where in (("import", (model, run)), ("export", (out, run))):
            flags_ = [f"--{flag}={path}" for flag, path in zip(("checkpoint", "workdir"), where, strict=True)]
            taken, peak = seconds([sys.executable, "-m", "maxsep.convert", command, *flags_])
            over = (peak - size) / 1e9
            print(
                f"{command:<8}{taken:>8.1f} s{size / 1e9 / taken:>8.2f} GB/s, peak memory {peak / 1e9:.2f} GB: "
                f"the model and {over:.2f} GB"
            )


def make(shape: ModelConfig, folder: Path, file_bytes: float) -> int:
    """Writes the model; returns the bytes of its tensors."""
    folder.mkdir()
    of, rng = sizes(shape), np.random.default_rng(0)
    wanted = {e.named(at): e.shape(of) for e in tensors(FAMILY, shape).values() for at in numbers(e, of)}
    where, total, contents, held, number = {}, 0, {}, 0, 1

    def write() -> None:
        nonlocal contents, held, number
        file = f"model-{number:05}.safetensors"
        save_file(contents, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(contents, file))
        contents, held, number = {}, 0, number + 1

    for name, dims in wanted.items():
        bits = rng.integers(0, 2**16, dims, dtype=np.uint16)
        contents[name] = ((bits & 0x807F) | 0x3C80).view(ml_dtypes.bfloat16)  # 2**-6 to 2**-5, either sign
        total += bits.nbytes
        held += bits.nbytes
        if held >= file_bytes:
            write()
    write()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(model_config.write(FAMILY, shape, 4096, 1, [2])))
    return total


def seconds(command: list[str]) -> tuple[float, int]:
    """Of a command, and the most memory in bytes that it, or one before it, had."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__))
