"""Times decoding of MaxText: its MaxEngine on a dropless Mixtral of the given shape, greedy, on the CPU.

The engine is the one that `maxtext.inference.decode` drives; token ids are made here.
"""

import contextlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import common


def main() -> None:
    parser = common.flags(__doc__, common.DECODE)
    parser.add_argument("--expert", type=int, default=1, metavar="N", help="devices that share the experts")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share a sequence's heads")
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
        facts = {
            "system": "maxtext",
            "version": version("maxtext"),
            "devices": devices,
            "mesh": {"expert": args.expert, "tensor": args.tensor},
        }
        common.run_decode(args, out, facts, *decoder(args, settings(args, devices, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settings(args, devices: int, folder: str) -> list[str]:
    """MaxText's command line. Without drops it computes every expert on every token; `ragged_dot` does too."""
    import maxtext

    values = {
        "run_name": "bench",
        "base_output_directory": f"{folder}/runs",
        "jax_cache_dir": f"{folder}/cache",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
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
        "max_target_length": args.context + args.new,
        "max_prefill_predict_length": args.context,
        "per_device_batch_size": args.batch / devices,
        "ici_expert_parallelism": args.expert,
        "ici_tensor_parallelism": args.tensor,
        "ici_fsdp_parallelism": 1,
        "ici_autoregressive_parallelism": 1,
        "dtype": args.dtype,
        "weight_dtype": args.dtype,
        "attention": "dot_product",
        "enable_dropout": False,
        "scan_layers": False,
        "sparse_matmul": False,
        "capacity_factor": -1.0,
        "decode_sampling_strategy": "greedy",
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return ["decode", str(base), *(f"{key}={value}" for key, value in values.items()), *args.settings]


def decoder(args, argv: list[str]):
    """Prefill, which the engine does one prompt at a time, and step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from maxtext.configs import pyconfig
    from maxtext.inference.maxengine import maxengine

    # Without JetStream the engine's result is a stand-in that jit does not know as a tree.
    result = maxengine.engine_api.ResultTokens
    with contextlib.suppress(ValueError):  # it is one
        jax.tree_util.register_pytree_node(
            result,
            lambda r: ((r.data, r.log_prob), (r.tokens_idx, r.valid_idx, r.length_idx, r.samples_per_slot)),
            lambda meta, data: result(
                data=data[0],
                log_prob=data[1],
                tokens_idx=meta[0],
                valid_idx=meta[1],
                length_idx=meta[2],
                samples_per_slot=meta[3],
            ),
        )
    engine = maxengine.MaxEngine(pyconfig.initialize(argv))
    params, rng = engine.load_params(rng=jax.random.PRNGKey(0)), jax.random.PRNGKey(1)
    prompts = np.random.RandomState(0).randint(0, args.vocab, (args.batch, args.context)).astype(np.int32)
    state = None

    def prefill():
        nonlocal state
        state = engine.init_decode_state(rng)
        for slot in range(args.batch):
            prompt = jnp.asarray(prompts[slot])
            found, _ = engine.prefill(params=params, padded_tokens=prompt, true_length=args.context, rng=rng, slot=slot)
            state = engine.insert(found, state, slot=slot)
        jax.block_until_ready(jax.tree.leaves(state))

    def step():
        nonlocal state
        state, found = engine.generate(params, state, rng=rng)
        found.data.block_until_ready()

    return prefill, step


if __name__ == "__main__":
    main()
