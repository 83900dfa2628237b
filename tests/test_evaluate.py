"""``python -m ddpm_jax.evaluate likelihood``: each command line in a process of its own, once for the whole module."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ddpm_jax import diffusion, evaluate, experiment, images

GOOD = {
    "all": ["--out=all.json", "--num_images=20"],
    "small batches": ["--out=batches.json", "--num_images=20", "--batch_size=6"],
    "raw": ["--out=new/raw.json", "--num_images=4", "--weights=raw", "--step=10", "--variance=fixed_large"],
}
BAD = {
    "no command": (None, ["--out=x.json"], ["no command", "likelihood"]),
    "command": ("fidelity", [], ["fidelity", "likelihood"]),
    "no run": ("likelihood", ["--workdir=absent"], ["absent", "ddpm_jax.train"]),
    "no workdir": ("likelihood", ["--workdir="], ["--workdir"]),
    "suffix": ("likelihood", ["--workdir=absent", "--out=x.txt"], ["x.txt", ".json"]),  # before anything is loaded
    "too many": ("likelihood", ["--num_images=21"], ["--num_images=21", "there are 20"]),
    "split": ("likelihood", ["--split=test"], ["--split=test", "one split only"]),
    "variance": ("likelihood", ["--variance=learned"], ["learned_variance"]),
    "source": ("likelihood", ["--source=npz:absent.npz"], ["absent.npz"]),
    "labels": ("likelihood", ["--source=sklearn:digits"], ["sklearn:digits", "a label below 3"]),
}


@pytest.fixture(scope="module")
def results(trained, run_program, tmp_path_factory):
    """How each command line ended, and the folder in which they ran."""
    cwd = tmp_path_factory.mktemp("likelihoods")
    workdir = f"--workdir={trained.workdir}"
    lines = {name: ["likelihood", workdir, *flags] for name, flags in GOOD.items()}
    lines |= {name: ([command] if command else []) + [workdir, *flags] for name, (command, flags, _) in BAD.items()}
    return run_program("ddpm_jax.evaluate", lines, cwd), cwd


def report(results, name):
    return json.loads((results[1] / f"{name}.json").read_text())


@pytest.mark.parametrize("name", GOOD)
def test_it_ends_well_with_one_line_of_numbers(results, name):
    result = results[0][name]
    assert result.code == 0, result.stderr
    found = report(results, GOOD[name][0].removeprefix("--out=").removesuffix(".json"))
    assert result.stdout.splitlines()[0].startswith(f"{found['bits_per_dim']:.4f} +- ")
    assert found["bits_per_dim"] == pytest.approx(found["prior"] + found["steps"] + found["decoder"], rel=1e-5)
    assert len(found["per_step"]) == 50
    assert sum(found["per_step"][1:]) == pytest.approx(found["steps"], rel=1e-4)


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_line_that_names_it(results, name):
    result = results[0][name]
    assert result.code in (1, 2)
    assert [part for part in BAD[name][2] if part not in result.error] == [], result.error


def test_only_what_was_asked_for_is_written(results):
    written = {str(path.relative_to(results[1])) for path in results[1].rglob("*") if path.is_file()}
    assert written == {"all.json", "batches.json", "new/raw.json"}


def test_the_batch_size_changes_nothing(results):
    whole, batches = report(results, "all"), report(results, "batches")
    np.testing.assert_allclose(batches["per_step"], whole["per_step"], rtol=1e-3)
    assert (whole["num_images"], whole["variance"], whole["weights"]) == (20, "fixed_small", "ema")
    assert report(results, "new/raw")["variance"] == "fixed_large"


def test_it_is_the_bound_of_the_images_with_their_labels(results, trained, npz_path):
    run = experiment.load(str(trained.workdir))
    with np.load(npz_path) as archive:
        pixels, labels = archive["images"], archive["labels"].astype(np.int32)
    denoise_fn = experiment.conditioned(run.denoise_fn, run.config, jax.numpy.asarray(labels))
    bound = diffusion.variational_bound(
        denoise_fn, run.schedule, images.to_float(pixels), jax.random.key(5), prediction="v"
    )
    found = report(results, "all")
    # Other noise, so as near as the noise lets it; the prior has none.
    assert found["prior"] == pytest.approx(float(bound.prior.mean()), rel=1e-4)
    assert found["bits_per_dim"] == pytest.approx(float(bound.total.mean()), rel=0.1)
    mine = evaluate.bits_per_dim(run, pixels[:3], labels[:3], seed=0, batch_size=2)
    assert mine.total.shape == (3,)
    assert math.isfinite(mine.total.sum())
    run.config.sampling.guidance = 3.0  # has no likelihood
    guided = evaluate.bits_per_dim(run, pixels[:3], labels[:3], seed=0, batch_size=2)
    np.testing.assert_array_equal(guided.total, mine.total)


def test_the_bound_is_taken_in_the_units_of_the_normaliser(make_config, monkeypatch):
    """A level of gray is as wide as it is there; ``decoder_term`` is tested in other units than [-1, 1]."""
    seen = {}

    def bound(denoise_fn, schedule, x0, keys, **options):
        seen.update(options, x0=np.asarray(x0))
        return diffusion.Bound(jnp.zeros(len(x0)), jnp.zeros((schedule.num_timesteps, len(x0))))

    monkeypatch.setattr(diffusion, "variational_bound", bound)
    config = make_config({"data.normalizer": "mean_std", "data.mean": (0.5,), "data.std": (0.25,)})
    run = experiment.Run(config, experiment.make_schedule(config), Partial(lambda x_t, t, label: x_t), None)
    pixels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
    evaluate.bits_per_dim(run, pixels, np.zeros(4, np.int32), 0, 4)
    np.testing.assert_allclose(seen["x0"], (pixels / 127.5 - 1 - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen["bounds"], ([-6.0], [2.0]))
    np.testing.assert_allclose(seen["clip_x0"], seen["bounds"])
