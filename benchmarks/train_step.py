"""One optimizer step and one denoising step, beside diffusers' ``UNet2DModel`` in PyTorch doing the same work.

    python -m benchmarks.train_step                                   # 9 M parameters, 32x32, batch 16
    python -m benchmarks.train_step --batch 512 --rounds 50 --json out.json          # on a GPU

Ours is the train step of ``ddpm_jax.train`` (noise, loss, gradient, clip, Adam, average of the parameters) and its
``denoise_fn``. PyTorch's is the same network, checked by its number of parameters, with noise drawn, mean squared
error, ``clip_grad_norm_``, fused Adam and a ``_foreach`` average. On a CPU it runs in float32, in the default layout
and in channels_last; on a GPU under bfloat16 autocast with TF32 on, in both layouts, with and without
``torch.compile``. All contenders take turns in every round, and so does the large matmul that stands for the
machine's peak. Each timed step follows one of the same contender's that is not, as it does in a training run: what a
contender left in the caches, and threads that it left spinning, are not charged to the next one.

Prints, for each of the two kinds of step, a line a contender: median and quartiles in ms, images/s, how many times as
fast ours is (theirs / ours, above 1: ours is faster) and the inverse, and the share of the matmul peak. A train step
counts as three forward passes.

Measure on an idle machine: on cores that others use, PyTorch's OpenMP threads wait for each other in a spin and take up
to ten times as long, XLA's only their share, and the ratio flatters.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

# Two frameworks share the device, so neither may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from benchmarks import network, timing
from ddpm_jax import experiment, training
from ddpm_jax.compiler import compiler_options, num_cores, use_cores
from ddpm_jax.config import Config
from ddpm_jax.models.layers import default_num_groups

OURS = "ddpm_jax"
PEAK = "matmul"
KINDS = ("train step", "denoising step")


def our_steps(config: Config) -> tuple[dict[str, Callable[[], object]], float, int]:
    """The two steps, the FLOPs of a forward pass as XLA counts them, and the number of parameters."""
    trainer = network.Trainer(config)
    params = jax.tree.map(jnp.copy, trainer.state.ema_params)  # the state is donated to every step
    denoise_fn = experiment.make_denoise_fn(trainer.setup.model, params, trainer.setup.schedule)
    x_t = jax.random.normal(jax.random.key(1), (config.train.batch_size, *experiment.image_shape(config)))
    x_t, t = jax.device_put((x_t, jnp.full(x_t.shape[:1], 500)), training.batch_sharding(trainer.setup.mesh))
    # Parameters are arguments, as in the sampler; `denoise_fn` is a pytree.
    denoise = jax.jit(lambda fn, x_t, t: fn(x_t, t), compiler_options=compiler_options(jax.default_backend()))
    cost: Any = denoise.lower(denoise_fn, x_t, t).cost_analysis()
    steps = {KINDS[0]: trainer.step, KINDS[1]: lambda: denoise(denoise_fn, x_t, t)}
    return steps, cost["flops"], trainer.num_parameters


def torch_model(config: Config) -> Any:
    """diffusers' network of the same shape, as in ``google/ddpm-cifar10-32``."""
    from diffusers import UNet2DModel

    model, size = config.model, config.data.image_size
    attends = [size // 2**level in model.attention_resolutions for level in range(len(model.channel_mults))]
    return UNet2DModel(
        sample_size=size,
        in_channels=config.data.channels,
        out_channels=config.data.channels,
        block_out_channels=tuple(model.base_channels * mult for mult in model.channel_mults),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        layers_per_block=model.num_res_blocks,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=default_num_groups(model.base_channels),
        dropout=model.dropout,
    )


def torch_steps(config: Config, num_parameters: int, *, compiled: bool, channels_last: bool) -> dict[str, Any]:
    """The two steps in PyTorch, on the GPU where there is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = torch_model(config).to(device, memory_format=layout)
    assert sum(p.numel() for p in model.parameters()) == num_parameters, "the two networks differ"
    network_fn = torch.compile(model) if compiled else model
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=config.optimizer.learning_rate, fused=True)
    T = config.diffusion.num_timesteps
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
    signal, noise_level = (x.sqrt().float().view(T, 1, 1, 1).to(device) for x in (alpha_bars, 1 - alpha_bars))
    size = config.data.image_size
    shape = (config.train.batch_size, config.data.channels, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).contiguous(memory_format=layout)
    x_t = torch.randn(shape, device=device).contiguous(memory_format=layout)
    middle = torch.full(shape[:1], 500, device=device)

    def forward(x_t: Any, t: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return network_fn(x_t, t).sample.float()

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def train_step() -> None:
        model.train()
        optimizer.zero_grad()
        x0 = pixels.float() / 127.5 - 1
        t = torch.randint(0, T, shape[:1], device=device)
        eps = torch.randn_like(x0)
        loss = torch.nn.functional.mse_loss(forward(signal[t] * x0 + noise_level[t] * eps, t), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - config.optimizer.ema_decay)
        finish()

    def denoise() -> None:
        model.eval()
        with torch.no_grad():
            forward(x_t, middle)
        finish()

    return {KINDS[0]: train_step, KINDS[1]: denoise}


def torch_flops(config: Config) -> float:
    """Those of PyTorch's forward pass, as it counts them: ours needs fewer where it doubles the image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size, batch = config.data.image_size, config.train.batch_size
    x_t, t = torch.zeros((batch, config.data.channels, size, size)), torch.zeros(batch, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch_model(config)(x_t, t)
    return counter.get_total_flops()


def torch_contenders(config: Config, num_parameters: int) -> dict[str, dict[str, Any]]:
    """PyTorch's ways to do it on this machine; none, and a line that says why, where they cannot be compared."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"only ours: {' and '.join(missing)} not installed (pip install 'ddpm_jax[interop]')")
        return {}
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu != (jax.default_backend() == "gpu"):
        print(f"only ours: JAX runs on {jax.default_backend()}, and PyTorch on {'a GPU' if on_gpu else 'the CPU'}")
        return {}
    if on_gpu:  # on a CPU the first would change the arithmetic too
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return {
        f"torch{', compiled' if compiled else ''}{', channels_last' if last else ''}": torch_steps(
            config, num_parameters, compiled=compiled, channels_last=last
        )
        for compiled in ((False, True) if on_gpu else (False,))
        for last in (False, True)
    }


def report(
    kind: str, timings: dict[str, timing.Timing], flops: dict[str, float], peak: float, batch: int
) -> dict[str, Any]:
    """Prints the table of one kind of step and returns its numbers."""
    counts = ", ".join(f"{name} {count / 1e9:.1f}" for name, count in flops.items())
    print(f"\n{kind}, batch {batch}; GFLOP: {counts}; matmul peak {peak / 1e9:,.0f} GFLOP/s")
    print(
        f"  {'':24}{'ms, median [quartiles]':>30}{'images/s':>10}  {'theirs / ours':>23}{'ours / theirs':>15}  of peak"
    )
    rows = {}
    for name, time in timings.items():
        ratio = time.over(timings[OURS])
        share = flops[name.split(",")[0]] / time.median / peak
        rows[name] = {
            "median_ms": 1e3 * time.median,
            "quartiles_ms": [1e3 * x for x in time.quartiles],
            "images_per_second": batch / time.median,
            "theirs_over_ours": list(ratio),
            "share_of_matmul_peak": share,
        }
        compared = f"{timing.times(ratio):>23}{1 / ratio[0]:>15.3f}" if name != OURS else " " * 38
        print(f"  {name:24}{timing.milliseconds(time):>30}{batch / time.median:>10.1f}  {compared}  {share:>7.1%}")
    return {"flops": flops, "matmul_flops_per_second": peak, "contenders": rows}


def main() -> None:
    """Measures and prints."""
    use_cores(num_cores())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    network.add_flags(parser, base=64, size=32, batch=16, mults=(1, 2, 2, 2))
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    machine = timing.machine()
    config = network.make_config(args)
    steps, forward_flops, num_parameters = our_steps(config)
    print(f"{machine}; {num_parameters:,} parameters, {args.dtype}, {args.rounds} rounds")
    contenders = {OURS: steps} | torch_contenders(config, num_parameters)
    flops = {OURS: forward_flops} | ({"torch": torch_flops(config)} if len(contenders) > 1 else {})
    matmul = timing.matmul(args.dtype)
    result = {"machine": machine, "flags": vars(args), "parameters": num_parameters}
    for kind, passes in zip(KINDS, (3, 1), strict=True):
        turns = {name: steps[kind] for name, steps in contenders.items()} | {PEAK: matmul.run}
        timings = timing.alternate(turns, args.rounds, warmup=2, prepare=turns)
        peak = matmul.flops / timings.pop(PEAK).median
        counts = {name: passes * count for name, count in flops.items()}
        result[kind] = report(kind, timings, counts, peak, args.batch)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
