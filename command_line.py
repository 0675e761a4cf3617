"""Flags: paths, the config (a file, or what a checkpoint carries), and how a command is run.

Command lines alone import this.
"""

import itertools
import os
import re
import signal
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_flags import config_flags

from basics import distributed
from basics.console import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR, UserError, are, fail, guard, on_interrupt
from basics.files import expand_home
from configs.fields import MOST_WORKERS

flags.disclaim_key_flags()  # those defined through the functions below are the caller's, so its --help lists them


# ------------------------------------------------------------------------------------------------------------ flags


class _Path(flags.ArgumentParser):
    """A flag's path; a leading ~ is the home folder."""

    def parse(self, argument):
        return expand_home(argument)

    def flag_type(self):
        return "path"


class _ConfigFile(flags.ArgumentParser):
    """A flag's config file, read by `read_config`."""

    def parse(self, argument):
        return read_config(argument)

    def flag_type(self):
        return "config file"


def define_path(name, default, help_text, **options):
    """Defines the flag `--{name}` of a file or folder; options as of absl's `DEFINE`."""
    flags.DEFINE(_Path(), name, default, help_text, serializer=flags.ArgumentSerializer(), **options)


class _CompileChoice(flags.ArgumentParser):
    """The values of --compile; the flag by itself stands for on, --nocompile for off."""

    syntactic_help = "auto, on or off"

    def parse(self, argument):
        """One of 'auto', 'on' and 'off'."""
        value = {"true": "on", "false": "off"}.get(argument.lower(), argument.lower())
        if value not in ("auto", "on", "off"):
            raise ValueError(f"choose one of: {self.syntactic_help}")
        return value

    def flag_type(self):
        """What --help calls it."""
        return "auto, on or off"


def define_compile(name, default, text, **options):
    """Defines --compile, which takes a value and, as a switch would, none; options as of absl's `DEFINE_flag`."""
    flag = flags.Flag(_CompileChoice(), flags.ArgumentSerializer(), name, default, text, boolean=True)
    flags.DEFINE_flag(flag, **options)


def define_shared(*names):
    """Defines flags that several commands have, by name; see `_SHARED`."""
    for name in names:
        kind, default, text, options = _SHARED[name]
        kind(name, default, text, **options)


_SHARED = {  # flag: how it is defined, its default, its help, options
    "center_crop": (flags.DEFINE_bool, True, "Crop files to their centre square; else squeeze them.", {}),
    "seed": (flags.DEFINE_integer, 0, "Key of the noise.", {"lower_bound": 0}),
    "max_images": (
        flags.DEFINE_integer,
        None,
        "Take so many images of each source, evenly spread, for a quick look.",
        {"lower_bound": 1, "upper_bound": 10**9},
    ),
    "data_root": (define_path, "./data", "Where data sets lie, or are downloaded to.", {}),
    "workers": (
        flags.DEFINE_integer,
        None,
        "Threads that decode images; by default one a processor, up to 32.",
        {"lower_bound": 1, "upper_bound": MOST_WORKERS},
    ),
    "memory_gb": (
        flags.DEFINE_float,
        None,
        "Memory for the network's activations, which limits how many images it sees at once; by default 0.5 on a CPU "
        "and 80 % of what is free on a GPU, where few images show first what one needs. The results are the same.",
        {"lower_bound": 0.0},
    ),
    "precision": (
        flags.DEFINE_string,
        "auto",
        "fp32, tf32 (GPUs), bf16 (faster, about the same scores), or auto: bf16 on a GPU that has it, else fp32.",
        {},
    ),
    "compile": (
        define_compile,
        "auto",
        "auto, on or off: compile the network first, faster for long runs; auto does so for long runs on a GPU.",
        {},
    ),
    "device": (flags.DEFINE_string, "auto", "auto, cpu, cuda or cuda:i.", {}),
}


MODEL = "ckpt_path", "in_domain", *(name for name in _SHARED if name != "device")  # what `define_model` defines


