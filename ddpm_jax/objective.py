"""What a run minimises: Config -> a loss of a batch of images."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax import diffusion, experiment, models, training
from ddpm_jax import normalizer as normalizer_lib
from ddpm_jax.config import Config


def make_loss_fn(config: Config, model: models.Network, schedule: diffusion.Schedule) -> training.LossFn:
    """``loss_fn(params, batch, keys) -> (loss, sums)`` of a batch of uint8 images, one key an example.

    t is drawn evenly from the table's 0 .. T-1 (Ho et al. 2020, algorithm 1) or, with ``diffusion.time="continuous"``,
    u evenly from [0, 1). The sums are those of the loss and of the number of examples in each quarter of the range of t
    or of u, [4] each.
    """
    settings, normalizer = config.diffusion, experiment.make_normalizer(config)
    bounds = normalizer_lib.clip_bounds(normalizer)
    continuous = settings.time == "continuous"
    end_of_time = 1.0 if continuous else settings.num_timesteps

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        t_key, eps_key, label_key, dropout_key = jax.random.split(key, 4)
        time = jax.random.uniform(t_key) if continuous else jax.random.randint(t_key, (), 0, settings.num_timesteps)
        eps = jax.random.normal(eps_key, experiment.image_shape(config))
        return time, eps, jax.random.bernoulli(label_key, config.model.label_dropout), dropout_key

    def loss_fn(params: training.Params, batch: training.Batch, keys: jax.Array) -> tuple[jax.Array, training.Metrics]:
        time, eps, unlabelled, dropout_keys = jax.vmap(draw)(keys)
        table, t = schedule, time
        if continuous:  # a table of this batch's own noise levels, one an example
            table, t = diffusion.schedule_at(settings.schedule, time), jnp.arange(time.size)
        x0 = normalizer_lib.normalize(normalizer, batch["image"])
        x_t = diffusion.q_sample(table, x0, t, eps)
        label = None
        if config.model.num_classes:
            label = jnp.where(unlabelled, config.model.num_classes, batch["label"])
        rngs = {"dropout": dropout_keys[0]}  # one mask for the whole batch
        told = experiment.network_time(model, table, t)
        applied: Any = model.apply({"params": params}, x_t, told, label, train=True, rngs=rngs)
        output, variance_output = diffusion.split_output(applied, x_t)
        target = diffusion.target(settings.prediction, table, x0, eps, t)
        losses = diffusion.loss(settings.loss, output, target)
        losses *= diffusion.weight(settings.loss_weight, settings.prediction, table, t, snr_gamma=settings.snr_gamma)
        if variance_output is not None:
            losses += diffusion.variance_loss(
                schedule, settings.prediction, output, variance_output, x0, x_t, t, bounds=bounds
            )
        quarter = jax.nn.one_hot((4 * time // end_of_time).astype(jnp.int32), 4)
        return losses.mean(), {"loss_sums": (losses[:, None] * quarter).sum(0), "loss_counts": quarter.sum(0)}

    return loss_fn
