"""``python -m ddpm_jax.explore``: each command line in a process of its own, all of them once for the whole module."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import experiment, images, studies

FEW = ["--num_images=2", "--num_steps=4"]
GOOD = {
    "determinism": ["determinism", *FEW],
    "reconstruct": ["reconstruct", "--index=3", "--steps=5,50,1000"],
    "schedules": ["schedules", "--num_timesteps=200"],
    "forward": ["forward", "--index=0", "--index=7", "--out=new/forward.png"],
}
SLOW = {
    "equivalence": ["equivalence", *FEW],
    "grid": ["grid", "--etas=0,ddpm", "--steps=3,5,51", "--num_images=2"],
    "steps": ["steps", "--steps=1,3,5", "--num_images=3", "--spacing=leading", "--method=dpm++"],
    "interpolate": ["interpolate", "--num_images=3", "--num_steps=4", "--label=1", "--guidance=2"],
    "unlabelled": ["interpolate", "--num_images=3", "--num_steps=4"],
    "mix": ["mix", "--image=a.png", "--image=b.jpg", "--fractions=0,0.5,1", "--num_steps=50", "--label=2"],
    "chain": ["chain", "--num_steps=6", "--num_images=2", "--num_frames=3", "--eta=1", "--noclip_x0"],
    "file": ["reconstruct", "--image=a.png", "--steps=5", "--label=0", "--weights=raw", "--step=10"],
}
BAD = {
    "no command": ([], ["no command", "grid"]),
    "no workdir": (["grid"], ["--workdir"]),
    "no run": (["grid", "--workdir=absent"], ["absent", "ddpm_jax.train"]),
    "no such step": (["determinism", "RUN", "--step=7"], ["7", "5, 10, 12"]),
    "no run to read": (["forward", "--workdir=absent", "--index=0"], ["absent", "ddpm_jax.train"]),
    "no out": (["grid", "RUN", "--out="], ["--out", "grid.png"]),
    "suffix": (["grid", "--workdir=absent", "--out=x.jpg"], ["x.jpg", ".png"]),
    "a flag of another": (["steps", "RUN", "--etas=0"], ["--etas", "grid", "not of steps"]),
    "a run for schedules": (["schedules", "RUN"], ["--workdir", "not of schedules"]),
    "no image": (["reconstruct", "RUN"], ["--image", "--index"]),
    "both": (["forward", "RUN", "--image=a.png", "--index=1"], ["--image", "one of both"]),
    "unreadable": (["forward", "RUN", "--image=text.png"], ["text.png", "cannot be read"]),
    "absent image": (["reconstruct", "RUN", "--image=absent.png"], ["absent.png", "cannot be read"]),
    "index": (["forward", "RUN", "--index=20"], ["--index=20", "0 .. 19"]),
    "one image": (["mix", "RUN", "--image=a.png"], ["--image", "2 times"]),
    "no number": (["steps", "RUN", "--steps=ten"], ["--steps=ten", "1 to 50"]),
    "zero steps": (["steps", "RUN", "--steps=0,5"], ["--steps=0,5", "1 to 50"]),
    "all above T": (["grid", "RUN", "--steps=51,100"], ["--steps=51,100", "T = 50"]),
    "num_steps": (["determinism", "RUN", "--num_steps=51"], ["num_steps=51", "1 .. 50"]),
    "eta": (["grid", "RUN", "--etas=0,2"], ["--etas=0,2", "0 .. 1"]),
    "fractions": (["mix", "RUN", "--index=1", "--index=2", "--fractions="], ["--fractions", "0 .. 1"]),
    "label": (["steps", "RUN", "--label=3"], ["--label=3", "0 .. 2"]),
    "guidance to nowhere": (["interpolate", "RUN", "--guidance=2"], ["--guidance=2", "--label"]),
    "method": (["steps", "RUN", "--method=euler"], ["method='euler'", "heun"]),
    "short schedules": (["schedules", "--num_timesteps=10"], ["--num_timesteps=10"]),
    "stray": (["grid", "x.png", "RUN"], ["x.png"]),
}


def _run(trained, run_program, cwd, lines):
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(cwd / "a.png")
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(cwd / "b.jpg")
    (cwd / "text.png").write_text("no picture")
    workdir = f"--workdir={trained.workdir}"
    return run_program(
        "ddpm_jax.explore", {name: [workdir if x == "RUN" else x for x in line] for name, line in lines.items()}, cwd
    )


def _good(lines):
    return {
        name: [line[0], *(["RUN"] if line[0] != "schedules" else []), f"--out={name}.png", *line[1:]]
        for name, line in lines.items()
    }


@pytest.fixture(scope="module")
def results(trained, run_program, tmp_path_factory):
    """How each command line ended, and the folder in which they ran."""
    cwd = tmp_path_factory.mktemp("explored")
    bad = {name: [*line[:1], "--out=bad.png", *line[1:]] for name, (line, _) in BAD.items()}
    return _run(trained, run_program, cwd, _good(GOOD) | bad), cwd


@pytest.fixture(scope="module")
def slow_results(trained, run_program, tmp_path_factory):
    """Those of the slow ones."""
    cwd = tmp_path_factory.mktemp("explored_slowly")
    return _run(trained, run_program, cwd, _good(SLOW)), cwd


def _check(results, name, lines):
    """A picture of some size, and its numbers beside it."""
    result, cwd = results[0][name], results[1]
    assert result.code == 0, result.stderr
    out = cwd / next((x[6:] for x in lines[name] if x.startswith("--out=")), f"{name}.png")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture))) > 20
    assert str(out.relative_to(cwd)) in result.stderr.splitlines()[-1]
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["command"] == lines[name][0]
    assert result.stdout.strip()
    assert numbers.get("weights") in (None, "ema", "raw")  # no study's number hides a flag
    return numbers


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_line_that_names_it(results, name):
    result = results[0][name]
    assert result.code in (1, 2)
    assert [part for part in BAD[name][1] if part not in result.error] == [], result.error


def test_only_what_was_asked_for_is_written(results):
    written = {str(path.relative_to(results[1])) for path in results[1].rglob("*") if path.is_file()}
    names = {"new/forward" if name == "forward" else name for name in GOOD}
    given = {"a.png", "b.jpg", "text.png"}
    assert written - given == {f"{name}.{suffix}" for name in names for suffix in ("png", "json")}


@pytest.mark.slow
def test_the_grid_leaves_out_what_the_run_has_not_and_says_so(slow_results):
    numbers = _check(slow_results, "grid", SLOW)
    assert (numbers["etas"], numbers["steps"]) == ([0.0, "ddpm"], [3, 5])
    assert "T = 50: 51 steps" in slow_results[0]["grid"].stderr
    assert np.shape(numbers["rms_difference_from_longest"]) == (2, 2)


@pytest.mark.slow
def test_ddpm_is_ddim_but_for_clipping_with_the_networks_own_eps(slow_results):
    numbers = _check(slow_results, "equivalence", SLOW)
    pairs = {name: pair["largest_difference"] for name, pair in numbers["pairs"].items()}
    assert pairs["no clipping"] < 1e-4
    assert pairs["clipped, eps re-derived"] < 1e-4
    assert pairs["clipped, the network's eps"] > 1e-3
    assert len(numbers["variances"]["every_t"]["ddpm float32"]) == 50


def test_eta_0_forgets_the_key(results):
    largest = _check(results, "determinism", GOOD)["largest_difference"]
    assert largest["eta_0"] == 0 < largest["eta_1"]


def test_more_steps_reconstruct_better(results):
    numbers = _check(results, "reconstruct", GOOD)
    assert numbers["steps"] == [5, 50]
    assert numbers["mse"][1] < numbers["mse"][0]
    assert numbers["guidance"] == 1
    assert "Song et al." in numbers["paper"]["source"]


def test_a_reconstruction_has_the_data_sets_label(results, trained, npz_path):
    run = experiment.load(str(trained.workdir))
    with np.load(npz_path) as archive:
        pixels, labels = archive["images"][3:4], archive["labels"][3:4]
    mine = studies.reconstruct(run, pixels, [5], labels=labels.astype(np.int32))
    assert _check(results, "reconstruct", GOOD)["mse"][0] == pytest.approx(mine.numbers["mse"][0], rel=1e-3)


def test_the_way_to_noise_and_the_schedules(results):
    assert _check(results, "forward", GOOD)["t"] == [0, 12, 25, 37, 49]
    numbers = _check(results, "schedules", GOOD)
    assert numbers["num_timesteps"] == 200
    assert set(numbers["schedules"]) == {"linear", "cosine", "quadratic", "sigmoid", "offset_cosine"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_others_end_well(slow_results, name):
    _check(slow_results, name, SLOW)


@pytest.mark.slow
def test_what_the_others_say(slow_results):
    steps = _check(slow_results, "steps", SLOW)
    assert steps["spacings"] == ["trailing", "leading", "leading"]
    assert steps["rms_difference_from_longest"][2] == 0
    noise = _check(slow_results, "interpolate", SLOW)["rms_of_noise"]
    assert noise["line"][1] < noise["slerp"][1]
    assert _check(slow_results, "mix", SLOW)["fractions"] == [0, 0.5, 1]
    chain = _check(slow_results, "chain", SLOW)
    assert len(chain["t"]) == 3
    with Image.open(slow_results[1] / "chain.gif") as movie:
        assert movie.n_frames == 4
    labelled, plain = (np.asarray(Image.open(slow_results[1] / f"{x}.png")) for x in ("interpolate", "unlabelled"))
    assert labelled.shape == plain.shape
    assert (labelled != plain).any()


@pytest.mark.slow
def test_a_picture_from_a_file_is_fitted_to_the_run(slow_results, trained):
    from ddpm_jax import data

    pixels = data.read_picture(str(slow_results[1] / "a.png"), 8, 1)[None]
    run = experiment.load(str(trained.workdir), weights="raw", step=10)
    mine = studies.reconstruct(run, pixels, [5], labels=np.zeros(1, np.int32))
    assert _check(slow_results, "file", SLOW)["mse"][0] == pytest.approx(mine.numbers["mse"][0], rel=1e-3)
    assert images.to_float(pixels).shape == (1, 8, 8, 1)