def define_model():
    """Defines what the commands share that measure in-domain images with a model: `MODEL`, config and device."""
    define_config(
        "The config that the model was trained with, by default the checkpoint's own.",
        value_of("ckpt_path"),
        needed=False,
    )
    define_path(
        "ckpt_path",
        None,
        "The checkpoint (.pth), EMA weights (.safetensors), a folder of diffusers', or a work folder of main.py, of "
        "which the newest checkpoint is taken.",
        required=True,
    )
    define_path(
        "in_domain",
        None,
        "In-domain images that the model was not trained on: a folder, a .txt list, a .npz or .npy file, or the name "
        "of a data set (its test images).",
        required=True,
    )
    define_shared(*_SHARED)


def define_config(text, checkpoint, needed=True):
    """Defines the flag, which is required; any value can be overridden: --config.sampling.steps=100.

    Args:
        text: its help.
        checkpoint: the file or folder whose config is taken where the command line names none, or None.
        needed: whether it is what is missing where there is neither; else the checkpoint is.
    """
    named = value_of("config") is not None or any(a.lstrip("-").startswith("help") for a in sys.argv[1:])
    if named or not checkpoint:
        _define_config_file(text)
        if needed:
            flags.mark_flag_as_required("config")
    else:
        config = _carried(checkpoint)
        try:  # the fields named on the command line are looked up at once
            config_flags.DEFINE_config_dict("config", config, text)
        except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
            fail(_reason(error))


def _define_config_file(help_text):
    try:
        config_flags.DEFINE_config_file("config", None, help_text)
    except (flags.Error, ValueError) as error:  # it reads a --flagfile already
        fail(error)
    flags.FLAGS["config"].parser = _ConfigFile()  # ml_collections' own lets what a file raises through


def value_of(name):
    """The value of a flag in this process's command line before absl has parsed it; None without it."""
    value, words = None, sys.argv[1:]
    for word, following in itertools.zip_longest(words, words[1:]):
        flag, separator, text = word.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if separator else following
    return value


def _carried(checkpoint):
    config = guard(_read, expand_home(checkpoint))
    if config == EXIT_INTERRUPTED:
        sys.exit(config)
    return config


def _read(checkpoint):
    # takes a second, for which --help need not wait
    from configs.base import from_dict
    from storage.checkpoints import config_of

    return from_dict(config_of(checkpoint))


def read_config(path):
    """The config tree that a config file's `get_config()` returns, its fields fixed.

    Args:
        path: the file; in `file.py:text` the text is given to `get_config`, as ml_collections has it.

    Raises:
        UserError: there is no such file, it fails, or what it returns is no config tree; names the line.
    """
    path, argument, source = _config_source(expand_home(path))
    names = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
        if not callable(names.get("get_config")):
            raise UserError(f"the config {path} has no function get_config; {_EXAMPLES}")
        config = names["get_config"](*argument)
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"the config {path} ends the program{_line_in(path, error)}; take the exit out") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}{_line_in(path, error)}: {error}".split())
        raise UserError(f"the config {path} fails with {reason}; correct it ({_EXAMPLES})") from error
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise UserError(
            f"get_config of {path} returns {_kind(config)}, not an ml_collections.ConfigDict; {_EXAMPLES}, or wrap it: "
            "configs.base.from_dict(values)"
        )
    return config.lock()


_EXAMPLES = "the files in configs/ show how it is done"


def _kind(value):
    return "nothing" if value is None else f"a {type(value).__name__}"


def _config_source(path):
    """A config file's path, what to call its get_config with, and its bytes, for `path` or `path:text`."""
    try:
        path, argument = (path, []) if Path(path).exists() else (path.split(":", 1)[0], path.split(":", 1)[1:])
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(f"'{path}' is no file")
        return path, argument, Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"no config can be read ({error}); give --config a file such as those in configs/") from error


