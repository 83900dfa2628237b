"""The README's first command, before a judge who has never seen a sample."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

CONFIDENT = 0.9


def run(*arguments):
    subprocess.run([sys.executable, "-m", *arguments], check=True, timeout=1500)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # scikit-learn would rather calibrate than SVC(probability=True)
def test_the_default_run_draws_digits_that_a_classifier_of_real_ones_is_sure_of(tmp_path):
    workdir, npz = str(tmp_path / "digits"), str(tmp_path / "samples.npz")
    run("ddpm_jax.train", "--config", "configs/digits.py", "--workdir", workdir)
    run("ddpm_jax.sample", "--workdir", workdir, "--out", str(tmp_path / "a.png"), "--npz", npz, "--num_images", "256")

    pixels, labels = load_digits(return_X_y=True)
    train_pixels, held_out, train_labels, _ = train_test_split(pixels, labels, train_size=0.7, random_state=0)
    judge = SVC(gamma=0.001, C=10, probability=True, random_state=0).fit(train_pixels, train_labels)
    real = judge.predict_proba(held_out)
    assert (real.max(1) > CONFIDENT).mean() > 0.75  # the judge itself is sure of real digits

    images = np.load(npz)["images"]
    assert images.shape == (256, 8, 8, 1)
    verdict = judge.predict_proba(images.reshape(256, 64) * (16 / 255))
    sure = (verdict.max(1) > CONFIDENT).mean()
    print(f"sure of {sure:.1%} of the samples, {(real.max(1) > CONFIDENT).mean():.1%} of real digits")
    assert sure >= 0.5
    assert len(np.unique(verdict.argmax(1))) == 10
    # The judge is just as sure of a digit that was learnt by heart: most samples must not be copies.
    distance = np.abs(images.reshape(256, 1, 64) * (16 / 255) - pixels).mean(-1).min(1)
    between_real = np.abs(held_out[:, None] - train_pixels).mean(-1).min(1)
    assert np.median(distance) > 0.5 * np.median(between_real)

    picture = sorted((tmp_path / "digits" / "samples").glob("*.png"))[-1]
    assert picture.name == "step_00004000.png"
    assert Image.open(picture).width > 400
