"""AdamW with warm-up and cosine decay, clipping by global norm, weight decay on matrices."""

import jax
import optax

from maxsep.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of the update after `step` finished ones: linear warm-up, then a cosine to `final_fraction`.

    The first update already has a rate above 0, and the last warm-up step the peak; without a warm-up the first has.
    """
    optimizer, warmup = config.optimizer, _warmup(config)
    end = max(optimizer.decay_steps or config.train.steps, warmup + 1)
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=warmup,
        decay_steps=end,
        end_value=optimizer.learning_rate * optimizer.final_fraction,
    )
    return lambda step: cosine(step + 1)


def _warmup(config: Config) -> int:
    """The first step at the peak."""
    return max(1, config.optimizer.warmup_steps)


def warnings(config: Config, done: int = 0) -> list[str]:
    """What a user may not expect of the learning rate after `done` steps of a run, whose config `resolve` completed."""
    optimizer, steps, warmup = config.optimizer, config.train.steps, _warmup(config)
    found = []
    if done < steps < warmup:
        why = f"optimizer.warmup_steps is {warmup}, train.steps {steps}"
        found.append(f"the learning rate does not reach its peak: {why}; the last step has {steps / warmup:.0%} of it")
    if optimizer.decay_steps <= warmup < steps and done <= warmup and optimizer.final_fraction < 1:
        why = f"optimizer.decay_steps, set when the run was started, is {optimizer.decay_steps}"
        fall = f"the learning rate falls from its peak to {optimizer.final_fraction:.0%} of it after step {warmup}"
        found.append(f"{fall}: {why}, which leaves no steps for the cosine")
    return [f"warning: {line}" for line in found]


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
