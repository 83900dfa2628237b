"""Other people's weights, in and out."""

from ddpm_jax.interop.errors import InteropError as InteropError
