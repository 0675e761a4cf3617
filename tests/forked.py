"""Runs many command lines in one process's children, each of which finds everything imported: milliseconds a row.

    python tests/forked.py rows.json

`rows.json` is a list of [command, arguments, folder to run in, the console's encoding]; prints a list of [exit code,
standard output, standard error].
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

from helpers import ROOT

LATER = [
    "command_line", "torch", "lmd.training", "lmd.evaluation", "lmd.reconstruction", "lmd.detection",
    "models.inference", "lmd.calibrating", "lmd.predicting",
]  # fmt: skip


def run(command, arguments, folder, encoding):
    """Exit code, standard output and standard error of a command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout.reconfigure(encoding=encoding, errors="strict")
            sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
            os._exit(_leave(command, arguments, folder))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return [code, out.read().decode(encoding), err.read().decode(encoding)]


def _leave(command, arguments, folder):
    os.chdir(folder)
    sys.argv = [f"{command}.py", *arguments]
    try:
        runpy.run_path(str(ROOT / f"{command}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
    return 1


if __name__ == "__main__":
    for name in LATER:
        importlib.import_module(name)
    print(json.dumps([run(*row) for row in json.loads(Path(sys.argv[1]).read_text())]))
