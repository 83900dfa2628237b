"""``python -m ddpm_jax.sample``: each command line in a process of its own, all of them once for the whole module."""

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax import experiment, images, training

GOOD = {
    "all": ["--out=all.png", "--npz=all.npz", "--gif=all.gif"],
    "small batches": ["--npz=batches.npz", "--batch_size=2"],
    "other seed": ["--npz=seed.npz", "--seed=1"],
    "raw": ["--npz=new/raw.npz", "--weights=raw", "--step=10"],
    "one label": ["--npz=label.npz", "--label=1"],
    "noisy": ["--npz=noisy.npz", "--eta=1", "--noclip_x0"],
    "ddpm": ["--npz=ddpm.npz", "--method=ddpm", "--variance=fixed_large"],
    "dpm++": ["--npz=dpmpp.npz", "--method=dpm++"],
    "thresholded heun": ["--npz=heun.npz", "--method=heun", "--dynamic_threshold=0.5", "--max_threshold=2"],
    "guided": ["--npz=guided.npz", "--guidance=3"],
    "classes": ["--out=classes.png", "--npz=classes.npz", "--num_images=6"],
    "leading": ["--npz=leading.npz", "--spacing=leading"],
    "offset": ["--npz=offset.npz", "--spacing=leading", "--steps_offset=3"],
    "end": ["--npz=end.npz", "--end=first"],
    "range": ["--npz=range.npz", "--clip_range=0.5"],
}
BAD = {
    "no workdir": (None, ["--out=x.png"], ["--workdir"]),
    "no run": ("absent", ["--out=x.png"], ["absent", "ddpm_jax.train"]),
    "no output": ("RUN", [], ["--out"]),
    "suffix of out": ("RUN", ["--out=x.jpg"], ["x.jpg", ".png"]),
    "suffix of npz": ("absent", ["--npz=x.npy"], ["x.npy", ".npz"]),  # before anything is loaded
    "suffix of gif": ("absent", ["--gif=x.mp4"], ["x.mp4", ".gif"]),
    "no such step": ("RUN", ["--out=x.png", "--step=7"], ["7", "5, 10, 12"]),
    "weights": ("RUN", ["--out=x.png", "--weights=best"], ["weights", "ema"]),
    "label": ("RUN", ["--out=x.png", "--label=3"], ["--label=3", "0 .. 2"]),
    "negative label": ("RUN", ["--out=x.png", "--label=-1"], ["--label=-1", "0 .. 2"]),
    "no images": ("RUN", ["--out=x.png", "--num_images=0"], ["num_images"]),
    "too many steps": ("RUN", ["--out=x.png", "--num_steps=51"], ["num_steps=51", "1 .. 50"]),
    "spacing": ("RUN", ["--out=x.png", "--spacing=even"], ["spacing='even'", "trailing"]),
    "eta with ddpm": ("RUN", ["--out=x.png", "--method=ddpm", "--eta=0.5"], ["eta=0.5", "ddpm"]),
    "eta": ("RUN", ["--out=x.png", "--eta=2"], ["eta=2", "0 .. 1"]),
    "guidance": ("RUN", ["--out=x.png", "--guidance=-1"], ["guidance=-1", "negative"]),
    "offset of trailing": ("RUN", ["--out=x.png", "--steps_offset=1"], ["steps_offset=1", "'trailing'", "leading"]),
    "end of ddpm": ("RUN", ["--out=x.png", "--method=ddpm", "--end=first"], ["end='first'", "clean"]),
    "clip range": ("RUN", ["--out=x.png", "--clip_range=0"], ["clip_range=0", "positive"]),
    "variance": ("RUN", ["--out=x.png", "--method=ddpm", "--variance=learned"], ["learned", "learned_variance"]),
    "cap": ("RUN", ["--out=x.png", "--max_threshold=2"], ["max_threshold=2", "dynamic_threshold"]),
    "unknown flag": ("RUN", ["--out=x.png", "--number=3"], ["number"]),
    "stray argument": ("RUN", ["x.png"], ["x.png"]),
    "label of a run without labels": ("UNLABELLED", ["--out=x.png", "--label=0"], ["--label=0", "without labels"]),
    "guidance of a run without labels": (
        "UNLABELLED",
        ["--out=x.png", "--guidance=2"],
        ["guidance=2", "label_dropout"],
    ),
}
COMMON = ["--num_images=5", "--num_steps=4"]


