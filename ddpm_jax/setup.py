"""What a config makes before any data is read: the train step, to run it or to plan it."""

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax import data, experiment, objective, training
from ddpm_jax.compiler import compiler_options
from ddpm_jax.config import Config


class Setup:
    """What a config makes before any data is read: network, schedule, optimizer, and the jitted step over the mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = experiment.make_model(config)
        self.schedule = experiment.make_schedule(config)
        self.optimizer, learning_rate = experiment.make_optimizer(config)
        self.init_fn = experiment.make_init_fn(config, self.model)
        self.abstract_state = training.abstract_state(self.init_fn, self.optimizer, mesh)
        self.init_key, self.key = jax.random.split(jax.random.key(config.seed))
        on_device = config.data.placement == "device"
        self.train_step = training.make_train_step(
            mesh,
            jax.tree.map(lambda x: x.sharding, self.abstract_state),
            {name: x.sharding for name, x in self.abstract_batch().items()},
            accumulate=config.train.accumulate,
            compiler_options=compiler_options(mesh.devices.flat[0].platform),
            loss_fn=objective.make_loss_fn(config, self.model, self.schedule),
            optimizer=self.optimizer,
            learning_rate=learning_rate,
            ema_decay=config.optimizer.ema_decay,
            ema_start=config.optimizer.ema_start,
            prepare=data.gather if on_device else lambda batch: batch,
        )

    def abstract_batch(self, num_images: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch as it is sent; ``num_images`` are resident with placement=device."""
        size, shape = self.config.train.batch_size, experiment.image_shape(self.config)
        labelled = bool(self.config.model.num_classes)
        spread, whole = training.batch_sharding(self.mesh), training.replicated(self.mesh)
        if self.config.data.placement != "device":
            batch = {"image": jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=spread)}
            return batch | ({"label": jax.ShapeDtypeStruct((size,), np.int32, sharding=spread)} if labelled else {})
        batch = {
            "index": jax.ShapeDtypeStruct((size,), np.int32, sharding=spread),
            "flip": jax.ShapeDtypeStruct((size,), np.bool_, sharding=spread),
            "images": jax.ShapeDtypeStruct((num_images, *shape), np.uint8, sharding=whole),
        }
        return batch | ({"labels": jax.ShapeDtypeStruct((num_images,), np.int32, sharding=whole)} if labelled else {})
