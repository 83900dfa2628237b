"""Run by test_placement.py on eight host devices; prints what it found as one line of JSON.

A stand-in for two processes: the first owns the devices 0 to 3, the second 4 to 7, and the mesh has them in some order.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax import data, training
from ddpm_jax.data.placement import block_of

BATCH = 16
IMAGES = data.ImageSet(np.arange(40, dtype=np.uint8)[:, None, None, None], None)
ORDER = {"seed": 1, "batch_size": BATCH, "random_flip": False}
ORDERS = {
    "in order": range(8),
    "backwards": range(7, -1, -1),
    "alternating": [0, 4, 1, 5, 2, 6, 3, 7],
    "shuffled": [5, 0, 3, 7, 1, 6, 2, 4],
}


def check(order, fsdp):
    devices = jax.devices()
    mesh = Mesh(np.array([devices[i] for i in order]).reshape(-1, fsdp), ("data", "fsdp"))
    sharding = training.batch_sharding(mesh)
    whole = next(data.batches(IMAGES, **ORDER))["image"]
    index_of = sharding.devices_indices_map(whole.shape)
    rows, right = [], True
    for owned in (devices[:4], devices[4:]):
        rows.append(data.local_rows(sharding, BATCH, owned))
        share = next(data.batches(IMAGES, rows=rows[-1], **ORDER))["image"]
        right &= len(share) == 8
        for device in owned:
            right &= np.array_equal(block_of(share, rows[-1], index_of[device][0]), whole[index_of[device]])
    batch = next(data.device_batches(data.batches(IMAGES, **ORDER), sharding, BATCH))["image"]
    return {
        "rows": [x.tolist() for x in rows],
        "each_device_gets_its_rows": bool(right),
        "arrived": batch.sharding == sharding and np.array_equal(batch, whole),
    }


if __name__ == "__main__":
    found = {fsdp: {name: check(order, fsdp) for name, order in ORDERS.items()} for fsdp in (1, 2, 4)}
    json.dump(found, sys.stdout)
