"""AdamW with warm-up and cosine decay, clipping by global norm, weight decay on matrices."""

import jax
import optax

from maxsep.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of the update after `step` finished ones: linear warm-up, then a cosine to `final_fraction`.

    The first update already has a rate above 0, and the last warm-up step the peak.
    """
    optimizer = config.optimizer
    end = max(optimizer.decay_steps or config.train.steps, optimizer.warmup_steps + 1)
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=end,
        end_value=optimizer.learning_rate * optimizer.final_fraction,
    )
    return lambda step: cosine(step + 1)


def decayed(params) -> dict:
    """Which parameters decay: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def adamw(config: Config) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov and Hutter 2019), after clipping by the global norm."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(config)),
    )