@pytest.fixture(scope="module")
def unlabelled(make_config, compilation_cache, tmp_path_factory):
    """A run without classes, saved before its first step."""
    workdir = str(tmp_path_factory.mktemp("runs") / "unlabelled")
    config = make_config({"model.num_classes": 0, "model.label_dropout": 0.0, "model.channel_mults": (1,)})
    optimizer, _ = experiment.make_optimizer(config)
    init_fn = experiment.make_init_fn(config, experiment.make_model(config))
    experiment.write_config(workdir, config)
    with training.open_checkpoints(workdir) as checkpoints:
        training.save(checkpoints, training.init_state(init_fn, optimizer, training.make_mesh(), jax.random.key(0)))
    return workdir


@pytest.fixture(scope="module")
def results(trained, unlabelled, run_program, tmp_path_factory):
    """How each command line ended, and the folder in which they ran."""
    cwd = tmp_path_factory.mktemp("samples")
    workdirs = {"RUN": str(trained.workdir), "UNLABELLED": unlabelled}
    lines = {name: [f"--workdir={trained.workdir}", *COMMON, *flags] for name, flags in GOOD.items()}
    for name, (workdir, flags, _) in BAD.items():
        lines[name] = ([f"--workdir={workdirs.get(workdir, workdir)}"] if workdir else []) + flags
    return run_program("ddpm_jax.sample", lines, cwd), cwd


@pytest.fixture
def drawn(results):
    """``drawn("again")``: the images of an npz, as int."""

    def read(name: str) -> np.ndarray:
        with np.load(results[1] / f"{name}.npz") as archive:
            assert list(archive) == ["images", "labels"]
            assert archive["images"].dtype == np.uint8
            return archive["images"].astype(int)

    return read


@pytest.mark.parametrize("name", GOOD)
def test_it_ends_well_and_tells_where_the_pictures_lie(results, name):
    result = results[0][name]
    assert result.code == 0, result.stderr
    for flag in GOOD[name]:
        if flag.split("=")[0] in ("--out", "--npz", "--gif"):
            assert (results[1] / flag.split("=")[1]).exists()
            assert flag.split("=")[1] in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_line_that_names_it(results, name):
    result = results[0][name]
    assert result.code in (1, 2)
    assert [part for part in BAD[name][2] if part not in result.error] == [], result.error


def test_only_what_was_asked_for_is_written(results):
    names = {flag.split("=")[1] for flags in GOOD.values() for flag in flags if flag[:5] in ("--out", "--npz", "--gif")}
    written = {str(path.relative_to(results[1])) for path in results[1].rglob("*") if path.is_file()}
    assert written == names


def test_the_npz_holds_every_image(drawn):
    assert drawn("all").shape == (5, 8, 8, 1)


