import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ddpm_jax.data import batch_indices, stream_indices
from ddpm_jax.data.order import stream_epoch

GOLDEN = ([9, 0, 5, 3, 9, 1, 2, 8], [0, 0, 0, 0, 1, 1, 1, 1])


def run(seed: int, steps: range, batch_size: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [batch_indices(seed, step, batch_size, num_images) for step in steps]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


@pytest.mark.parametrize(("batch_size", "num_images"), [(4, 12), (5, 12), (7, 10), (25, 10), (1, 3), (100, 1)])
def test_every_epoch_visits_every_image_once(batch_size, num_images):
    epochs = 2 * batch_size  # then the steps fill them exactly
    indices, flips = run(0, range(2 * num_images), batch_size, num_images)
    assert indices.shape == flips.shape == (epochs * num_images,)
    visits = np.sort(indices.reshape(epochs, num_images), axis=1)
    np.testing.assert_array_equal(visits, np.tile(np.arange(num_images), (epochs, 1)))


def test_types_and_shapes():
    indices, flips = batch_indices(3, 5, 8, 100)
    assert indices.dtype == np.int64
    assert flips.dtype == np.bool_
    assert indices.shape == flips.shape == (8,)


def test_the_order_does_not_depend_on_the_batch_size():
    # A position decides its image and its flip; batches only cut the line of positions.
    ones, eights = run(1, range(240), 1, 30), run(1, range(30), 8, 30)
    np.testing.assert_array_equal(ones[0], eights[0])
    np.testing.assert_array_equal(ones[1], eights[1])


def test_a_step_is_the_same_wherever_the_run_began():
    late_first = [batch_indices(1, step, 7, 30) for step in (90, 0, 41)]
    indices, flips = run(1, range(91), 7, 30)
    for step, batch in zip((90, 0, 41), late_first, strict=True):
        np.testing.assert_array_equal(indices[7 * step : 7 * step + 7], batch[0])
        np.testing.assert_array_equal(flips[7 * step : 7 * step + 7], batch[1])


def test_epochs_and_seeds_differ_in_order_and_in_flips():
    one, two = batch_indices(0, 0, 1000, 1000), batch_indices(0, 1, 1000, 1000)
    other = batch_indices(1, 0, 1000, 1000)
    for second in (two, other):
        assert np.mean(one[0] == second[0]) < 0.02
        assert 0.4 < np.mean(one[1] == second[1]) < 0.6
    # The flip belongs to the position, yet one image must be seen both ways too.
    by_image = one[1][np.argsort(one[0])] == two[1][np.argsort(two[0])]
    assert 0.4 < np.mean(by_image) < 0.6


def test_half_of_the_images_are_flipped_in_every_epoch():
    for epoch in range(5):
        _, flips = batch_indices(0, epoch, 10_000, 10_000)
        assert abs(np.mean(flips) - 0.5) < 0.02  # four standard deviations


def test_images_are_spread_evenly_over_the_epoch():
    firsts = np.array([batch_indices(seed, 0, 1, 10)[0][0] for seed in range(2000)])
    assert np.bincount(firsts, minlength=10).min() > 140  # 200 expected, deviation 13.4


def test_the_order_is_the_same_for_ever():
    # Beside the properties above: a change of these numbers changes every resumed run.
    indices, flips = batch_indices(seed=0, step=1, batch_size=8, num_images=12)
    assert indices.tolist() == GOLDEN[0]
    assert flips.astype(int).tolist() == GOLDEN[1]


def test_threads_get_what_one_thread_gets():
    steps = [0, 50, 1, 51, 2, 52] * 20  # hops over epochs, and so through the cache
    expected = [batch_indices(0, step, 10, 97) for step in steps]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda step: batch_indices(0, step, 10, 97), steps))
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_caller_cannot_spoil_the_order():
    indices, flips = batch_indices(0, 0, 10, 10)  # exactly one epoch
    kept = indices.copy(), flips.copy()
    indices[:], flips[:] = 0, False
    np.testing.assert_array_equal(batch_indices(0, 0, 10, 10), kept)


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="batch_indices needs"):
        batch_indices(*arguments)


def test_importing_the_room_imports_neither_tensorflow_nor_a_device():
    code = "import sys, ddpm_jax.data; assert not {'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The order of files that are read from end to end

SIZES = (5, 9, 1, 8)


@pytest.mark.parametrize("window", [1, 4, 7, 22])
def test_a_stream_visits_every_image_once_an_epoch_and_none_before_its_window_is_read(window):
    starts = np.cumsum((0, *SIZES))
    for epoch in range(5):
        plan = stream_epoch(2, epoch, SIZES, window)
        assert sorted(plan.files) == [0, 1, 2, 3]
        np.testing.assert_array_equal(
            plan.line, np.concatenate([np.arange(starts[f], starts[f + 1]) for f in plan.files])
        )
        for start in range(0, 23, window):
            here = slice(start, start + window)
            np.testing.assert_array_equal(np.sort(plan.order[here]), np.sort(plan.line[here]))
    served = np.concatenate([stream_indices(2, step, 4, SIZES, window)[0] for step in range(23)])
    np.testing.assert_array_equal(served, np.concatenate([stream_epoch(2, i, SIZES, window).order for i in range(4)]))


@pytest.mark.parametrize("window", [23, 1000])
def test_a_window_of_the_whole_set_is_the_order_of_the_host(window):
    for step in range(20):
        for one, other in zip(stream_indices(5, step, 6, SIZES, window), batch_indices(5, step, 6, 23), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_stream_changes_the_order_of_files_and_of_windows_every_epoch():
    plans = [stream_epoch(0, epoch, (10,) * 12, 30) for epoch in range(6)]
    assert len({tuple(plan.files) for plan in plans}) == 6
    assert len({tuple(plan.order % 10) for plan in plans}) == 6
    assert tuple(stream_epoch(1, 0, (10,) * 12, 30).order) != tuple(plans[0].order)


def test_the_flips_of_a_stream_are_those_of_the_host():
    for step in range(9):
        np.testing.assert_array_equal(stream_indices(5, step, 6, SIZES, 3)[1], batch_indices(5, step, 6, 23)[1])
