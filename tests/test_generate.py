"""Pictures are functions of the seed and their number. The denoisers here are formulas, so that little compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ddpm_jax import diffusion, experiment, generate, training

PIXELS = {0: 0, 1: 85, 2: 170, 3: 255}  # what class k looks like; 3 is "no label"


def wavy(scale, x_t, t, label=None):
    """eps_hat of no particular meaning, which depends on the whole image and on t."""
    return jnp.tanh(scale * x_t) + 0.3 * x_t.mean((1, 2, 3), keepdims=True) - t[:, None, None, None] / 200


def by_class(scale, x_t, t, label=None):
    """x0_hat: a flat gray of the class."""
    label = jnp.full(t.shape, 3) if label is None else label
    return scale * (2 * label / 3 - 1)[:, None, None, None] * jnp.ones_like(x_t)


UNLABELLED = {"model.num_classes": 0, "model.label_dropout": 0.0, "diffusion.prediction": "eps"}
WAVY, BY_CLASS = Partial(wavy, jnp.float32(1)), Partial(by_class, jnp.float32(1))


@pytest.fixture
def draw(make_config):
    def draw(denoise_fn=WAVY, fields=None, **options):
        config = make_config(UNLABELLED | (fields or {}))
        schedule = experiment.make_schedule(config)
        return generate.draw(config, schedule, denoise_fn, training.make_mesh(), **{"seed": 0} | options)

    return draw


@pytest.mark.parametrize("fields", [{}, {"sampling.eta": 1.0}, {"sampling.method": "ddpm"}], ids=str)
def test_a_picture_depends_on_the_seed_and_its_number_alone(draw, fields):
    pictures = draw(fields=fields, num_images=7)
    assert pictures.shape == (7, 8, 8, 1)
    assert pictures.dtype == np.uint8
    assert len(np.unique(pictures)) > 20
    assert len(np.unique(pictures, axis=0)) == 7  # all different
    for batch_size in (1, 3, 7, 100):
        again = draw(fields=fields, num_images=7, batch_size=batch_size)
        np.testing.assert_allclose(again.astype(int), pictures, atol=1, err_msg=f"{batch_size=}")
    fewer = draw(fields=fields, num_images=3)
    np.testing.assert_allclose(fewer.astype(int), pictures[:3], atol=1)


def standard_normal(alpha_bars, x_t, t):
    """eps_hat for x0 ~ N(0, I): sqrt(1 - alpha_bar) x_t, the exact one."""
    return jnp.sqrt(1 - alpha_bars[t])[:, None, None, None] * x_t


@pytest.mark.parametrize("num_steps", [1, 3, 5, 10, 20, 100])
def test_normalised_pictures_in_few_steps_or_many(draw, num_steps):
    """Each DDIM step multiplies x by the cosine of the angle that it turns; the pictures are std x0 + mean."""
    start, end = np.arccos(0.95), np.arccos(0.02)
    angles = start + (end - start) * np.round(np.arange(100, 0, -100 / num_steps) - 1) / 99
    scale = np.cos(np.diff(np.append(angles, 0.0))).prod()
    fields = {"data.normalizer": "mean_std", "data.mean": (0.1,), "data.std": (0.2,), "sampling.clip_x0": False}
    fields |= {"diffusion.schedule": "offset_cosine", "diffusion.num_timesteps": 100, "sampling.num_steps": num_steps}
    pictures = draw(
        Partial(standard_normal, jnp.asarray(np.cos(start + (end - start) * np.arange(100) / 99) ** 2)),
        fields | {"sampling.spacing": "trailing"},
        num_images=200,
    )
    found = pictures / 127.5 - 1
    assert found.mean() == pytest.approx(0.1, abs=5 * 0.2 / np.sqrt(found.size))
    assert found.std() == pytest.approx(0.2 * scale, rel=0.03, abs=0.003)


def test_normalised_predictions_are_clipped_to_black_and_white(draw):
    def far(scale, x_t, t):
        return scale * jnp.ones_like(x_t)

    fields = {"data.normalizer": "mean_std", "data.mean": (0.5,), "data.std": (0.1,), "diffusion.prediction": "x0"}
    for scale, pixel in ((0.0, round(1.5 * 127.5)), (-30.0, 0), (30.0, 255)):  # black is -15, white is 5
        assert set(draw(Partial(far, jnp.float32(scale)), fields, num_images=2).ravel()) == {pixel}


def test_seeds_share_no_picture(draw):
    pictures = np.concatenate([draw(num_images=4, seed=seed) for seed in (0, 1, 2)])
    assert len(np.unique(pictures, axis=0)) == 12


def test_the_chain_has_noise_of_its_own_for_each_picture(draw):
    # Pictures that start alike end alike only where nothing is drawn on the way.
    calm = draw(num_images=4, fields={"sampling.eta": 0.0})
    noisy = draw(num_images=4, fields={"sampling.eta": 1.0})
    changes = noisy.astype(int) - calm
    assert len(np.unique(changes, axis=0)) == 4


CLASSES = {"model.num_classes": 3, "model.label_dropout": 0.1, "diffusion.prediction": "x0"}


@pytest.mark.parametrize("batch_size", [None, 2])
def test_labels_take_turns_over_all_batches(draw, batch_size):
    pictures = draw(BY_CLASS, CLASSES, num_images=7, batch_size=batch_size)
    expected = [PIXELS[i % 3] for i in range(7)]
    np.testing.assert_array_equal(pictures, np.broadcast_to(np.reshape(expected, (7, 1, 1, 1)), pictures.shape))


@pytest.mark.parametrize("label", [0, 2])
def test_one_label_for_all(draw, label):
    assert np.unique(draw(BY_CLASS, CLASSES, num_images=4, label=label)).tolist() == [PIXELS[label]]


@pytest.mark.parametrize(("guidance", "pixel"), [(0.0, 255), (1.0, 85), (0.5, 170), (1.25, 42)])
def test_guidance_goes_from_no_label_to_the_label_and_beyond(draw, guidance, pixel):
    pictures = draw(BY_CLASS, CLASSES | {"sampling.guidance": guidance}, num_images=2, label=1)
    np.testing.assert_allclose(pictures.astype(int), pixel, atol=1)


@pytest.mark.parametrize(("num_images", "batch_size"), [(7, 3), (7, 100), (6, 3), (1, 1)])
def test_on_step_is_called_once_a_step_of_every_batch(draw, num_images, batch_size):
    calls = []
    draw(num_images=num_images, batch_size=batch_size, on_step=calls.append)
    batches = generate.num_batches(num_images, batch_size, training.make_mesh())
    assert len(calls) == 5 * batches
    assert sorted(set(calls)) == [0, 1, 2, 3, 4]


def test_a_chain_ends_in_the_pictures_that_draw_gives(make_config, draw):
    config = make_config(UNLABELLED)
    chain = generate.draw_chain(
        config,
        experiment.make_schedule(config),
        WAVY,
        training.make_mesh(),
        num_images=3,
        num_frames=40,
        seed=5,
    )
    assert chain.shape == (5 + 1, 3, 8, 8, 1)
    assert chain.dtype == np.uint8
    np.testing.assert_allclose(chain[-1].astype(int), draw(num_images=3, seed=5), atol=1)
    distance = [np.abs(frame.astype(int) - chain[-1]).mean() for frame in chain]
    assert distance[0] == max(distance) > 10


@pytest.mark.usefixtures("compilation_cache")
def test_a_loaded_run_samples_in_a_notebook(trained):
    run = experiment.load(str(trained.workdir))
    x_T = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    output = run.denoise_fn(x_T, jnp.full((4,), 10))
    assert output.shape == x_T.shape
    assert output.dtype == jnp.float32
    x0 = diffusion.sample(run.denoise_fn, run.schedule, x_T, jax.random.key(1), num_steps=5, spacing="trailing")
    assert x0.shape == x_T.shape
    assert bool(jnp.isfinite(x0).all())
    labelled = run.denoise_fn(x_T, jnp.full((4,), 10), jnp.arange(4) % 3)
    assert bool((labelled != output).any())


def test_load_tells_ema_from_raw_weights_and_one_step_from_another(trained):
    for weights, expected in (("ema", trained.state.ema_params), ("raw", trained.state.params)):
        run = experiment.load(str(trained.workdir), weights=weights)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), expected)
        assert run.config == trained.config
    early, late = (experiment.load(str(trained.workdir), step=step).params for step in (10, 12))
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (early, late)), strict=True))


def test_load_names_what_is_missing(trained, tmp_path):
    with pytest.raises(experiment.RunError, match=r"holds no run .*ddpm_jax\.train"):
        experiment.load(str(tmp_path))
    with pytest.raises(experiment.RunError, match="no checkpoint of step 11; its checkpoints are 5, 10, 12"):
        experiment.load(str(trained.workdir), step=11)
    with pytest.raises(experiment.RunError, match="choose ema or raw"):
        experiment.load(str(trained.workdir), weights="average")
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(experiment.RunError, match=r"config\.json"):
        experiment.load(str(tmp_path))
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(experiment.RunError, match=r"config\.json"):
        experiment.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(experiment.RunError, match="no checkpoint"):
        experiment.load(str(tmp_path))


def test_load_passes_over_a_damaged_checkpoint_and_changes_nothing(trained, tmp_path):
    workdir = trained.copy_to(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "12" / "_CHECKPOINT_METADATA").write_text("{")
    for path in (tmp_path / "run" / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    before = sorted(str(path) for path in (tmp_path / "run").rglob("*"))
    with pytest.warns(UserWarning, match="checkpoint 12 is damaged"):
        run = experiment.load(workdir)
    expected = experiment.load(str(trained.workdir), step=10).params
    jax.tree.map(np.testing.assert_array_equal, run.params, expected)
    assert sorted(str(path) for path in (tmp_path / "run").rglob("*")) == before


def test_equal_networks_share_a_compiled_sampler(trained):
    one, other = (experiment.load(str(trained.workdir), weights=weights).denoise_fn for weights in ("ema", "raw"))
    assert jax.tree.structure(one) == jax.tree.structure(other)