def _line_in(path, error):
    """' in line N' of the file where an error arose; '' where that is not known."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f" in line {error.lineno}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def _reason(error):
    """What to tell of an error that absl or ml_collections raised for a flag."""
    while error.args and isinstance(error.args[0], Exception):  # `str` would show its escapes doubled
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, (KeyError, AttributeError)) and error.args else str(error)
    if isinstance(error, (KeyError, AttributeError)):  # the message may be the field's name alone
        if deeper := re.search(r"Attempting to lookup: (\S+)", text):  # below a field that is no section
            return _NO_FIELD.format(deeper[1])
        name, *rest = text.splitlines() or [""]
        hint = f" ({rest[0][0].lower()}{rest[0][1:]})" if rest and rest[0] else ""
        return _NO_FIELD.format(name.strip("'") + hint)
    if missing := re.findall(r"Flag (--\w+) must have a value other than None", text):
        they_are = "it is" if len(missing) == 1 else "they are"
        return f"{', '.join(missing)} {are(len(missing))} needed; --help says what {they_are}"
    if field := re.match(r"Could not parse '(.*?)': \w+Error", text):
        return _NO_FIELD.format(field[1])
    for complaint, kind in _KINDS.items():
        if wrong := re.fullmatch(rf"flag (--[\w.]+)=(.*): {complaint}.*", text, re.DOTALL):
            return f"{wrong[1]} must be {kind}, not '{wrong[2]}'"
    return re.sub(r"(?s) as tuple\. If you intended.*", " as a tuple; write one as (1,2,2)", text)


_KINDS = {  # what Python and absl say of a value that they cannot read, as patterns, and what it must be
    r"Failed to parse .* as a ConfigDict": "set field by field, such as --config.sampling.steps=100",
    r"invalid literal for int\(\) with base": "a whole number",
    r"could not convert string to float:": "a number",
    r"\('Non-boolean argument to boolean flag'": "true or false",
}
_NO_FIELD = "the config has no such field: {}; configs/base.py lists them"


def _check_values(values):
    """Refuses what no flag can use: empty text, zero bytes, and numbers that are none or beyond 64 bits.

    Config fields have their own bounds; of them the text alone is checked.
    """
    for name in values:
        value = values[name].value
        if not values[name].present or isinstance(value, bool):
            continue
        if isinstance(value, str) and not value.strip():
            fail(f"flag --{name} is empty; give it a value or leave it out")
        if isinstance(value, str) and "\0" in value:
            fail(f"flag --{name} holds a zero byte, which no file's name can have; give it another value")
        if isinstance(value, (int, float)) and "." not in name and not -(2**63) <= value < 2**63:  # nor is NaN
            expected = "share between 0 and 1" if name in _SHARES else "number within 64 bits"
            fail(f"flag --{name}={value}: a {expected} is expected")


_SHARES = "false_alarm_rate", "false_discovery_rate", "fit_share", "mask_ratio"  # flags of which no value is larger


# ------------------------------------------------------------------------------------------------ start and the end


def run(main, argv=None, removed=None):
    """Parses absl flags, runs `main(argv)` and leaves the process with its exit code.

    Args:
        main: takes the positional arguments; may return an exit code.
        argv: the command line, `sys.argv` by default.
        removed: flag of earlier versions -> the flag to write instead.
    """

    def parse(args):
        try:
            rest = flags.FLAGS(args)
        except SystemExit:  # --help has been printed; absl would call that a failure
            sys.exit(0)
        except (UserError, BrokenPipeError):
            raise
        except flags.UnrecognizedFlagError as error:
            now = (removed or {}).get(error.flagname)
            fail(f"--{error.flagname} is now {now}; write {now}=..." if now else error)
        except Exception as error:  # absl and ml_collections raise many kinds for a flag they cannot use
            fail(_reason(error))
        if len(rest) > 1:
            fail(f"unexpected argument '{rest[1]}'; flags are written --name=value (--help lists them)")
        _check_values(flags.FLAGS)
        return rest

    def command(args):
        try:
            app.run(lambda rest: sys.exit(main(rest)), argv=args, flags_parser=parse)
        except distributed.FailedElsewhere:  # at once: threads of the process group can abort an orderly end
            os._exit(EXIT_USER_ERROR)
        except SystemExit as end:
            return end.code

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        code = guard(command, argv)
    finally:
        if signal.getsignal(signal.SIGINT) is on_interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on there is nothing to end in order
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        os._exit(code)  # at once: what is written is whole, and whoever interrupts again is not to wait
    sys.exit(code)
