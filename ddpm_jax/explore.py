"""DDIM explored: ``python -m ddpm_jax.explore grid --workdir runs/digits --out grid.png``.

Each command draws one picture and writes its numbers to a .json beside it.

grid: eta by number of steps, from the same noises.  steps: a row of pictures a number of steps.
equivalence: DDPM against DDIM (eta = 1), and their variances.  determinism: eta = 0 from one x_T with other keys.
reconstruct: images to noise and back.  interpolate: from one noise to another.  mix: two images joined by their noises.
chain: x_t and x0_hat along the chain, as a GIF too.  forward: an image on its way to noise.
schedules: all of them in one plot, without a run.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from ddpm_jax import data, experiment, figures, images, program, studies
from ddpm_jax.compiler import use_cores
from ddpm_jax.config import Config, ConfigError

FLAGS = flags.FLAGS

_RUN = ("workdir", "step", "weights", "seed", "label", "guidance", "spacing")
_CHAIN = (*_RUN, "clip_x0", "num_images")
_IMAGES = ("image", "index")
# What each command may be told, besides --out.
_FLAGS_OF = {
    "grid": (*_CHAIN, "etas", "steps"),
    "steps": (*_CHAIN, "steps", "method"),
    "equivalence": (*_RUN, "num_images", "num_steps"),
    "determinism": (*_CHAIN, "num_steps"),
    "reconstruct": (*_RUN, *_IMAGES, "steps"),
    "interpolate": (*_CHAIN, "num_steps"),
    "mix": (*_RUN, *_IMAGES, "num_steps", "fractions"),
    "chain": (*_CHAIN, "num_steps", "method", "eta", "num_frames"),
    "forward": ("workdir", "seed", *_IMAGES),
    "schedules": ("num_timesteps",),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "grid": {"num_images": 4, "steps": ["10", "50", "100", "1000"]},
    "steps": {"num_images": 8, "steps": ["1", "3", "5", "10", "20", "100"], "method": "ddim"},
    "equivalence": {"num_images": 4},
    "determinism": {"num_images": 6},
    "reconstruct": {"steps": ["10", "20", "50", "100", "200", "1000"]},
    "interpolate": {"num_images": 9},
    "chain": {"num_images": 2},
}
COMMANDS: dict[str, tuple[str, ...]] = dict.fromkeys(_FLAGS_OF, ())


def define_flags() -> None:
    """The program's flags; each command takes some of them and refuses the others."""
    flags.DEFINE_string("workdir", None, "The run to explore.")
    flags.DEFINE_string("out", None, "Picture to write, a PNG; its numbers go to a .json beside it.")
    flags.DEFINE_integer("seed", 0, "Of the noises.", lower_bound=0, upper_bound=2**63 - 1)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest where left out.")
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "The average of the parameters, or the last ones.")
    flags.DEFINE_integer("label", None, "Class of all images; the classes take turns, or are those of --index.")
    flags.DEFINE_float("guidance", None, "The run's own where left out; 1 for reconstruct and mix.")
    flags.DEFINE_string("spacing", None, "leading, trailing, linspace or quadratic; the run's own where left out.")
    flags.DEFINE_bool("clip_x0", None, "Clip predicted images; as in the run where left out.")
    flags.DEFINE_integer("num_images", None, "Pictures: in a cell, in a row, or from end to end.", lower_bound=1)
    flags.DEFINE_integer("num_steps", None, "Of one chain; the run's own where left out, equivalence: T.")
    flags.DEFINE_list("steps", None, "Numbers of steps; those above the run's T are left out.")
    flags.DEFINE_list("etas", ["0", "0.2", "0.4", "0.6", "0.8", "1", "ddpm"], "Of grid: 0 .. 1, or ddpm: fixed_large.")
    flags.DEFINE_float("eta", None, "Of chain: noise of ddim, 0 .. 1; the run's own where left out.")
    flags.DEFINE_string("method", None, "ddim, ddpm, dpm++ or heun; steps: ddim, chain: the run's own.")
    flags.DEFINE_multi_string("image", None, "A picture file; again for another.")
    flags.DEFINE_multi_integer("index", None, "In place of --image, an image of the run's data set.", lower_bound=0)
    flags.DEFINE_list(
        "fractions", ["0", "0.2", "0.4", "0.5", "0.6", "0.8", "1"], "Of mix: weights of the second image."
    )
    flags.DEFINE_integer("num_frames", 40, "Of chain's GIF.", lower_bound=1)
    flags.DEFINE_integer("num_timesteps", 1000, "Of schedules: T.", lower_bound=2)


