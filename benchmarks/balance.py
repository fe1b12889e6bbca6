"""Balance from a router that was drawn badly, over 300 steps: with a bias, with a loss, with neither.

    pip install -e ".[viz]" && python benchmarks/balance.py runs/balance

Trains `configs/tiny.py` with one layer on one device, from weights with which one expert is among those of some 60 % of
the tokens, and draws docs/balance.png: the largest violation of balance (MaxVio) by step, and the held-out losses.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from maxsep.config.stored import read_config
from maxsep.data import preparation
from maxsep.output.checkpoint import Checkpoints
from maxsep.output.workdir import CHECKPOINTS
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.6  # of the tokens
NO_LOSS = "--config.model.load_balancing_coefficient=0"
WAYS = {
    "neither": [NO_LOSS],
    "a loss, coefficient 0.01": [],
    "a bias, 0.003 per step": [NO_LOSS, "--config.model.router_bias_rate=0.003"],
}


def train(workdir: Path, *flags: str) -> None:
    model = ("--config.model.layers=1", "--config.mesh.attention=1", "--config.mesh.expert=1")
    command = [sys.executable, "train.py", f"--workdir={workdir}", *model, "--config.train.log_every=1", *flags]
    subprocess.run(command, cwd=ROOT, check=True)


def spoil(workdir: Path) -> None:
    """Saves step 2 of a run of one step: new weights, with a direction that all tokens share and one expert likes.

    How much it likes it is found by halving, on the run's first batch.
    """
    config = read_config(workdir)[0]
    corpus = preparation.ensure(config, print)
    with jax.set_mesh(make_mesh(config)), Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        run = Run(config)
        state, step = run.init(), jax.jit(run.program.train_step)
        batch = jax.device_put(next(run.train_batches(corpus, 0)).reshape(run.batch_shape), run.batch_sharding)
        direction_d = jax.random.normal(jax.random.key(0), (config.model.d_model,))

        def spoilt(strength: float):
            params = jax.tree.map(jnp.copy, state.params)
            params["embedding"]["table_vd"] += 0.02 * direction_d
            router = params["segments"]["moe"]["feed_forward"]["router"]
            router["w_de"] = router["w_de"].at[:, :, 0].add(strength * direction_d / config.model.d_model)
            return type(state)(state.step + 2, params, state.buffers, state.optimizer, state.skipped)

        low, high = 0.0, 16.0
        for _ in range(16):
            strength = (low + high) / 2
            _, metrics = step(spoilt(strength), batch)
            share = int(metrics["load_le"][0, 0]) / run.tokens
            low, high = (strength, high) if share < SHARE else (low, strength)
        print(f"one expert has {share:.0%} of the tokens")
        checkpoints.save(2, spoilt(strength), {"position": 0})


def main(folder: str) -> None:
    base = Path(folder).resolve()
    bad = base / "bad"
    if not bad.exists():
        train(bad, "--config.train.steps=1", "--config.optimizer.warmup_steps=1")
        spoil(bad)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, (name, flags) in enumerate(WAYS.items()):
        workdir = base / str(number)
        train(workdir, f"--config.train.init_from={bad}", *flags)
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        trained = [(row["step"], row["max_violation"]) for row in rows if row["split"] == "train"]
        (steps, violations), loss = zip(*trained, strict=True), rows[-1]["loss"]
        axes.plot(steps, violations, linewidth=1, label=f"{name}: held-out loss {loss:.3f}")
        last = np.mean(violations[-20:])
        print(
            f"{name}: MaxVio {violations[0]:.2f} at first, {last:.2f} over the last 20 steps; held-out loss {loss:.4f}"
        )
    axes.set(xlabel="step", ylabel="MaxVio", ylim=(0, None))
    axes.set_title("From a router that sends most tokens to one expert of 16", fontsize=11)
    axes.legend()
    figure.savefig(ROOT / "docs" / "balance.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
