"""Pictures as they are drawn: by eta and number of steps, from other keys, along the chain, and on the way to noise."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, experiment, generate
from ddpm_jax.config import Config
from ddpm_jax.studies.study import Study, decode, drawn_start, image_names, new_bar, pixels_of, rms, tick, tiled

_DDPM = "ddpm"  # among the etas of ``eta_by_steps``: ancestral sampling with the large variance


def eta_by_steps(
    run: experiment.Run,
    etas: Sequence[float | str],
    step_counts: Sequence[int],
    *,
    num_images: int = 4,
    seed: int = 0,
    label: int | None = None,
) -> Study:
    """DDIM by eta and number of steps, every cell from the same noises  (Song et al. 2021, table 1 and figure 3).

    Chains meet the same noise at the same t. The entry "ddpm" among the etas is the paper's sigma-hat, ancestral
    sampling with ``fixed_large``; eta = 1 is that with ``fixed_small``.
    """
    start = drawn_start(run, num_images, seed, label)
    cells = []
    with new_bar(len(etas) * sum(step_counts), "grid") as bar:
        for eta in etas:
            chain: dict[str, Any] = {"method": "ddim", "eta": eta}
            if eta == _DDPM:
                chain = {"method": "ddpm", "variance": "fixed_large"}
            cells.append([decode(run, start, tick(bar), num_steps=n, **chain) for n in step_counts])
    x0 = np.stack([np.stack(row) for row in cells])
    away = rms(x0 - x0[:, [int(np.argmax(step_counts))]], axis=(2, 3, 4, 5))
    rows = ["DDPM, large" if eta == _DDPM else f"eta {eta:g}" for eta in etas]
    first = f"{rows[0]}, {min(step_counts)} steps: {away[0, int(np.argmin(step_counts))]:.3f}"
    numbers = {"etas": list(etas), "steps": list(step_counts), "rms_difference_from_longest": away.tolist()}
    summary = f"root mean square distance from the longest chain of the row: {first}"
    return Study(tiled(pixels_of(run.config, x0)), rows, [f"{n} steps" for n in step_counts], numbers, summary)


def few_steps(
    run: experiment.Run,
    step_counts: Sequence[int],
    *,
    num_images: int = 8,
    seed: int = 0,
    label: int | None = None,
    method: str = "ddim",
) -> Study:
    """A row of pictures a number of steps, from the same noises, without noise on the way where the method has a say.

    One step is taken from t = T - 1 (spacing trailing), whatever the run's spacing: another would start at t = 0.
    """
    start = drawn_start(run, num_images, seed, label)
    x0, spacings = [], []
    with new_bar(sum(step_counts), "steps") as bar:
        for n in step_counts:
            spacings.append("trailing" if n == 1 else run.config.sampling.spacing)
            x0.append(decode(run, start, tick(bar), num_steps=n, method=method, eta=0.0, spacing=spacings[-1]))
    away = rms(np.stack(x0) - x0[int(np.argmax(step_counts))], axis=(1, 2, 3, 4))
    numbers = {"method": method, "steps": list(step_counts), "spacings": spacings}
    numbers["rms_difference_from_longest"] = away.tolist()
    rows = [f"{n} step{'s' if n > 1 else ''}" for n in step_counts]
    summary = "root mean square distance from the longest chain: " + ", ".join(
        f"{row} {distance:.3f}" for row, distance in zip(rows, away, strict=True)
    )
    return Study(pixels_of(run.config, np.stack(x0)), rows, image_names(start), numbers, summary)


def determinism(run: experiment.Run, *, num_images: int = 6, seed: int = 0, label: int | None = None) -> Study:
    """DDIM from one x_T with two keys: eta = 0 ends in the same bits, eta = 1 does not."""
    start = drawn_start(run, num_images, seed, label)
    other = start._replace(keys=jax.vmap(jax.random.fold_in, (0, None))(start.keys, 1))
    rows, x0 = [], []
    with new_bar(4 * run.config.sampling.num_steps, "determinism") as bar:
        for eta in (0.0, 1.0):
            for name, each in (("one key", start), ("another", other)):
                rows.append(f"eta {eta:g}, {name}")
                x0.append(decode(run, each, tick(bar), method="ddim", eta=eta))
    largest = {f"eta_{i}": float(np.abs(x0[2 * i] - x0[2 * i + 1]).max()) for i in (0, 1)}
    summary = f"largest difference between two keys: {largest['eta_0']:g} at eta 0, {largest['eta_1']:.3g} at eta 1"
    numbers = {"largest_difference": largest, "num_steps": run.config.sampling.num_steps}
    return Study(pixels_of(run.config, np.stack(x0)), rows, image_names(start), numbers, summary)


def chain(
    run: experiment.Run,
    *,
    num_images: int = 4,
    seed: int = 0,
    label: int | None = None,
    num_frames: int = 40,
    num_columns: int = 8,
) -> Study:
    """x_t and x0_hat along a chain: some columns of them, and all as frames, x_t above x0_hat."""
    start, config = drawn_start(run, num_images, seed, label), run.config
    options = experiment.sampling_options(config)
    with new_bar(options["num_steps"], "chain") as bar:
        x0, kept = diffusion.sample(
            experiment.conditioned(run.denoise_fn, config, start.labels),
            run.schedule,
            start.x_T,
            start.keys,
            trajectory=min(num_frames, options["num_steps"]),
            on_step=tick(bar),
            **options,
        )
    t = np.asarray(kept.t)
    x_t, x0_hat = (
        np.concatenate([generate.fetch(x), generate.fetch(x0)[None]])[:, :num_images] for x in (kept.x_t, kept.x0_hat)
    )
    shown = np.append(np.round(np.linspace(0, len(t) - 1, min(num_columns, len(t)))).astype(int), len(t))
    both = pixels_of(config, np.stack([x_t, x0_hat]))  # [2 F N H W C]
    pictures = both[:, shown].transpose(2, 0, 1, 3, 4, 5).reshape(2 * num_images, len(shown), *both.shape[3:])
    distance = rms(x0_hat[:-1] - x0_hat[-1], axis=(1, 2, 3, 4))
    half = t[int(np.argmax(distance <= distance[0] / 2))]
    numbers = {
        "t": t.tolist(),
        "alpha_bar": np.asarray(run.schedule.alpha_bars)[t].tolist(),
        "x_t_rms": rms(x_t[:-1], axis=(1, 2, 3, 4)).tolist(),
        "rms_of_x0_hat_from_x0": distance.tolist(),
    }
    columns = [*(f"t = {t[i]}" for i in shown[:-1]), "x0"]
    summary = f"x0_hat has come half of its way at t = {half} of {run.schedule.num_timesteps}"
    frames = both.transpose(1, 0, 2, 3, 4, 5).reshape(len(t) + 1, -1, *both.shape[3:])
    return Study(pictures, ["x_t", "x0_hat"] * num_images, columns, numbers, summary, frames)


def forward(config: Config, pixels: np.ndarray, *, seed: int = 0) -> Study:
    """Images on their way to noise: q(x_t | x0) at t = 0, T/4, T/2, 3T/4 and T - 1, an eps an image for all of it.

    Args:
        config: of the run, whose schedule it is.
        pixels: uint8 [N H W C].
        seed: of eps.
    """
    schedule = experiment.make_schedule(config)
    T = schedule.num_timesteps
    t = np.array([0, T // 4, T // 2, 3 * T // 4, T - 1], np.int32)
    x0 = generate.to_x0(config, pixels)
    eps = jax.random.normal(jax.random.key(seed), x0.shape)
    x_t = jnp.stack([x0, *(diffusion.q_sample(schedule, x0, i, eps) for i in jnp.asarray(t))], axis=1)
    alpha_bar, noise_level = np.asarray(schedule.alpha_bars)[t], np.asarray(schedule.noise_levels)[t]
    signal, noise = np.sqrt(alpha_bar), np.sqrt(noise_level)
    columns = ["image", *(f"t = {i}\n{a:.2f} x0 +\n{b:.2f} eps" for i, a, b in zip(t, signal, noise, strict=True))]
    numbers = {"t": t.tolist(), "signal_rate": signal.tolist(), "noise_rate": noise.tolist()}
    summary = f"the signal rate falls from {signal[0]:.4f} at t = 0 to {signal[-1]:.4f} at t = {T - 1}"
    rows = [f"image {i}" if len(pixels) > 1 else "" for i in range(len(pixels))]
    return Study(pixels_of(config, x_t), rows, columns, numbers, summary)
