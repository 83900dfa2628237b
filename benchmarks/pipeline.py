"""A picture from the same weights here and in diffusers: DDIM-50 of the ``google/ddpm-cifar10-32`` network.

    python -m benchmarks.pipeline                              # 16 images, 50 steps
    python -m benchmarks.pipeline --path google/ddpm-cifar10-32 --rounds 5

diffusers' ``DDIMPipeline`` and ``ddpm_jax.diffusion.sample`` take turns on the same device; its progress bar is off,
and both return arrays. Without ``--path`` the weights are random, made by diffusers and read by ``ddpm_jax.interop``.
On a CPU both compute in float32, on a GPU PyTorch in bfloat16 with channels_last and ours in bfloat16.

Prints the seconds of each, and how many times as long theirs takes as ours.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from benchmarks import timing
from ddpm_jax import diffusion, training
from ddpm_jax.compiler import compiler_options, use_cores
from ddpm_jax.interop import diffusers as interop

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def random_pipeline() -> str:
    """A folder with the CIFAR-10 network of random weights."""
    import diffusers

    path = tempfile.mkdtemp()
    diffusers.DDIMPipeline(diffusers.UNet2DModel(**CIFAR10), diffusers.DDIMScheduler()).save_pretrained(path)
    return path


def ours(path: str, args: argparse.Namespace) -> Callable[[], jax.Array]:
    """The chain, from noise to images."""
    folder = interop.read_folder(path)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model, params, settings, sampling = interop.load_folder(folder, dtype=dtype)
    mesh = training.make_mesh()
    params = jax.device_put(params, training.replicated(mesh))
    schedule = diffusion.make_schedule("linear", num_timesteps=settings["num_timesteps"])
    denoise_fn = Partial(lambda params, x_t, t: model.apply({"params": params}, x_t, t), params)
    size, key = folder.unet["image_size"], jax.random.key(0)
    x_T = jax.random.normal(jax.random.key(1), (args.batch, size, size, folder.unet["channels"]))
    x_T = jax.device_put(x_T, training.batch_sharding(mesh))
    options = {"num_steps": args.steps, "clip_x0": True, "rederive_eps": sampling["rederive_eps"]}
    options["compiler_options"] = compiler_options(jax.default_backend())
    return lambda: diffusion.sample(denoise_fn, schedule, x_T, key, **options)


def theirs(path: str, args: argparse.Namespace) -> Callable[[], Any]:
    """The same of ``DDIMPipeline``."""
    import diffusers
    import torch

    pipeline = diffusers.DDIMPipeline.from_pretrained(path)
    if torch.cuda.is_available():
        pipeline = pipeline.to("cuda", torch.bfloat16)
        pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=args.batch, num_inference_steps=args.steps, output_type="np").images


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a pipeline's folder or its name on the hub; random weights where left out")
    parser.add_argument("--batch", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    use_cores(args.batch, even=True)
    machine, path = timing.machine(), args.path or random_pipeline()
    timings = timing.alternate({"ddpm_jax": ours(path, args), "diffusers": theirs(path, args)}, args.rounds)
    print(f"{machine}; {args.batch} images, DDIM, {args.steps} steps, {args.rounds} rounds")
    for name, seconds in timings.items():
        print(f"  {name:10}{timing.milliseconds(seconds):>36} ms")
    print(f"  theirs / ours {timing.times(timings['diffusers'].over(timings['ddpm_jax']))}")


if __name__ == "__main__":
    main()
