"""What a finished run of an ablation comes to, collected from its folder."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import jax

from maxsep.ablation import kept
from maxsep.ablation.trial import Trial
from maxsep.config import Config
from maxsep.config.stored import read_config
from maxsep.measure import buffers, parts, program
from maxsep.measure.flops import flops_per_token
from maxsep.measure.timing import quantile
from maxsep.output.metrics import read_rows
from maxsep.parallel import pipeline
from maxsep.parallel.mesh import abstract_mesh
from maxsep.training.step import Program

FIRST = 2  # steps that warm up, not timed


def collect(trial: Trial) -> dict:
    """Reads a run that has ended well, and keeps what it comes to.

    Returns:
        name, layout, mesh, devices, config; of each step `losses`, `dropped`, `seconds`; of the run `step_seconds`
        (median, p10, p90 of the steps that are neither the first nor profiled), speeds, `expert_shares`,
        `load_balancing_loss`, `eval_loss`; of the program `sent` (operand and wire bytes of a device and step, by role
        and kind), `flops` (of its products; `model_flops`: those that the model needs), `memory` (bytes a device by
        kind); `parts` (shares of the time); `decode`. None for what is not known.
    """
    folder, config = trial.folder, trial.config
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    last = rows[-1]
    seconds = _timed(rows, read_config(folder)[0])
    median = statistics.median(seconds)
    tokens = config.train.batch_size * config.data.sequence_length
    devices = json.loads((folder / "config.json").read_text(encoding="utf-8"))["devices"]
    result = {
        "name": trial.name,
        "layout": config.layout,
        "mesh": config.mesh.sizes,
        "devices": trial.devices,
        "config": kept.plain(config),
        "device_kind": devices["kind"],
        "parameters": summary["parameters"],
        "steps": [row["step"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "dropped": [row["dropped_fraction"] for row in rows],
        "seconds": [row["step_seconds"] for row in rows],
        "step_seconds": {
            "median": median,
            "p10": quantile(sorted(seconds), 0.1),
            "p90": quantile(sorted(seconds), 0.9),
        },
        "tokens_per_second": tokens / median,
        "tokens_per_second_per_device": tokens / median / trial.devices,
        "mfu": None if summary["mfu"] is None else summary["mfu"] * summary["step_seconds"] / median,
        "eval_loss": summary["eval_loss"],
        "eval_perplexity": summary["eval_perplexity"],
        "load_balancing_loss": last["load_balancing_loss"],
        "experts_used": statistics.fmean(last["layers"]["experts_used"]),
        "expert_shares": last["expert_shares"],
        "router_bias_norm": last["layers"].get("router_bias_norm"),
        "bubble": summary["bubble"],
        **_program(folder, config, devices["kind"]),
    }
    kept.write(trial, result)
    if devices["kind"] == "cpu":  # others' profiles are for other tools
        shutil.rmtree(folder / "profile", ignore_errors=True)
    return kept.result(trial)


def _timed(rows: list[dict], config: Config) -> list[float]:
    """Seconds of the steps that say how fast the run is."""
    first, last = map(int, config.train.profile.split(":"))
    times = [row["step_seconds"] for row in rows if row["step"] > FIRST and not first <= row["step"] <= last + 1]
    return times or [row["step_seconds"] for row in rows]


def _program(folder: Path, config: Config, kind: str) -> dict:
    train, length = config.train, config.data.sequence_length
    unknown = dict.fromkeys(("sent", "flops", "model_flops", "memory", "parts"))
    dumped = buffers.read(folder / kept.DUMPS)
    if dumped is None:
        return unknown
    module, plan = dumped
    with jax.enable_x64(config.model.dtype == "float64"), jax.sharding.use_abstract_mesh(abstract_mesh(config)):
        made = Program(config, platform="cpu")  # of the same shapes on any platform
        state = jax.eval_shape(made.init)
    busy = 1 - pipeline.bubble(made.layout.ways("l"), config.train.accumulation)
    profile = parts.shares(folder / "profile", module) if kind == "cpu" else {}
    return {
        "sent": [dataclasses.asdict(one) for one in program.sent(module, busy)],
        "flops": program.products(module, busy, made.grouped().filled),
        "model_flops": train.batch_size * length * flops_per_token(config.model, length) / config.mesh.devices,
        "memory": buffers.by_kind(module, plan, state) if plan else None,
        "parts": profile or None,
    }
