"""What a run costs on a TPU slice: ``python -m ddpm_jax.plan --config configs/cifar10.py --topology v5e:4x4``.

Compiles the train step (with ``--program sample`` the sampler) ahead of time with libtpu, on a machine without a TPU,
and prints what each device holds, computes, moves and sends in a step, and how long that takes at least.
"""

import copy
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, experiment, planning, program, training
from ddpm_jax.config import Config, ConfigError
from ddpm_jax.setup import Setup

FLAGS = flags.FLAGS
_MAX_DOUBLINGS = 6
Plan = dict[str, Any]


def define_flags() -> None:
    """The program's flags."""
    program.define_config()
    flags.DEFINE_string("topology", None, "The slice, as chip:shape, such as v5e:2x4; chips: v3, v4, v5e, v5p, v6e.")
    flags.DEFINE_enum("program", "train", ["train", "sample"], "What to compile.")
    flags.DEFINE_integer("batch_size", None, "Over all devices; left out: train.batch_size, or train.num_samples.")
    flags.DEFINE_integer("fsdp", None, "Stands for config.mesh.fsdp.")
    flags.DEFINE_string("dtype", None, "Stands for config.dtype; auto is bfloat16, as on a TPU.")
    flags.DEFINE_string("remat", None, "Stands for config.train.remat.")
    flags.DEFINE_string("json", None, "Also write the numbers to this file.")
    flags.DEFINE_integer("weak_scaling", 0, "Also say what slices of up to so many chips do, on paper.", lower_bound=0)
    flags.DEFINE_bool("sweep", False, "Double the batch until it does not fit, and print a table.")


def plan(config: Config, topology: str, what: str = "train", weak_scaling: int = 0) -> Plan:
    """What one step costs each device of a slice, and how long it takes at least (a roofline).

    A step of the sampler is one call of the denoiser. FLOPs and bytes are the compiler's own count, and its bytes are
    those of every operand, also of one that stays in on-chip memory: ``memory_s`` errs on the long side.

    Args:
        config: the experiment; ``train.batch_size`` is the batch over all devices, ``dtype`` "auto" is bfloat16.
        topology: "v5e:2x4".
        what: "train" or "sample", whose batch is ``train.num_samples``.
        weak_scaling: chips; adds ``weak_scaling``, the same work a device on slices of up to so many, on paper.

    Returns:
        topology, devices, device_kind, batch_size, params; bytes on a device: argument_bytes, temp_bytes, hbm_bytes
        (what there is), fits; a step on a device: flops, bytes, collectives [{op, bytes, count}], compute_s, memory_s,
        collective_s, bound, mfu_limit. Where it does not fit, what only a compiled program tells is None.

    Raises:
        ConfigError: no such slice, or it cannot run this config; libtpu is missing.
    """
    config = copy.deepcopy(config)
    config.dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    config_lib.validate(config)
    experiment.use_compilation_cache(config)
    devices = _devices(topology)
    device = planning.device_of(topology.partition(":")[0])
    mesh = experiment.make_mesh(config, devices) if what == "train" else _sampling_mesh(config, devices)
    setup = Setup(config_lib.with_stand_in_normalizer(config), mesh)
    arguments, jitted = (_train_step if what == "train" else _sampler)(setup)
    found: Plan = {
        "topology": topology,
        "devices": mesh.size,
        "device_kind": devices[0].device_kind,
        "batch_size": config.train.batch_size if what == "train" else config.train.num_samples,
        "params": sum(math.prod(x.shape) for x in jax.tree.leaves(setup.abstract_state.params)),
        "argument_bytes": _bytes_on_device(arguments),
        "temp_bytes": None,
        "hbm_bytes": device.hbm_bytes,
        "fits": False,
    } | dict.fromkeys(["flops", "bytes", "collectives", *planning.Roofline._fields])
    try:
        with warnings.catch_warnings():  # what the cache holds of an earlier plan, only a machine with a TPU can read
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = planning.temp_bytes_wanted(str(error), found["argument_bytes"])
        if wanted is None:
            raise
        return found | {"temp_bytes": wanted}
    trips = _trips(config, what, mesh.devices.flat[0].platform)
    return found | _costs(compiled, device, mesh, _bytes_on_device(setup.abstract_state), trips, weak_scaling)


def _trips(config: Config, what: str, platform: str) -> int:
    """How often the loop over micro-batches runs; a CPU has none, they are unrolled there (training/gradient.py)."""
    return config.train.accumulate if what == "train" and platform != "cpu" else 1


