"""How every program starts: flags in, one clear line out where the user made a mistake."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax.config import Config, ConfigError, field_names, nearest_field, validate


def run(main: Callable[[], int | None], define_flags: Callable[[], None]) -> NoReturn:
    """Defines and parses the flags and runs ``main``; its value is the exit status.

    The flags are defined here and not when a program's module is imported, so that a notebook may import two of them.

    A mistake of the user's (a flag, a config, the data, the workdir) ends in one line on stderr and status 2 or 1,
    never in a traceback; anything else is a bug and shows where it is.
    """
    define_flags()
    warnings.showwarning = _show_warning
    logging.set_verbosity(logging.ERROR)  # Orbax logs a dozen lines a checkpoint
    app.run(lambda _: sys.exit(_guarded(main)), flags_parser=_parse_flags)
    raise AssertionError("app.run does not return")


def _guarded(main: Callable[[], int | None]) -> int | None:
    from ddpm_jax.data import DataError
    from ddpm_jax.experiment import RunError
    from ddpm_jax.training import Stopped

    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's own parser, with its errors and those of a config file in one line."""
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(list(argv))
        if rest[1:]:
            raise ConfigError(f"{rest[1]}: not a flag; flags begin with --, and a bool is --name or --noname")
        return rest
    except Exception as error:  # of absl, of ml_collections, or of the config file, which is a program of the user's
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: {first_line} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


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
    """The flag ``--config``, a file, and ``--config.<field>``, its overrides."""
    config_flags.DEFINE_config_file("config", None, "Path to a config file, such as configs/flowers.py.")


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
