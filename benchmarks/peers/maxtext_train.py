"""Times MaxText's training step: a Mixtral of the given shape, on the CPU.

The step is the one that MaxText's own loop jits, from its own set-up functions; only the loop around it (logging, data)
is ours.
"""

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import common


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--expert", type=int, default=1, metavar="N", help="devices that share the experts")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share a sequence's heads")
    parser.add_argument("--capacity-factor", type=float, default=1.0, metavar="C", help="0: dropless")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="MaxText's own settings, over these")
    args = parser.parse_args()
    out = common.claim_stdout()

    devices = args.expert * args.tensor
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # without it MaxText looks for Google's cloud services
    os.environ["HF_HUB_OFFLINE"] = "1"
    limit = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # simulated devices wait long for each other
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {limit}".strip()

    folder = tempfile.mkdtemp(prefix="maxtext")
    try:
        step = train_step(settings(args, devices, folder))
        facts = {
            "system": "maxtext",
            "version": version("maxtext"),
            "devices": devices,
            "mesh": {"expert": args.expert, "tensor": args.tensor},
            "capacity_factor": args.capacity_factor or None,
        }
        common.run(args, out, facts, step)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settings(args, devices: int, folder: str) -> list[str]:
    """MaxText's command line, with what was found to be fastest on a CPU."""
    import maxtext

    values = {
        "run_name": "bench",
        "base_output_directory": f"{folder}/runs",
        "jax_cache_dir": f"{folder}/cache",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "dataset_type": "synthetic",
        "packing": False,
        "tokenizer_type": "tiktoken",
        "decoder_block": "mixtral",
        "base_num_decoder_layers": args.layers,
        "base_emb_dim": args.d_model,
        "base_num_query_heads": args.heads,
        "base_num_kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "base_mlp_dim": args.d_ff,
        "base_moe_mlp_dim": args.d_ff,
        "vocab_size": args.vocab,
        "logits_via_embedding": False,
        "max_target_length": args.sequence,
        "per_device_batch_size": args.batch / devices,
        "ici_expert_parallelism": args.expert,
        "ici_tensor_parallelism": args.tensor,
        "ici_fsdp_parallelism": 1,
        "dtype": args.dtype,
        "weight_dtype": "float32",
        "attention": "dot_product",
        "enable_dropout": False,
        "load_balance_loss_weight": 0.01,
        "scan_layers": False,
        "remat_policy": "none",
        "sparse_matmul": False,  # one batched product for all experts; ragged_dot is slower still without drops
        "capacity_factor": args.capacity_factor or -1.0,
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return ["train", str(base), *(f"{key}={value}" for key, value in values.items()), *args.settings]


def train_step(argv: list[str]):
    """The step of `maxtext.trainers.pre_train.train.train_loop`, on one batch of random ids that is used again."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    config, recorder = train.initialize(argv)
    _, _, shardings, _, mesh, _, _, loader, rampup, _, state = train_utils.setup_train_loop(config, recorder)
    model, state = nnx.split(state)
    parameter_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, model, mesh, state, shardings, train.train_step, params_shardings=parameter_shardings
    )
    batch = loader.load_next_batch(rampup_manager=rampup)

    def run():
        nonlocal state
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


if __name__ == "__main__":
    main()
