"""Times decoding of MaxText: its MaxEngine on a dropless Mixtral of the given shape, greedy, on the CPU.

The engine is the one that `maxtext.inference.decode` drives; token ids are made here.
"""

import contextlib

import common
import mixtral


def main() -> None:
    args = mixtral.maxtext_flags(common.flags(__doc__, common.DECODE)).parse_args()
    out = common.claim_stdout()
    with mixtral.maxtext_devices(args) as (facts, folder):
        settings = {
            "weight_dtype": args.dtype,
            "capacity_factor": -1.0,  # without drops it computes every expert on every token
            "max_prefill_predict_length": args.context,
            "ici_autoregressive_parallelism": 1,
            "decode_sampling_strategy": "greedy",
        }
        argv = mixtral.maxtext_settings("decode", args, folder, args.context + args.new, settings)
        common.run_decode(args, out, facts, *decoder(args, argv))


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