def test_the_png_is_the_grid_of_the_npz(results, drawn):
    with Image.open(results[1] / "all.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), images.grid(drawn("all").astype(np.uint8))[..., 0])


def test_the_png_has_a_row_a_class(results):
    with np.load(results[1] / "classes.npz") as archive:
        found, labels = archive["images"], archive["labels"]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    rows = [found[labels == label] for label in range(3)]
    with Image.open(results[1] / "classes.png") as picture:
        expected = images.grid(np.concatenate(rows), columns=2)
        np.testing.assert_array_equal(np.asarray(picture), expected[..., 0])


def test_the_gif_ends_in_the_pictures(results, drawn):
    with Image.open(results[1] / "all.gif") as movie:
        assert movie.n_frames == 4 + 1  # the steps, and what came of them
        movie.seek(4)
        last = np.asarray(movie.convert("L")).astype(int)
        movie.seek(0)
        first = np.asarray(movie.convert("L")).astype(int)
    np.testing.assert_allclose(last, images.grid(drawn("all").astype(np.uint8))[..., 0], atol=1)
    assert np.abs(first - last).mean() > 5


def test_the_same_seed_gives_the_same_pictures_whatever_the_batch_size(drawn):
    np.testing.assert_allclose(drawn("batches"), drawn("all"), atol=1)


@pytest.mark.parametrize(
    "name",
    ["seed", "new/raw", "label", "noisy", "ddpm", "dpmpp", "heun", "guided", "leading", "end", "range"],
)
def test_each_flag_changes_the_pictures(drawn, name):
    assert np.abs(drawn(name) - drawn("all")).max() > 1


def test_an_offset_changes_the_pictures_of_leading(drawn):
    assert np.abs(drawn("offset") - drawn("leading")).max() > 1


def test_a_label_changes_only_the_pictures_of_other_classes(drawn):
    # Pictures 1 and 4 of a run with three classes have label 1 anyway.
    same = np.abs(drawn("label") - drawn("all")).max((1, 2, 3)) <= 1
    assert same.tolist() == [False, True, False, False, True]


@pytest.mark.slow
def test_a_run_with_a_table_of_betas_and_a_plan_of_its_own(make_config, write_config_file, run_program, tmp_path):
    """As a converted run has them: through the flags of training, config.json, and the flags of sampling."""
    betas = (*np.linspace(0.05, 0.6, 19).tolist(), 1.0)  # ends in pure noise
    fields = {"train.num_steps": 1, "model.channel_mults": (1,), "sampling.spacing": "leading"}
    config = write_config_file(tmp_path / "tiny.py", make_config(fields))
    overrides = {"diffusion.schedule": "table", "diffusion.num_timesteps": 20, "sampling.steps_offset": 3}
    overrides |= {"diffusion.betas": betas, "sampling.end": "first", "sampling.clip_range": 1.5}
    flags = [f"--config={config}", *(f"--config.{field}={value}" for field, value in overrides.items())]
    trained = run_program("ddpm_jax.train", {"": [*flags, "--workdir=run"]}, tmp_path)[""]
    assert trained.code == 0, trained.stderr
    read = experiment.read_config(str(tmp_path / "run"))
    assert {field: config_lib.get(read, field) for field in overrides} == overrides
    np.testing.assert_allclose(experiment.make_schedule(read).betas, betas, rtol=1e-6)
    assert [part.tolist() for part in experiment.sampling_options(read)["plan"]] == [
        [19, 15, 11, 7, 3],
        [15, 11, 7, 3, 0],
    ]
    lines = {"own": [], "ddpm": ["--method=ddpm"], "trailing": ["--spacing=trailing"], "shorter": ["--num_steps=4"]}
    lines = {name: [*line, "--workdir=run", f"--npz={name}.npz", "--num_images=2"] for name, line in lines.items()}
    results = run_program("ddpm_jax.sample", lines, tmp_path)
    assert {name: result.code for name, result in results.items()} == dict.fromkeys(lines, 0), results
    own, ddpm = (np.load(tmp_path / f"{name}.npz")["images"].astype(int) for name in ("own", "ddpm"))
    assert np.abs(own - ddpm).max() > 1


@pytest.mark.slow
def test_four_devices_draw_what_one_draws(results, drawn, trained, run_program):
    lines = {
        "all": [f"--workdir={trained.workdir}", *COMMON, "--npz=four.npz", "--gif=four.gif"],
        "eta": [
            f"--workdir={trained.workdir}",
            *COMMON,
            "--npz=four_noisy.npz",
            "--eta=1",
            "--noclip_x0",
            "--batch_size=3",
        ],
    }
    flags = "--xla_force_host_platform_device_count=4"
    ended = run_program("ddpm_jax.sample", lines, results[1], XLA_FLAGS=flags)
    assert {name: result.code for name, result in ended.items()} == {"all": 0, "eta": 0}, ended
    np.testing.assert_allclose(drawn("four"), drawn("all"), atol=1)
    np.testing.assert_allclose(drawn("four_noisy"), drawn("noisy"), atol=1)
