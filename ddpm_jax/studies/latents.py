"""The noise as a latent code: images there and back by DDIM inversion, and the ways between two codes."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, experiment, generate, images
from ddpm_jax.config import Config
from ddpm_jax.studies.study import (
    OnStep,
    Start,
    Study,
    decode,
    drawn_start,
    encode,
    given_start,
    new_bar,
    pixels_of,
    rms,
    tick,
)

# Their model, the 10,000 test images of CIFAR-10.
PAPER_RECONSTRUCTION = {
    "source": "Song et al. 2021 (DDIM), table 2: CIFAR-10 test set, per-dimension MSE in [0, 1]; not measured here",
    "steps": [10, 20, 50, 100, 200, 500, 1000],
    "mse": [0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001],
}


def reconstruct(
    run: experiment.Run, pixels: np.ndarray, step_counts: Sequence[int], *, labels: np.ndarray | None = None
) -> Study:
    """Images to noise by DDIM inversion and back by DDIM, by number of steps  (Song et al. 2021, section 5.4).

    Nothing is clipped, either way. The error is per dimension, of images in [0, 1], as in the paper's table 2; it falls
    with the number of steps at first order and ends at what the network's own curvature leaves.

    Args:
        run: a trained run.
        pixels: uint8 [N H W C].
        step_counts: S of both chains.
        labels: int32 [N]; None is the null label.
    """
    x0 = np.asarray(generate.to_x0(run.config, pixels))
    start, codes, found = given_start(x0, labels), [], []
    with new_bar(2 * sum(step_counts), "reconstruct") as bar:
        for n in step_counts:
            codes.append(encode(run, start, tick(bar), num_steps=n, end="clean"))
            found.append(_decode_code(run, given_start(codes[-1], labels), tick(bar), num_steps=n))
    mse = [float(np.mean(_squares(run.config, x - x0))) for x in found]
    numbers = {
        "steps": list(step_counts),
        "clip_x0": False,
        "mse": mse,
        "rms_of_noise": [float(rms(code, axis=(0, 1, 2, 3))) for code in codes],
        "paper": PAPER_RECONSTRUCTION,
    }
    blank = np.full_like(pixels, 255)
    noise_row = np.stack([blank, *map(images.to_uint8, codes)], axis=1)
    found_row = np.stack([pixels, *(pixels_of(run.config, x) for x in found)], axis=1)
    pictures = np.stack([noise_row, found_row], axis=1).reshape(2 * len(pixels), -1, *pixels.shape[1:])
    columns = ["image", *(f"{n} steps" for n in step_counts)]
    summary = "mean squared error in [0, 1]: " + ", ".join(
        f"{n} steps {error:.2g}" for n, error in zip(step_counts, mse, strict=True)
    )
    return Study(pictures, ["its noise", "back again"] * len(pixels), columns, numbers, summary)


def interpolate(run: experiment.Run, num_images: int = 9, *, seed: int = 0, label: int | None = None) -> Study:
    """DDIM from the way between two noises: on the sphere (``slerp``) above, along the straight line below.

    The line's middle has 0.7 of the norm that noise has, such as the network was never shown.

    Args:
        run: a trained run.
        num_images: K, both ends among them.
        seed: of the two noises, those of its first two pictures.
        label: class of all pictures; None is the null label.
    """
    ends = drawn_start(run, 2, seed)
    a, b = np.asarray(generate.fetch(ends.x_T))[:2]
    weights = np.linspace(0, 1, num_images, dtype=np.float32)
    ways = _ways(a, b, weights)
    with new_bar(run.config.sampling.num_steps, "interpolate") as bar:
        start = given_start(ways.reshape(-1, *a.shape), _labels(label, 2 * num_images))
        x0 = decode(run, start, tick(bar), method="ddim", eta=0.0).reshape(ways.shape)
    noise = rms(ways, axis=(2, 3, 4))
    numbers = {
        "fractions": weights.tolist(),
        "rms_of_noise": {"slerp": noise[0].tolist(), "line": noise[1].tolist()},
        "rms_of_picture": dict(zip(("slerp", "line"), rms(x0, axis=(2, 3, 4)).tolist(), strict=True)),
    }
    middle = num_images // 2
    summary = f"norm of the noise over that of noise, at w = {weights[middle]:.2f}: slerp {noise[0, middle]:.3f}, "
    summary += f"straight line {noise[1, middle]:.3f}"
    return Study(pixels_of(run.config, x0), ["slerp", "line"], [f"{w:.2f}" for w in weights], numbers, summary)


def mix(run: experiment.Run, pixels: np.ndarray, weights: Sequence[float], *, label: int | None = None) -> Study:
    """Two images inverted, their noises joined by ``slerp``, and DDIM from there.

    Args:
        run: a trained run.
        pixels: uint8 [2 H W C].
        weights: of the second image, 0 .. 1.
        label: class of all pictures; None is the null label.
    """
    steps = run.config.sampling.num_steps
    with new_bar(2 * steps, "mix") as bar:
        start = given_start(np.asarray(generate.to_x0(run.config, pixels)), _labels(label, 2))
        a, b = encode(run, start, tick(bar), end="clean")
        codes = _ways(a, b, np.asarray(weights, np.float32))[0]
        x0 = _decode_code(run, given_start(codes, _labels(label, len(codes))), tick(bar), num_steps=steps)
    pictures = np.concatenate([pixels[:1], pixels_of(run.config, x0), pixels[1:]])[None]
    cosine = float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    numbers = {
        "fractions": list(weights),
        "num_steps": steps,
        "clip_x0": False,
        "angle_between_noises": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        "rms_of_noise": rms(codes, axis=(1, 2, 3)).tolist(),
    }
    columns = ["image A", *(f"{w:g}" for w in weights), "image B"]
    summary = f"{numbers['angle_between_noises']:.0f} degrees between the two noises"
    return Study(pictures, [""], columns, numbers, summary)


def _decode_code(run: experiment.Run, start: Start, on_step: OnStep, num_steps: int) -> np.ndarray:
    return decode(run, start, on_step, num_steps=num_steps, method="ddim", eta=0.0, clip_x0=False, end="clean")


def _ways(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[2 K H W C]: K points of the arc between two noises, and of the line."""
    a, b = (np.broadcast_to(x, (len(weights), *x.shape)) for x in (a, b))
    w = weights[:, None, None, None]
    return np.stack(
        [np.asarray(diffusion.slerp(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights))), (1 - w) * a + w * b]
    )


def _squares(config: Config, error: np.ndarray) -> np.ndarray:
    """Squared errors in units in which black is 0 and white is 1, whatever those of the run's images are."""
    black, white = (np.asarray(generate.to_x0(config, np.full(error.shape[1:], v, np.uint8))) for v in (0, 255))
    return np.square(error / (white - black), dtype=np.float64)


def _labels(label: int | None, count: int) -> np.ndarray | None:
    return None if label is None else np.full(count, label, np.int32)