def _costs(compiled: Any, device: planning.Device, mesh: Mesh, state_bytes: int, trips: int, weak_scaling: int) -> Plan:
    """What a compiled step says of itself, and what follows."""
    cost = planning.cost_of(compiled, state_bytes, trips)
    collectives = planning.collectives_of(compiled.as_text(), mesh.size, trips)
    coordinates = _coordinates(mesh)
    step = planning.roofline(device, cost, collectives, planning.links(device, coordinates))
    fits = cost.argument_bytes + cost.temp_bytes <= device.hbm_bytes
    found = cost._asdict() | {"fits": fits, "collectives": _by_op(collectives)} | step._asdict()
    if weak_scaling:
        shape = [len(set(axis)) for axis in zip(*coordinates, strict=True)]
        scales = planning.weak_scaling(device, shape, step, collectives, fsdp=mesh.shape["fsdp"], most=weak_scaling)
        found["weak_scaling"] = [scale._asdict() for scale in scales]
    return found


def _devices(topology: str) -> list[Any]:
    """The devices of a slice that is not there."""
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError("libtpu is missing, the compiler of TPU programs; pip install 'ddpm_jax[tpu]'")
    try:
        planning.device_of(topology.partition(":")[0])
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        chips = ", ".join(planning.CHIPS)
        raise ConfigError(
            f"--topology={topology}: {str(error).splitlines()[0]:.200}; use chip:shape, such as v5e:2x4, chips {chips}"
        ) from None


def _sampling_mesh(config: Config, devices: list[Any]) -> Mesh:
    """That of ``python -m ddpm_jax.sample``: a batch over all devices, the network on each."""
    if config.train.num_samples % len(devices):
        raise ConfigError(f"--batch_size={config.train.num_samples}: must be divisible by the {len(devices)} devices")
    return training.make_mesh(devices=devices)


def _train_step(setup: Setup) -> tuple[tuple[Any, ...], Any]:
    """What a train step takes, and the step."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return (setup.abstract_state, setup.abstract_batch(), key), setup.train_step


def _sampler(setup: Setup) -> tuple[tuple[Any, ...], Any]:
    """What the sampler takes, and the sampler: the whole chain in one program."""
    config, spread = setup.config, training.batch_sharding(setup.mesh)
    number = config.train.num_samples
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), number))
    shapes = [((number, *experiment.image_shape(config)), jnp.dtype("float32")), (keys.shape, keys.dtype)]
    shapes += [((number,), jnp.dtype("int32"))] if config.model.num_classes else []
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=spread) for shape in shapes]

    def sample(params: Any, x_T: jax.Array, keys: jax.Array, labels: jax.Array | None = None) -> Any:
        denoise_fn = experiment.make_denoise_fn(setup.model, params, setup.schedule)
        denoise_fn = experiment.conditioned(denoise_fn, config, labels)
        options = experiment.sampling_options(config) | {"compiler_options": None}  # those of this machine
        return diffusion.sample(denoise_fn, setup.schedule, x_T, keys, **options)

    return (setup.abstract_state.params, *arrays), jax.jit(sample)


def _coordinates(mesh: Mesh) -> list[tuple[int, ...]]:
    """Of the chips that the mesh's devices are on."""
    return [tuple(x.coords) for x in mesh.devices.flat]


def _bytes_on_device(tree: Any) -> int:
    shapes = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes)


def _by_op(collectives: list[planning.Collective]) -> list[dict[str, Any]]:
    totals: dict[str, dict[str, Any]] = {}
    for x in collectives:
        total = totals.setdefault(x.op, {"op": x.op, "bytes": 0, "count": 0})
        total["bytes"], total["count"] = total["bytes"] + x.bytes, total["count"] + x.number
    return list(totals.values())