def main(command: str) -> None:
    """The program."""
    _check_flags(command)
    use_cores(len(FLAGS.image or FLAGS.index or ()) or _value(command, "num_images") or 1)
    out = epath.Path(FLAGS.out)
    picture, numbers, summary = _COMMANDS[command](command)
    if jax.process_index() != 0:
        return
    written = [out, out.with_suffix(".json")]
    if isinstance(picture, studies.Study):
        if picture.frames is not None:
            columns = picture.frames.shape[1] // 2
            written.append(out.with_suffix(".gif"))
            images.save_gif(written[-1], [images.grid(frame, columns=columns) for frame in picture.frames])
        picture = _sheet(picture)
    images.save_png(out, picture)
    images.write_atomically(written[1], (json.dumps({"command": command} | numbers, indent=2) + "\n").encode())
    print(summary)
    print(", ".join(map(str, written)), file=sys.stderr)


_Result = tuple[studies.Study | np.ndarray, dict[str, Any], str]


def _drawn(study: Callable[..., studies.Study], *names: str) -> Callable[[str], _Result]:
    """A command that draws from the run's noises; ``names`` are flags that the study takes as they are."""

    def run_study(command: str) -> _Result:
        config = _config(command)
        lists = _lists(command, config)
        options = {name: _value(command, name) for name in ("num_images", *names)}
        found = study(_load(config), *lists, seed=FLAGS.seed, label=FLAGS.label, **options)
        return found, _report(command, config, found), found.summary

    return run_study


def _lists(command: str, config: Config) -> list[list[Any]]:
    """The lists that a study takes before its options."""
    if command == "grid":
        return [_etas(), _step_counts(command, config)]
    return [_step_counts(command, config)] if command == "steps" else []


def _equivalence(command: str) -> _Result:
    found, numbers, summary = _drawn(studies.equivalence)(command)
    assert isinstance(found, studies.Study)
    config = _run_config()
    variances, apart = studies.variances(config), studies.disagreement(config)
    t = np.arange(config.diffusion.num_timesteps)
    panels = [
        figures.Panel("variance of a step", "t", t[1:], {k: v[1:] for k, v in variances.items()}, True, "nested"),
        figures.Panel("relative difference, where there is any", "t", t[1:], apart, True, "dots"),
    ]
    return figures.stack([_sheet(found), figures.plots(panels)]), numbers, summary


def _reconstruct(command: str) -> _Result:
    config = _config(command)
    counts = _step_counts(command, config)
    pixels, labels = _pictures(config)
    found = studies.reconstruct(_load(config), pixels, counts, labels=labels)
    return found, _report(command, config, found), found.summary


def _mix(command: str) -> _Result:
    config, weights = _config(command), _floats("fractions")
    pixels, _ = _pictures(config, count=2)
    found = studies.mix(_load(config), pixels, weights, label=FLAGS.label)
    return found, _report(command, config, found), found.summary


def _forward(command: str) -> _Result:
    config = _run_config()
    pixels, _ = _pictures(config)
    found = studies.forward(config, pixels, seed=FLAGS.seed)
    return found, _report(command, config, found), found.summary


