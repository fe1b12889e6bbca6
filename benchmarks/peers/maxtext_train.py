"""Times MaxText's training step: a Mixtral of the given shape, on the CPU.

The step is the one that MaxText's own loop jits, from its own set-up functions; only the loop around it (logging, data)
is ours.
"""

import common
import mixtral


def main() -> None:
    parser = mixtral.maxtext_flags(common.flags(__doc__))
    parser.add_argument("--capacity-factor", type=float, default=1.0, metavar="C", help="0: dropless")
    args = parser.parse_args()
    out = common.claim_stdout()
    with mixtral.maxtext_devices(args) as (facts, folder):
        settings = {
            "weight_dtype": "float32",
            "capacity_factor": args.capacity_factor or -1.0,
            "load_balance_loss_weight": 0.01,
            "remat_policy": "none",
            "dataset_type": "synthetic",
            "packing": False,
            "enable_tensorboard": False,
        }
        step = train_step(mixtral.maxtext_settings("train", args, folder, args.sequence, settings))
        common.run(args, out, facts | {"capacity_factor": args.capacity_factor or None}, step)


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