def describe(found: Plan) -> str:
    """A plan for people."""
    gib = {name: (found[name] or 0) / 2**30 for name in ("argument_bytes", "temp_bytes", "hbm_bytes")}
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    lines = [
        f"{found['topology']}: {found['devices']} devices ({found['device_kind']}), batch {found['batch_size']:,}",
        f"  parameters        {found['params']:,}",
        f"  HBM a device      {gib['argument_bytes']:.2f} GiB arguments + {gib['temp_bytes']:.2f} GiB temporaries "
        f"of {gib['hbm_bytes']:.0f} GiB: {fits}",
    ]
    if not found["fits"] and found["flops"] is None:
        return "\n".join(lines)
    lines += [
        f"  arithmetic        {found['flops'] / 1e12:.3f} TFLOP, {1e3 * found['compute_s']:.3f} ms at peak",
        f"  memory traffic    {found['bytes'] / 1e9:.3f} GB, {1e3 * found['memory_s']:.3f} ms at peak",
        f"  collectives       {1e3 * found['collective_s']:.3f} ms at peak",
        *(f"    {x['op']:<18}{x['bytes'] / 1e6:.3f} MB in {x['count']}" for x in found["collectives"]),
        f"  limited by        {found['bound']}: {1e3 * _step_seconds(found):.3f} ms a step at least, "
        f"{found['batch_size'] / _step_seconds(found):,.0f} images a second, MFU {found['mfu_limit']:.0%} at most",
    ]
    for scale in found.get("weak_scaling", []):
        lines.append(
            f"  on {scale['chips']:>4} chips      {1e3 * scale['collective_s']:.3f} ms of messages; "
            f"{scale['hidden']:.1%} of the work a second a device, {scale['exposed']:.1%} where nothing hides them"
        )
    return "\n".join(lines)


def _step_seconds(found: Plan) -> float:
    return max(found["compute_s"], found["memory_s"], found["collective_s"])


def sweep(config: Config, topology: str, what: str = "train") -> Iterator[Plan]:
    """Plans with the batch doubled each time, up to the first one that does not fit."""
    config = copy.deepcopy(config)
    for _ in range(_MAX_DOUBLINGS + 1):
        found = plan(config, topology, what)
        yield found
        if not found["fits"]:
            return
        config.train.batch_size, config.train.num_samples = config.train.batch_size * 2, config.train.num_samples * 2


_HEADER = (
    f"{'batch':>8} {'HBM GiB':>8} {'fits':>5} {'compute':>9} {'memory':>9} {'collect.':>9} {'bound':>10} {'MFU <=':>7}"
)


def _row(found: Plan) -> str:
    used = (found["argument_bytes"] + found["temp_bytes"]) / 2**30
    start = f"{found['batch_size']:>8,} {used:>8.2f} {'yes' if found['fits'] else 'no':>5}"
    if found["flops"] is None:
        return start
    times = " ".join(f"{1e3 * found[name]:>6.2f} ms" for name in ("compute_s", "memory_s", "collective_s"))
    return f"{start} {times} {found['bound']:>10} {found['mfu_limit']:>7.0%}"


def _with_overrides(config: Config) -> Config:
    batch = "train.batch_size" if FLAGS.program == "train" else "train.num_samples"
    for field, value in (
        (batch, FLAGS.batch_size),
        ("mesh.fsdp", FLAGS.fsdp),
        ("dtype", FLAGS.dtype),
        ("train.remat", FLAGS.remat),
    ):
        if value is not None:
            section, _, name = field.rpartition(".")
            setattr(config_lib.get(config, section) if section else config, name, value)
    config_lib.validate(config)
    return config


def _check_flags() -> None:
    """What would be ignored, or fail only when minutes of compiling are over."""
    if not FLAGS.topology:
        raise ConfigError("--topology is missing: the slice to plan for, such as --topology v5e:2x4")
    if FLAGS.fsdp is not None and FLAGS.program == "sample":
        raise ConfigError(f"--fsdp={FLAGS.fsdp}: a sampler has the whole network on each device; leave it out")
    if FLAGS.sweep and FLAGS.weak_scaling:
        raise ConfigError(f"--weak_scaling={FLAGS.weak_scaling}: is of one plan; leave out --sweep")
    if FLAGS.json:
        try:
            epath.Path(FLAGS.json).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--json={FLAGS.json}: {error}") from None


def main() -> None:
    """The program."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to be asked about
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nor one that two plans could fight over
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # libtpu complains where it cannot find it out
    jax.config.update("jax_platforms", "cpu")
    config = _with_overrides(program.loaded_config()[0])
    _check_flags()
    result: Plan | list[Plan]
    if FLAGS.sweep:
        print(f"{FLAGS.topology}\n{_HEADER}", flush=True)
        result = []
        for found in sweep(config, FLAGS.topology, FLAGS.program):
            result.append(found)
            print(_row(found), flush=True)
    else:
        result = plan(config, FLAGS.topology, FLAGS.program, FLAGS.weak_scaling)
        print(describe(result))
    if FLAGS.json:
        epath.Path(FLAGS.json).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {FLAGS.json}", file=sys.stderr)


if __name__ == "__main__":
    program.run(main, define_flags, alone=True)