def _schedules(command: str) -> _Result:
    try:
        curves = studies.schedule_curves(FLAGS.num_timesteps)
    except ValueError as error:
        raise ConfigError(f"--num_timesteps={FLAGS.num_timesteps}: {error}") from None
    titles = {"signal_rate": "signal rate", "noise_rate": "noise rate", "log_snr": "log-SNR"}
    t = np.arange(FLAGS.num_timesteps)
    panels = [
        figures.Panel(title, "t", t, {name: getattr(curve, field) for name, curve in curves.items()})
        for field, title in titles.items()
    ]
    ends = ", ".join(f"{name} {curve.signal_rate[-1]:.4f}" for name, curve in curves.items())
    return figures.plots(panels), studies.schedule_numbers(curves), f"signal rate at the end: {ends}"


_COMMANDS: dict[str, Callable[[str], _Result]] = {
    "grid": _drawn(studies.eta_by_steps),
    "steps": _drawn(studies.few_steps, "method"),
    "equivalence": _equivalence,
    "determinism": _drawn(studies.determinism),
    "reconstruct": _reconstruct,
    "interpolate": _drawn(studies.interpolate),
    "mix": _mix,
    "chain": _drawn(studies.chain, "num_frames"),
    "forward": _forward,
    "schedules": _schedules,
}


