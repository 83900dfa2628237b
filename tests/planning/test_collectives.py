"""Collectives read from HLO: written by hand, and compiled for eight CPU devices."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ddpm_jax.planning import Collective, collectives_of, wire_bytes

HLO = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-reduce(%h), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %g)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%fused.1 (p: bf16[4,2]) -> bf16[8,2] {
  %ag.1 = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
}

%fused.2 (p: bf16[4,2]) -> bf16[8,2] {
  ROOT %ag.2 = bf16[8,2]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
}

%never (p: f32[100]) -> f32[100] {
  ROOT %no = f32[100]{0} all-reduce(%p), channel_id=9, replica_groups={}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  %f = bf16[8,2]{1,0} fusion(%b), kind=kCustom, calls=%fused.1
  %c = bf16[8,2]{1,0} fusion(%f), kind=kCustom, calls=%fused.2
  %two = (f32[3]{0}, /*index=1*/bf16[5]{0}) all-reduce(%p, %q), channel_id=3, GROUPS, to_apply=%add
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%r), channel_id=4, replica_groups={}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %s = f32[2]{0} reduce-scatter(%t), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  %u = f32[2]{0} reduce-scatter(%v), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %z = f32[8]{0} add(%y, %done)
}
""".replace("GROUPS", "replica_groups=mesh['x'=4,'y'=2], device_ids=([4,2]T(1,0)) {'x'}")


def test_what_is_counted():
    assert collectives_of(HLO, 8, trip_count=3) == [
        Collective("all-gather", 2, 8 * 2 * 2, 1),  # once, though two fusions name it
        Collective("all-gather", 8, 8 * 4, 1),  # the result, not the operand
        Collective("all-reduce", 4, 3 * 8 * 4 + 3 * 4 + 5 * 2, 4),  # three in the loop, and one of a pair of arrays
        Collective("reduce-scatter", 8, 2 * 2 * 4, 2),  # shard_map gives all of its own one channel
    ]


@pytest.mark.parametrize(
    ("op", "expected"),
    [("all-reduce", 2 * 3 / 4 * 400), ("all-gather", 300), ("reduce-scatter", 3 * 400), ("collective-permute", 400)],
)
def test_what_a_ring_sends(op, expected):
    # An all-reduce is a reduce-scatter to a quarter and an all-gather back: 3 x 100 each.
    assert wire_bytes(Collective(op, 4, 400, 1)) == pytest.approx(expected)
    assert wire_bytes(Collective(op, 1, 400, 1)) == 0


# A data-parallel gradient over eight devices, in a loop of three, and weights gathered over them.
_EIGHT = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ddpm_jax.planning import collectives_of
mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
def loss(w, x):
    return ((x @ w) ** 2).mean()
def looped(w, x):
    body = lambda total, _: (total + jax.grad(loss)(w + total, x), None)
    return jax.lax.scan(body, jnp.zeros_like(w), None, length=3)[0]
w, x = jnp.ones((16, 32)), jnp.ones((64, 16))
def found(f, w_sharding, trip_count):
    step = jax.jit(f, in_shardings=(w_sharding, spread), out_shardings=whole)
    return [c._asdict() for c in collectives_of(step.lower(w, x).compile().as_text(), 8, trip_count)]
print(json.dumps([found(jax.grad(loss), whole, 1), found(looped, whole, 3), found(lambda w, x: w + 1, spread, 1)]))
"""


def test_compiled_programs():
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", _EIGHT], env=env, capture_output=True, text=True, check=True)
    once, looped, gathered = json.loads(done.stdout)
    gradient = {"op": "all-reduce", "group_size": 8, "bytes": 16 * 32 * 4, "number": 1}
    assert once == [gradient]
    assert looped == [gradient | {"bytes": 3 * 16 * 32 * 4, "number": 3}]
    assert gathered == [gradient | {"op": "all-gather"}]
