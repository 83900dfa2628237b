"""How every program starts: flags in, one clear line out where the user made a mistake."""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax.config import Config, ConfigError, field_names, nearest_field, validate

Commands = Mapping[str, Sequence[str]]


def run(
    main: Callable[..., int | None],
    define_flags: Callable[[], None],
    commands: Commands | None = None,
    *,
    alone: bool = False,
    saves: bool = False,
) -> NoReturn:
    """Defines and parses the flags, joins the processes of the run and runs ``main``; its value is the exit status.

    The flags are defined here and not when a program's module is imported, so that a notebook may import two of them.

    Args:
        main: the program.
        define_flags: defines its flags.
        commands: what the first argument may be, each with the names of the arguments that follow it, all of which
            ``main`` is called with: {"from-ddpm": ("PATH",)}. None: the program takes flags only.
        alone: the program is one process wherever it runs, and has no ``--distributed``.
        saves: at SIGTERM the program saves and stops by itself; others just end.

    A mistake of the user's (a flag, a config, the data, the workdir) ends in one line on stderr and status 2 or 1,
    never in a traceback; anything else is a bug and shows where it is.
    """
    define_flags()
    if not alone:
        _define_distributed()
    warnings.showwarning = _show_warning
    logging.set_verbosity(logging.ERROR)  # Orbax logs a dozen lines a checkpoint
    app.run(
        lambda argv: _main(functools.partial(main, *argv[1:]), alone, saves),
        flags_parser=functools.partial(_parse_flags, commands=commands),
    )
    raise AssertionError("app.run does not return")


def _define_distributed() -> None:
    flags.DEFINE_enum("distributed", "auto", ["auto", "off"], "Join the processes of a cluster; see docs/clusters.md.")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where the cluster does not say it.")
    flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of this one, 0 .. num_processes - 1.", lower_bound=0)


def _main(main: Callable[[], int | None], alone: bool, saves: bool) -> NoReturn:
    """Exits with the status of ``main``, started with its peers."""
    import jax

    from ddpm_jax import distributed

    try:
        status = _guarded(main if alone else functools.partial(_joined, main, saves))
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if distributed.lost_peer(error):
            reason = str(error).splitlines()[0]
            print(f"error: another process of the run is gone ({reason:.200}); start all again", file=sys.stderr)
            status = distributed.LOST_PEER
        else:
            traceback.print_exc()
            status = 1
    if status not in (None, 0, 75) and jax.distributed.is_initialized():
        # At once: an orderly exit would wait for the peers, which wait for this process. The runtime will end them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 1)
    sys.exit(status)


def _joined(main: Callable[[], int | None], saves: bool) -> int | None:
    """``main``, after the processes of the run have found each other; all but the first are silent but for errors."""
    from ddpm_jax import distributed

    FLAGS = flags.FLAGS
    distributed.start(FLAGS.distributed, FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, saves=saves)
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        warnings.simplefilter("ignore")
    return main()


def _guarded(main: Callable[[], int | None]) -> int | None:
    from ddpm_jax.data import DataError
    from ddpm_jax.distributed import StartError, is_first
    from ddpm_jax.experiment import RunError
    from ddpm_jax.interop import InteropError
    from ddpm_jax.training import Stopped

    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, InteropError, RunError, StartError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
        return stopped.exit_code


def _parse_flags(argv: Sequence[str], commands: Commands | None) -> list[str]:
    """absl's own parser, with its errors and those of a config file in one line."""
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(_with_config_of_run(argv))
        _check_arguments(rest[1:], commands)
        return rest
    except Exception as error:  # of absl, of ml_collections, or of the config file, which is a program of the user's
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: {first_line} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def _check_arguments(arguments: Sequence[str], commands: Commands | None) -> None:
    if commands is None:
        if arguments:
            raise ConfigError(f"{arguments[0]}: not a flag; flags begin with --, and a bool is --name or --noname")
        return
    usages = ", ".join(" ".join([command, *names]) for command, names in commands.items())
    if not arguments or arguments[0] not in commands:
        raise ConfigError(f"{arguments[0] if arguments else 'no command'}: choose one of {usages}")
    command, *rest = arguments
    if len(rest) != len(commands[command]):
        raise ConfigError(f"{' '.join(arguments)}: write {' '.join([command, *commands[command]])}")


def _with_config_of_run(argv: Sequence[str]) -> list[str]:
    """For a program that takes --config and was given --workdir only: the config of the run there."""
    given = {argument.lstrip("-").partition("=")[0]: i for i, argument in enumerate(argv) if argument.startswith("-")}
    if "config" not in flags.FLAGS or "config" in given or "workdir" not in given:
        return list(argv)
    i = given["workdir"]
    workdir = argv[i].partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
    from ddpm_jax import run_config

    run_config.get_config(workdir)  # its errors as they are, which ml_collections would bury in its own
    return [argv[0], f"--config={run_config.__file__}:{workdir}", *argv[1:]]


def _check_overrides(argv: Sequence[str]) -> None:
    """ml_collections answers a misspelt field with a traceback; this names the nearest real one."""
    known = field_names()
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        name = name.removeprefix("no") if name.startswith("noconfig.") else name
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        field = name.removeprefix("config.")
        if field not in known and field.removeprefix("no") not in known:
            raise ConfigError(f"--{name}: no such field; did you mean --config.{nearest_field(field)}?")


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def define_config() -> None:
    """The flag ``--config``, a file, and ``--config.<field>``, its overrides; ``--workdir`` alone takes its run's."""
    help_text = "Path to a config file, such as configs/flowers.py; the config of the run in --workdir where left out."
    config_flags.DEFINE_config_file("config", None, help_text)


def loaded_config() -> tuple[Config, str]:
    """The validated value of ``--config`` with its overrides, and its name: "configs/flowers.py" -> "flowers"."""
    flag = flags.FLAGS["config"]
    if flag.value is None:
        raise ConfigError("--config is missing; for example --config configs/digits.py")
    path = config_flags.get_config_filename(flag)
    try:
        validate(flag.value)
    except OSError:  # ml_collections keeps a missing file's error until the config is used
        raise ConfigError(f"--config={path}: there is no such file") from None
    return flag.value, os.path.splitext(os.path.basename(path.partition(":")[0]))[0]
