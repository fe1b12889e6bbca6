"""Results of runs that were never made, for what is made of results."""

import math


def result(name: str = "ma:4x4", devices: int = 16, **changed) -> dict:
    layout = name.rpartition(":")[0]
    steps = list(range(1, 6))
    made = {
        "name": name,
        "layout": layout,
        "devices": devices,
        "config": {
            "model": {"layers": 2, "dtype": "float64", "capacity_factor": 1.0, "capacity_group": 8},
            "data": {"sequence_length": 64},
        },
        "device_kind": "cpu",
        "steps": steps,
        "losses": [8 * math.exp(-step / 10) for step in steps],
        "dropped": [0.1 * step for step in steps],
        "step_seconds": {"median": 0.5, "p10": 0.4, "p90": 0.7},
        "tokens_per_second": 1000.0,
        "tokens_per_second_per_device": 1000.0 / devices,
        "mfu": 0.2,
        "eval_loss": 6.5,
        "eval_perplexity": 665.1,
        "load_balancing_loss": 1.2,
        "experts_used": 1.0,
        "expert_shares": [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]],
        "sent": [
            {"role": "attention", "kind": "all-gather", "times": 4, "operand_bytes": 2e6, "wire_bytes": 6e6},
            {"role": "gradients", "kind": "all-reduce", "times": 1, "operand_bytes": 1e6, "wire_bytes": 1.5e6},
        ],
        "flops": 3e9,
        "model_flops": 2e9,
        "memory": {"parameters": 4e6, "optimizer": 8e6, "batch": 10, "gradients": 5e6, "activations": 3e6},
        "parts": {"communication: attention": 0.25, "experts": 0.75},
        "decode": None,
    }
    return made | changed
