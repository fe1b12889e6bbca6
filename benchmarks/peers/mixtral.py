"""The model of the peers: a Mixtral of the flags' shape, as transformers and MaxText are told of it."""

import argparse
import contextlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path


def transformers_config(args: argparse.Namespace, positions: int, experts_implementation: str):
    """`MixtralConfig`, of sequences of up to `positions` tokens."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=args.vocab,
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=positions,
        sliding_window=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        experts_implementation=experts_implementation,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def transformers_facts(name: str) -> dict:
    """Of a system that is called `name`; and torch is told to use all cores."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return {
        "system": name,
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "devices": 1,
        "mesh": {},
    }


def maxtext_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--expert", type=int, default=1, metavar="N", help="devices that share the experts")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that share a sequence's heads")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="MaxText's own settings, over these")
    return parser


@contextlib.contextmanager
def maxtext_devices(args: argparse.Namespace):
    """Simulated ones, for MaxText that is not imported yet; the facts of the system, and a folder while it runs."""
    devices = args.expert * args.tensor
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # without it MaxText looks for Google's cloud services
    os.environ["HF_HUB_OFFLINE"] = "1"
    limit = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # simulated devices wait long for each other
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {limit}".strip()
    facts = {
        "system": "maxtext",
        "version": version("maxtext"),
        "devices": devices,
        "mesh": {"expert": args.expert, "tensor": args.tensor},
    }
    folder = tempfile.mkdtemp(prefix="maxtext")
    try:
        yield facts, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def maxtext_settings(command: str, args: argparse.Namespace, folder: str, positions: int, others: dict) -> list[str]:
    """MaxText's command line: what was found to be fastest on a CPU, `others` over it, the flags' settings last."""
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
        "max_target_length": positions,
        "per_device_batch_size": args.batch / (args.expert * args.tensor),
        "ici_expert_parallelism": args.expert,
        "ici_tensor_parallelism": args.tensor,
        "ici_fsdp_parallelism": 1,
        "dtype": args.dtype,
        "attention": "dot_product",
        "enable_dropout": False,
        "scan_layers": False,
        "sparse_matmul": False,  # one batched product for all experts; ragged_dot computes them all too, slower
    } | others
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return [command, str(base), *(f"{key}={value}" for key, value in values.items()), *args.settings]
