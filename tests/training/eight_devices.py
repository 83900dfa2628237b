"""Run by test_mesh.py on eight host devices; prints what it measured as one line of JSON."""

import json
import math
import sys
import tempfile

import jax
import numpy as np

from ddpm_jax import config, experiment, objective, planning, training
from ddpm_jax.planning.collectives import OPS
from ddpm_jax.training import mesh as mesh_lib

CONFIG = config.Config(
    data=config.DataConfig(image_size=8, channels=1),
    model=config.ModelConfig(base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=()),
    diffusion=config.DiffusionConfig(num_timesteps=50),
    optimizer=config.OptimizerConfig(learning_rate=1e-3),
)
STEPS, BATCH = 3, 32


def bytes_of(state, share):
    return sum(math.prod(share(x)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def moves_to_another_mesh(state, abstract_of):
    """Saved on one mesh, restored on another."""
    abstract = abstract_of(training.make_mesh(8, 1))
    with tempfile.TemporaryDirectory() as workdir, training.open_checkpoints(workdir) as checkpoints:
        training.save(checkpoints, state)
        checkpoints.wait_until_finished()
        found = training.restore_latest(checkpoints, abstract)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True))
    return {
        "cut": sum(not old.is_fully_replicated for old, _, _ in pairs),
        "same_bits": all(np.asarray(old).tobytes() == np.asarray(new).tobytes() for old, new, _ in pairs),
        "on_the_new_mesh": all(new.sharding == wanted.sharding for _, new, wanted in pairs),
    }


def sent(compiled, mesh):
    """Bytes of each collective's results; by how often they run when a loop counts for a hundred."""
    hlo = compiled.as_text()
    once, often = (planning.collectives_of(hlo, mesh.size, trips) for trips in (1, 100))
    found = {op: sum(x.bytes for x in once if x.op == op) for op in OPS}
    return found | {"in_loops": sum(x.number for x in often) - sum(x.number for x in once)}


def run(data, fsdp, accumulate=1):
    mesh = training.make_mesh(data, fsdp)
    model = experiment.make_model(CONFIG)
    optimizer, learning_rate = experiment.make_optimizer(CONFIG)
    init_fn = experiment.make_init_fn(CONFIG, model)
    abstract = training.abstract_state(init_fn, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    spread = training.batch_sharding(mesh)
    step = training.make_train_step(
        mesh,
        shardings,
        {"image": spread},
        accumulate=accumulate,
        loss_fn=objective.make_loss_fn(CONFIG, model, experiment.make_schedule(CONFIG)),
        optimizer=optimizer,
        learning_rate=learning_rate,
        ema_decay=0.99,
    )
    state = training.init_state(init_fn, optimizer, mesh, jax.random.key(0))
    found = {
        "devices": mesh.size,
        "as_described": all(
            x.sharding == s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
        ),
        "params_sum": float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(state.params))),
        "bytes": bytes_of(state, lambda x: x.shape),
        "bytes_a_device": bytes_of(state, lambda x: x.addressable_shards[0].data.shape),
        "whole_and_large": sum(
            x.addressable_shards[0].data.shape == x.shape and x.size >= mesh_lib.MIN_SHARDED_SIZE
            for x in jax.tree.leaves(state)
        ),
    }
    cut = [x for x in jax.tree.leaves(abstract.params) if not x.sharding.is_fully_replicated]
    found["cut_gradients"] = bytes_of(cut, lambda x: x.shape)
    found["cut_arrays"] = len(cut)
    folded = [x for path, x in jax.tree.leaves_with_path(abstract.params) if "upsample" in str(path) and x.ndim == 4]
    found["unfolded"] = bytes_of(folded, lambda x: x.shape) * 7 // 9
    found["gradients"] = bytes_of(abstract.params, lambda x: x.shape)
    images = jax.ShapeDtypeStruct((BATCH, 8, 8, 1), np.uint8, sharding=spread)
    found["sent"] = sent(step.lower(state, {"image": images}, jax.random.key(1)).compile(), mesh)
    losses, counts, norms = [], [], []
    for n in range(STEPS):
        images = np.random.default_rng(n).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
        batch = {"image": jax.make_array_from_process_local_data(spread, images)}
        state, metrics = step(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        counts.append(np.asarray(metrics["loss_counts"]).tolist())
    stays = all(x.sharding == s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    if fsdp == 4:
        found["moved"] = moves_to_another_mesh(state, lambda mesh: training.abstract_state(init_fn, optimizer, mesh))
    return found | {"losses": losses, "norms": norms, "counts": counts, "compiled": step._cache_size(), "stays": stays}


def refusals():
    found = {}
    for data, fsdp in ((9, 1), (4, 4), (-1, 3), (0, 1)):
        try:
            training.make_mesh(data, fsdp)
        except ValueError as error:
            found[f"{data},{fsdp}"] = str(error)
    return found


if __name__ == "__main__":
    mesh_lib.MIN_SHARDED_SIZE = 512  # so that this small network is cut
    sizes = {"1": (1, 1), "8": (8, 1), "2x4": (2, 4), "4x2": (4, 2), "8 in 4": (8, 1, 4), "4x2 in 4": (4, 2, 4)}
    runs = {name: run(*size) for name, size in sizes.items()}
    all_devices = {"-1,1": dict(training.make_mesh(-1, 1).shape), "-1,4": dict(training.make_mesh(-1, 4).shape)}
    json.dump({"runs": runs, "refusals": refusals(), "all": all_devices}, sys.stdout)
