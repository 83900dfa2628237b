"""DDPM beside DDIM (eta = 1): one formula or two, and what float32 makes of it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, experiment
from ddpm_jax.config import Config
from ddpm_jax.studies.study import Study, decode, drawn_start, new_bar, pixels_of, rms, tick, tiled

# name: (clip_x0, rederive_eps of DDIM, why)
_PAIRS = {
    "no clipping": (False, True, "one formula; what is left is float32 rounding, carried along the chain"),
    "clipped, eps re-derived": (
        True,
        True,
        "still one formula: both steps are functions of the clipped x0_hat and x_t alone",
    ),
    "clipped, the network's eps": (
        True,
        False,
        "two formulas: DDIM pairs the clipped x0_hat with an eps that belongs to the unclipped one, so that its x_t "
        "goes where DDPM's posterior mean does not",
    ),
}


def equivalence(run: experiment.Run, *, num_images: int = 4, seed: int = 0, label: int | None = None) -> Study:
    """DDPM (``fixed_small``) against DDIM (eta = 1) with the same noise at every t, in three ways to clip.

    Song et al. 2021, section 4.1: with sigma of eq. 16 at eta = 1 the generative process is DDPM. The last rows show
    how far apart each pair ends.
    """
    start = drawn_start(run, num_images, seed, label)
    plain = {"dynamic_threshold": 0.0, "max_threshold": 0.0, "end": "clean"}
    steps = run.config.sampling.num_steps
    with new_bar(5 * steps, "equivalence") as bar:
        fields = plain | {"method": "ddpm", "variance": "fixed_small"}
        by_clip = {clip: decode(run, start, tick(bar), clip_x0=clip, **fields) for clip in (False, True)}
        fields = plain | {"method": "ddim", "eta": 1.0}
        all_ddim = [
            decode(run, start, tick(bar), clip_x0=clip, rederive_eps=rederive, **fields)
            for clip, rederive, _ in _PAIRS.values()
        ]
    all_ddpm = [by_clip[clip] for clip, _, _ in _PAIRS.values()]
    pairs = {}
    for (name, (_, _, why)), ddpm, ddim in zip(_PAIRS.items(), all_ddpm, all_ddim, strict=True):
        pairs[name] = {
            "largest_difference": float(np.abs(ddpm - ddim).max()),
            "rms_difference": float(rms(ddpm - ddim, axis=(0, 1, 2, 3))),
            "largest_value": float(np.abs(ddpm).max()),
            "why": why,
        }
    ddpm_row, ddim_row = (pixels_of(run.config, np.stack(x0)) for x0 in (all_ddpm, all_ddim))
    apart = np.abs(ddpm_row.astype(np.int16) - ddim_row).astype(np.uint8)
    rows, columns = ["DDPM", "DDIM, eta 1", "difference"], [name.replace(", ", ",\n") for name in _PAIRS]
    numbers: dict[str, Any] = {"num_steps": steps, "pairs": pairs, "variances": _variance_numbers(run.config)}
    summary = "\n".join(
        f"{name}: largest difference {pair['largest_difference']:.2g}; {pair['why']}" for name, pair in pairs.items()
    )
    return Study(tiled(np.stack([ddpm_row, ddim_row, apart])), rows, columns, numbers, summary)


def variances(config: Config) -> dict[str, np.ndarray]:
    """The variance of a step t -> t - 1 of the whole chain, written in DDPM's way and in DDIM's, [T] each.

    DDPM: c beta_t, c = (1 - alpha_bar_prev) / (1 - alpha_bar_t)  (Ho et al. 2020, eq. 7)
    DDIM, eta = 1: c (1 - alpha_bar_t / alpha_bar_prev)  (Song et al. 2021, eq. 16)

    Each with tables in float32 throughout, as many systems have them, in float64, and as this library has it: float64
    tables, cast once, and one function for both.
    """
    betas = diffusion.schedule_betas(config.diffusion.schedule, **config_lib.schedule_options(config.diffusion))
    schedule = experiment.make_schedule(config)
    t = jnp.arange(schedule.num_timesteps)
    found = _both(betas, np.float32) | _both(betas, np.float64)
    here, _ = diffusion.posterior_variance(schedule, jnp.zeros(t.shape), t, t - 1)
    return found | {"here float32": np.asarray(here)}


def disagreement(config: Config) -> dict[str, np.ndarray]:
    """How far apart the two ways to write the variance are, relative, at t = 1 .. T-1; and this library from the truth.

    At t = 0 all of them are 0.
    """
    found = {name: values.astype(np.float64)[1:] for name, values in variances(config).items()}
    truth = found["ddpm float64"]
    return {
        "DDPM's and DDIM's, float32": np.abs(found["ddim float32"] / found["ddpm float32"] - 1),
        "DDPM's and DDIM's, float64": np.abs(found["ddim float64"] / truth - 1),
        "here, from float64": np.abs(found["here float32"] / truth - 1),
    }


def _both(betas: np.ndarray, dtype: type[np.floating]) -> dict[str, np.ndarray]:
    """All of it in one precision, the product of the (1 - beta) included."""
    betas, one = betas.astype(dtype), dtype(1)
    alpha_bars = np.cumprod(one - betas, dtype=dtype)
    prev = np.append(one, alpha_bars[:-1])
    shrink = (one - prev) / (one - alpha_bars)
    name = np.dtype(dtype).name
    return {f"ddpm {name}": shrink * betas, f"ddim {name}": shrink * (one - alpha_bars / prev)}


def _variance_numbers(config: Config) -> dict[str, Any]:
    found = variances(config)
    return {
        "largest_relative_difference": {name: float(x.max()) for name, x in disagreement(config).items()},
        "last": {name: float(x[-1]) for name, x in found.items()},
        "every_t": {name: x.astype(float).tolist() for name, x in found.items()},
    }
