"""Whether samples look like the classes of a data set, before a classifier that has never seen one.

    python -m ddpm_jax.sample --workdir runs/fashion_mnist --npz samples.npz --num_images 256
    python -m benchmarks.judge samples.npz --source tfds:fashion_mnist

A perceptron of scikit-learn is trained on half of the real training images. A share of the other half gets a
probability above 0.9 from it, and so does a share of the samples; their ratio says how many samples are as clear as
real ones. Where the run mirrors images (``data.random_flip``), so does the judge (``--flip``).

Prints both shares, their ratio, and how many samples each class has.
"""

import argparse

import numpy as np
from sklearn.neural_network import MLPClassifier

from ddpm_jax import data

SURE = 0.9


def main() -> None:
    """Judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help="an .npz of `images`, as ddpm_jax.sample writes it")
    parser.add_argument("--source", default="tfds:fashion_mnist", help="labelled images (%(default)s)")
    parser.add_argument("--split", default="train", help="of a TFDS data set (%(default)s)")
    parser.add_argument("--flip", action="store_true", help="the judge learns mirrored images too")
    args = parser.parse_args()
    samples = np.load(args.samples)["images"]
    real = data.load(args.source, split=args.split, image_size=samples.shape[1], channels=samples.shape[3])
    order = np.random.default_rng(0).permutation(len(real.images))
    learnt, held_out = np.array_split(order, 2)
    judge = MLPClassifier((256,), batch_size=256, max_iter=20, early_stopping=True, random_state=0)
    pixels, labels = real.images[learnt], real.labels[learnt]
    if args.flip:
        pixels, labels = np.concatenate([pixels, pixels[:, :, ::-1]]), np.tile(labels, 2)
    judge.fit(flat(pixels), labels)
    truth, verdict = judge.predict_proba(flat(real.images[held_out])), judge.predict_proba(flat(samples))
    accuracy = (truth.argmax(1) == real.labels[held_out]).mean()
    shares = [(p.max(1) > SURE).mean() for p in (truth, verdict)]
    print(f"right on {accuracy:.1%} of {len(held_out)} real images, sure of {shares[0]:.1%}")
    print(f"sure of {shares[1]:.1%} of {len(samples)} samples: {shares[1] / shares[0]:.3f} of the share of real images")
    print(f"samples a class: {np.bincount(verdict.argmax(1), minlength=truth.shape[1]).tolist()}")


def flat(images: np.ndarray) -> np.ndarray:
    """uint8 [N H W C] -> float32 [N D] in 0 .. 1."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


if __name__ == "__main__":
    main()