def _check_flags(command: str) -> None:
    """Before anything is loaded: what is missing, what this command does not take, and what would fail at the end."""
    known = {name for names in _FLAGS_OF.values() for name in names}
    for name in sorted(known - set(_FLAGS_OF[command])):
        if FLAGS[name].present:
            takers = ", ".join(other for other, names in _FLAGS_OF.items() if name in names)
            raise ConfigError(f"--{name}: is of {takers}, not of {command}; leave it out")
    if "workdir" in _FLAGS_OF[command] and not FLAGS.workdir:
        raise ConfigError("--workdir is missing: the run to explore, such as --workdir runs/digits")
    if not FLAGS.out:
        raise ConfigError(f"--out is missing: the picture to write, such as --out {command}.png")
    try:
        images.check_suffix(FLAGS.out, ".png")
        epath.Path(FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    if "image" in _FLAGS_OF[command] and bool(FLAGS.image) == bool(FLAGS.index):
        raise ConfigError("--image is missing: a picture file, or --index, an image of the run's data set; one of both")


def _run_config() -> Config:
    config = experiment.read_config(FLAGS.workdir)
    if config is None:
        raise experiment.RunError(
            f"{FLAGS.workdir}: holds no run (config.json is missing); train one with python -m ddpm_jax.train"
        )
    return config


def _config(command: str) -> Config:
    """The run's config, its sampling as the flags say."""
    config = _run_config()
    _check_label(command, config)
    fields = {name: FLAGS[name].value for name in ("guidance", "spacing", "clip_x0", "num_steps")}
    if command in ("reconstruct", "mix") and FLAGS.guidance is None:
        fields["guidance"] = 1.0  # the inverse of a guided chain is unstable
    if command == "equivalence" and FLAGS.num_steps is None:
        fields["num_steps"] = config.diffusion.num_timesteps
    if command in ("steps", "chain"):
        fields["method"] = _value(command, "method")
    if command == "chain":
        fields["eta"] = FLAGS.eta
    return studies.with_sampling(config, **{name: value for name, value in fields.items() if value is not None})


def _load(config: Config) -> experiment.Run:
    """The run; the slow part, after all that may be wrong with the flags."""
    return experiment.load(FLAGS.workdir, weights=FLAGS.weights, step=FLAGS.step)._replace(config=config)


def _check_label(command: str, config: Config) -> None:
    num_classes = config.model.num_classes
    if FLAGS.label is not None and not 0 <= FLAGS.label < num_classes:
        remedy = (
            f"choose 0 .. {num_classes - 1}" if num_classes else "this run was trained without labels; leave it out"
        )
        raise ConfigError(f"--label={FLAGS.label}: {remedy}")
    one_class = command in ("interpolate", "mix") or (command == "reconstruct" and FLAGS.image)
    if FLAGS.label is None and one_class and num_classes and not config.model.label_dropout:
        raise ConfigError(
            f"--label is missing: this run's network was never trained without a class; choose 0 .. {num_classes - 1}"
        )
    if FLAGS.label is None and one_class and FLAGS.guidance not in (None, 1.0):
        raise ConfigError(f"--guidance={FLAGS.guidance:g}: guides towards a class; give --label too")


def _value(command: str, name: str) -> Any:
    value = FLAGS[name].value
    return _DEFAULTS.get(command, {}).get(name) if value is None else value


def _step_counts(command: str, config: Config) -> list[int]:
    """--steps, without those above T, which are named."""
    texts, T = _value(command, "steps"), config.diffusion.num_timesteps
    try:
        counts = [int(text) for text in texts]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--steps={','.join(texts)}: give whole numbers from 1 to {T}, such as 10,50")
    above = [n for n in counts if n > T]
    if len(above) == len(counts):
        raise ConfigError(f"--steps={','.join(texts)}: all are above the run's T = {T}; choose 1 .. {T}")
    if above and jax.process_index() == 0:
        print(f"left out, above the run's T = {T}: {', '.join(map(str, above))} steps", file=sys.stderr)
    return [n for n in counts if n <= T]


def _etas() -> list[float | str]:
    numbers = iter(_floats("etas", [text for text in FLAGS.etas if text != "ddpm"]))
    return [text if text == "ddpm" else next(numbers) for text in FLAGS.etas]


def _floats(name: str, texts: list[str] | None = None) -> list[float]:
    """A list of numbers in 0 .. 1, of a flag or of some of its items."""
    given: list[str] = list(FLAGS[name].value or [])
    texts = given if texts is None else texts
    try:
        found = [float(text) for text in texts]
    except ValueError:
        found = [-1.0]
    if not given or not all(0 <= x <= 1 for x in found):
        raise ConfigError(f"--{name}={','.join(given)}: give numbers in 0 .. 1, such as 0,0.5,1")
    return found


def _pictures(config: Config, count: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 [N H W C] of --image or --index, and their labels: --label, or those of the data set."""
    given = FLAGS.image or FLAGS.index
    if count is not None and len(given) != count:
        raise ConfigError(f"--{'image' if FLAGS.image else 'index'}: given {len(given)} times; give it {count} times")
    settings, labels = config.data, None
    if FLAGS.image:
        pixels = np.stack([data.read_picture(path, settings.image_size, settings.channels) for path in FLAGS.image])
    else:

        def choose(number: int) -> np.ndarray:
            if max(FLAGS.index) >= number:
                have = f"data.source={settings.source!r} has images 0 .. {number - 1}"
                raise ConfigError(f"--index={max(FLAGS.index)}: {have}")
            return np.array(FLAGS.index)

        image_set = data.load_some(
            settings.source,
            choose,
            streamed=settings.placement == "stream",
            image_size=settings.image_size,
            channels=settings.channels,
            split=settings.split,
            data_dir=settings.data_dir,
        )
        pixels, labels = image_set.images, image_set.labels if config.model.num_classes else None
    if FLAGS.label is not None:
        labels = np.full(len(given), FLAGS.label, np.int32)
    return pixels, labels


def _sheet(study: studies.Study) -> np.ndarray:
    return figures.sheet(study.pictures, study.rows, study.columns)


def _report(command: str, config: Config, study: studies.Study) -> dict[str, Any]:
    """What was drawn, with the settings that had a say in it."""
    settings = {name: FLAGS[name].value for name in ("workdir", "step", "weights", "seed", "label", *_IMAGES)}
    sampling = {name: getattr(config.sampling, name) for name in ("spacing", "guidance", "clip_x0")}
    report = {name: value for name, value in (settings | sampling).items() if name in _FLAGS_OF[command]}
    return report | study.numbers | {"summary": study.summary}


if __name__ == "__main__":
    program.run(main, define_flags, COMMANDS)
