"""Denoising diffusion (DDPM, DDIM) in JAX and Flax for accelerator clusters."""

__version__ = "0.1.0"
