"""How every program starts: flags in, one clear line out where the user made a mistake."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax.config import Config, ConfigError, field_names, nearest_field, validate


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parses the flags and runs ``main``; its value is the exit status.

    A mistake of the user's (a flag, a config, the data, the workdir) ends in one line on stderr and status 2 or 1,
    never in a traceback; anything else is a bug and shows where it is.
    """
    warnings.showwarning = _show_warning
    logging.set_verbosity(logging.ERROR)  # Orbax logs a dozen lines a checkpoint
    app.run(lambda _: sys.exit(_guarded(main)), flags_parser=_parse_flags)
    raise AssertionError("app.run does not return")


def _guarded(main: Callable[[], int | None]) -> int | None:
    from ddpm_jax.data import DataError
    from ddpm_jax.experiment import RunError

    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's own parser, with its errors and those of a config file in one line."""
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(list(argv))
        if rest[1:]:
            raise ConfigError(f"{rest[1]}: not a flag; flags begin with --")
        return rest
    except (
        flags.Error,
        ConfigError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        ImportError,
    ) as error:
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


def loaded_config(holder: flags.FlagHolder[Config]) -> Config:
    """The validated value of ``--config`` with its overrides.

    ml_collections loads the file when the flag is parsed and reports a missing one only here.
    """
    config = holder.value
    if config is None:
        raise ConfigError(f"--{holder.name} is missing; for example --{holder.name} configs/digits.py")
    try:
        validate(config)
    except OSError:
        path = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise ConfigError(f"--{holder.name}={path}: there is no such file") from None
    return config


def config_name(path: str) -> str:
    """ "configs/flowers.py" or "configs/flowers.py:argument" -> "flowers"."""
    return os.path.splitext(os.path.basename(path.partition(":")[0]))[0]
