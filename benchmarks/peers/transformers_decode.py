"""Times decoding of Hugging Face transformers: a Mixtral of the given shape, greedy, on all cores of a CPU."""

import os

import common


def main() -> None:
    parser = common.flags(__doc__, common.DECODE)
    variants = ["grouped_mm", "batched_mm", "eager"]
    parser.add_argument(
        "--variant", choices=variants, default="grouped_mm", help="transformers' experts_implementation"
    )
    args = parser.parse_args()
    out = common.claim_stdout()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    facts = {
        "system": f"transformers {args.variant}",
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "devices": 1,
        "mesh": {},
    }
    with torch.inference_mode():
        common.run_decode(args, out, facts, *decoder(args))


def decoder(args):
    """Prefill and step: the model's own forward pass with a cache, which is less work than its `generate`."""
    import torch
    from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=args.vocab,
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.context + args.new,
        sliding_window=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        experts_implementation=args.variant,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = MixtralForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    prompts = torch.randint(0, args.vocab, (args.batch, args.context))
    cache = token = None

    def forward(ids):
        nonlocal token
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)

    def prefill():
        nonlocal cache
        cache = DynamicCache(config=config)
        forward(prompts)

    return prefill, lambda: forward(token)


if __name__ == "__main__":
    main()
