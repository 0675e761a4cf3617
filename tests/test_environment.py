"""The scaffolding: pins and imports agree, the scripts work, the sources keep the house's rules.

The scripts run on copies of themselves with requirement files that ask for nothing, so nothing is downloaded.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from tiny import config_flags, write_pictures

from metrics import shift_tolerant

SCRIPTS = ["create_environment.sh", *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.sh")))]
README_COMMANDS = ["bash scripts/demo.sh", "bash scripts/test.sh"]
REQUIREMENTS = "requirements.txt", "requirements-learned.txt", "requirements-test.txt"  # each needs those before it

# ------------------------------------------------------------------------------------------------------- sources

COMMANDS = "main", "recon", "detect", "calibrate", "predict", "compare"
LAYERS = [  # from the top; a module imports those below its own layer, and those of its own folder
    COMMANDS,
    ("command_line",),
    ("lmd",),
    ("storage",),
    ("losses",),
    ("sampling",),
    ("datasets",),
    ("models",),
    ("metrics",),
    ("configs", "sde_lib", "ode", "masks"),
    ("basics",),
]
LAYER = {name: index for index, layer in enumerate(LAYERS) for name in layer}
TOOLS = "scripts", "benchmarks", "tests"  # stand above all layers
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for top in (*LAYER, *TOOLS) for path in (ROOT / top).rglob("*.py"))],
)
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
PROGRAM = {path: tree for path, tree in TREES.items() if path.relative_to(ROOT).parts[0] != "tests"}


def imports(tree):
    """(dotted module, line) of every import, lazy ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def module_of(path):
    """The top-level name a source file belongs to: 'models' of models/ddpm.py."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def found(rows):
    """For a message: 'file:line what' per row."""
    return [f"{path.relative_to(ROOT)}:{line} {what}" for path, line, what in rows]


def test_every_module_has_its_layer():
    """A new module must be given its place in the layout."""
    assert {path.stem for path in ROOT.glob("*.py")} <= LAYER.keys()
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= {*LAYER, *TOOLS}
    assert {module_of(path) for path in SOURCES} >= LAYER.keys(), "the layout names a module that is not there"


def test_imports_go_downward_only():
    wrong = [
        (path, line, f"imports {name}")
        for path, tree in TREES.items()
        if (own := module_of(path)) in LAYER
        for name, line in imports(tree)
        if (top := name.split(".")[0]) in {*LAYER, *TOOLS} - {own} and LAYER.get(top, -1) <= LAYER[own]
    ]
    assert not found(wrong)


def test_imports_have_no_circle():
    """Between files, lazy imports included: each can be read without those that use it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PROGRAM}
    files |= {name.removesuffix(".__init__"): path for name, path in files.items()}

    def needed(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{name.name}" for name in node.names]
                yield from (name if name in files else node.module for name in inner)

    needs = {path: {files[name] for name in needed(tree) if name in files} for path, tree in PROGRAM.items()}
    while leaves := [path for path, wanted in needs.items() if not wanted & needs.keys()]:
        for path in leaves:
            del needs[path]
    assert not needs, [str(path.relative_to(ROOT)) for path in needs]


def names_with_function(node, function=None):
    """(node, name of the outermost function around it) of every FLAGS."""
    for child in ast.iter_child_nodes(node):
        inside = function or getattr(child, "name", None)
        name = getattr(child, "id", None) or getattr(child, "attr", None)
        if name == "FLAGS" and isinstance(child, (ast.Name, ast.Attribute)):
            yield child, function
        yield from names_with_function(child, inside)


def test_flags_stay_in_main():
    """Library functions never see the command line; command_line.run alone parses it."""
    allowed = {*((name, "main") for name in COMMANDS), ("command_line", "run"), ("command_line", "_define_config_file")}
    wrong = []
    for path, tree in PROGRAM.items():
        body = [node for node in tree.body if ast.unparse(node) != "FLAGS = flags.FLAGS"]
        uses = names_with_function(ast.Module(body, []))
        wrong += [(path, node.lineno, "FLAGS") for node, inside in uses if (module_of(path), inside) not in allowed]
    assert not found(wrong)


def test_no_unsafe_or_foreign_code():
    """No TensorFlow or JAX, and nothing unpickles; tests alone may write pickles, to see them refused."""
    wrong = [
        (path, line, name)
        for path, tree in PROGRAM.items()
        for name, line in imports(tree)
        if name.split(".")[0] in {"tensorflow", "jax", "flax"} or re.fullmatch(r"pickle\.(loads?|Unpickler)", name)
    ]
    unsafe = r"weights_only=False|allow_pickle=True|pickle\.(loads?|Unpickler)"
    for path, tree in PROGRAM.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.keyword, ast.Attribute))]
        wrong += [(path, node.lineno, text) for node in nodes if re.fullmatch(unsafe, text := ast.unparse(node))]
    assert not found(wrong)


def test_functions_are_short():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = [
        (path, node.lineno, f"{node.name}: {length} lines")
        for path, tree in PROGRAM.items()
        for node in ast.walk(tree)
        if isinstance(node, functions) and (length := node.end_lineno - node.lineno + 1) > 50
    ]
    assert not found(lengths)


# ---------------------------------------------------------------------------------------------------------- pins

DISTRIBUTION = {
    "PIL": "pillow", "absl": "absl-py", "skimage": "scikit-image", "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity", "pillow_heif": "pillow-heif",
}  # fmt: skip
OPTIONAL = {"torch-fidelity", "pillow-heif"}  # asked for where it is used
BEHIND = {"torch.utils.tensorboard": "tensorboard"}  # modules that need a package besides their own
RUN_BY_NAME = {"diffusers", "pytest-timeout", "pytest-xdist", "pytorch-ood", "ruff"}  # no statement imports them
PIN = re.compile(r"([\w-]+)==([\w.]+)(?:; python_version (>=|<) \"3\.11\")?(?:\s+# \S.*)?")


def pins(file):
    """{distribution: its markers} of a requirement file."""
    table = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith(("#", "-r ")):
            match = PIN.fullmatch(line)
            assert match, f"{file}: '{line}' is not pinned as NAME==VERSION"
            table.setdefault(match[1], []).append(match[3])
    return table


def imported(paths):
    """The third-party distributions that sources import."""
    names = {name for path in paths for name, _ in imports(TREES[path])}
    local = {path.stem for path in SOURCES} | {*LAYER, *TOOLS}
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - local
    behind = {package for name, package in BEHIND.items() if name in names}
    return {DISTRIBUTION.get(top, top) for top in tops} | behind


def test_pins_are_exact_for_every_python():
    """Each package has one pin, or one for Python < 3.11 and one for the others; each with a reason."""
    for file in REQUIREMENTS:
        for name, markers in pins(file).items():
            assert sorted(markers, key=str) in ([None], ["<", ">="]), f"{file}: {name} has markers {markers}"
            assert re.search(rf"^{name}==.*# \w", (ROOT / file).read_text(), re.M), f"{file}: {name} has no reason"


def test_learned_weights_are_of_one_version():
    """What create_environment.sh installs is what the metric's messages tell the user to install."""
    assert f"{shift_tolerant.PACKAGE}=={shift_tolerant.VERSION} " in (ROOT / "requirements-learned.txt").read_text()


def test_pins_are_what_is_imported():
    run, learned, test = (set(pins(file)) for file in REQUIREMENTS)
    assert imported(PROGRAM) - OPTIONAL == run
    assert imported(TREES) - run - OPTIONAL == test - RUN_BY_NAME - OPTIONAL
    assert not run & test
    assert learned == {shift_tolerant.PACKAGE}  # its weights are read, nothing is imported
    assert "-r requirements.txt" in (ROOT / "requirements-test.txt").read_text().splitlines()


# ------------------------------------------------------------------------------------------------------- scripts


def bash(*command, cwd=ROOT, stdin=subprocess.DEVNULL, **variables):
    """Runs bash without the caller's own settings of these scripts: exit code, standard output, standard error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CONDA_", "LMD_"))}
    environment = {**inherited, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(
        ["bash", *map(str, command)], cwd=cwd, env=environment, stdin=stdin, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def fails(result, *words):
    """Asserts that a run ended with exit code 2 and an error line of these words."""
    code, _, err = result
    last = err.splitlines()[-1]
    assert code == 2, err
    assert last.startswith("error: "), err
    assert all(word in last for word in words), last


def stand_in(folder):
    """An environment whose interpreter is this one, by another name."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


def declare_complete(folder, repository):
    """Does what create_environment.sh does last: keeps a copy of the requirement files that it installed."""
    (folder / "lmd").mkdir(parents=True)
    (folder / "lmd" / "installed").write_text("".join((repository / file).read_text() for file in REQUIREMENTS))
    return folder


def programs(folder, **scripts):
    """A folder for PATH with the few programs that create_environment.sh needs, no Python, and `scripts`."""
    folder.mkdir()
    for name in ("bash", "cat", "dirname", "flock", "ls", "mkdir", "rm", "sh"):
        (folder / name).symlink_to(shutil.which(name))
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def repository(tmp_path):
    """The scripts alone, with requirement files that ask for nothing."""
    root = tmp_path / "a repository"
    for name in (*SCRIPTS, ".ci/run", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for file in REQUIREMENTS:
        (root / file).write_text("# nothing\n")
    return root


@pytest.mark.parametrize("name", [*SCRIPTS, ".ci/run"])
def test_scripts_parse(name):
    code, _, err = bash("-n", name)
    assert code == 0, err


def test_readme_and_ci_agree():
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert set(README_COMMANDS) <= set(lines)
    steps = [line.split("<")[0].strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [step for step in steps if step.startswith("bash ")] == ["bash scripts/test.sh"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_environment_from_nothing_twice_and_mended(repository):
    """A real one, by the default folder: made, left alone when complete, completed after each kind of damage."""
    environment, script = repository / ".venv", repository / "create_environment.sh"
    python = environment / "bin" / "python"

    def create(*options):
        code, out, err = bash(script, *options, cwd=repository.parent)
        assert code == 0, err
        assert out.splitlines()[-1] == f"environment ready: {python}"
        assert not (environment / "lmd" / "unfinished").exists()
        return (environment / "lmd" / "installed").stat().st_mtime_ns

    alone = create()
    assert create() == alone, "a complete environment was worked on"
    assert (made := create("--test")) != alone, "what the tests need was not installed"
    assert create("--test") == create("--learned") == create() == made
    (repository / "requirements.txt").write_text("# nothing more\n")
    assert create() != made
    (repository / "requirements.txt").write_text("# nothing\n")
    assert create() == create()
    assert (environment / "lmd" / "installed").read_text() == "# nothing\n"

    # A killed run left half a package, after one that had finished.
    half = next(environment.glob("lib/python3*/site-packages")) / "half-1.0.dist-info"
    half.mkdir()
    (environment / "lmd" / "unfinished").mkdir()
    create()
    assert not half.exists()

    # The Python that it came from is gone.
    python.unlink()
    python.symlink_to(repository / "removed" / "python")
    create()
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def test_failed_installation_is_not_taken_for_done(repository, tmp_path):
    environment = stand_in(tmp_path / "environment")
    (repository / "requirements.txt").write_text("--no-index\nno-such-package==1.0\n")
    result = bash("create_environment.sh", cwd=repository, LMD_VENV=environment)
    fails(result, "pip could not install", "bash create_environment.sh")
    assert "no-such-package==1.0" in result[2], "pip's own message is shown"
    assert {path.name for path in environment.iterdir()} == {"bin"}


@pytest.mark.parametrize("scripts", [{}, {"python3": "exit 1"}], ids=["none", "too old"])
def test_no_usable_python(scripts, repository, tmp_path):
    path = programs(tmp_path / "programs", **scripts)
    result = bash("create_environment.sh", cwd=repository, PATH=path, LMD_VENV=tmp_path / "environment")
    fails(result, "no Python >= 3.10 found")
    assert not (tmp_path / "environment").exists()


def test_python_without_venv(repository, tmp_path):
    script = f'case "$*" in *venv*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
    path = programs(tmp_path / "programs", python3=script)
    result = bash("create_environment.sh", cwd=repository, PATH=path, LMD_VENV=tmp_path / "environment")
    fails(result, "python3 could not make")


def test_foreign_folder_is_left_alone(repository, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    fails(bash("create_environment.sh", cwd=repository, LMD_VENV=tmp_path / "mine"), "has no Python >= 3.10")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_unknown_option(repository):
    fails(bash("create_environment.sh", "--tests", cwd=repository), "'--tests'", "--learned and --test")
    fails(bash("create_environment.sh", "--test", "--learned", cwd=repository), "'--test --learned'")


def test_where_the_environment_is(repository, tmp_path):
    """LMD_VENV, else an active conda environment that is not base, else .venv; the same from any folder."""

    def folder(**variables):
        show = f'source "{repository}/scripts/environment.sh"; echo "$LMD_VENV"; echo "$PYTHON"; pwd'
        _, out, _ = bash("-euc", show, cwd=tmp_path, **variables)
        environment, python, here = out.splitlines()
        assert python == f"{environment}/bin/python"
        assert here == str(repository)
        return environment

    conda = {"CONDA_PREFIX": tmp_path / "conda"}
    assert folder() == str(repository / ".venv")
    assert folder(**conda, CONDA_DEFAULT_ENV="base") == str(repository / ".venv")
    assert folder(**conda, CONDA_DEFAULT_ENV="lmd") == str(tmp_path / "conda")
    assert folder(**conda, CONDA_DEFAULT_ENV="lmd", LMD_VENV="other") == str(tmp_path / "other")


def test_conda_environment(repository, tmp_path):
    """It is installed into, also after an interrupted run, and never made anew; one without Python is left alone."""
    conda = tmp_path / "conda"
    variables = {"CONDA_PREFIX": conda, "CONDA_DEFAULT_ENV": "lmd"}
    (conda / "conda-meta").mkdir(parents=True)
    fails(bash("create_environment.sh", cwd=repository, **variables), "conda install 'python>=3.10'")
    stand_in(conda)
    (conda / "lmd" / "unfinished").mkdir(parents=True)
    code, _, err = bash("create_environment.sh", cwd=repository, **variables)
    assert code == 0, err
    assert {path.name for path in conda.iterdir()} == {"bin", "conda-meta", "lmd"}
    assert {path.name for path in (conda / "lmd").iterdir()} == {"installed"}
    assert not (repository / ".venv").exists()


def test_test_script_and_ci(repository, tmp_path):
    """Passing, selected and no tests, and bad style; continuous integration has no standard input at all.

    It asks for a browser, and goes on where there is none to be had.
    """
    environment = declare_complete(stand_in(tmp_path / "environment"), repository)
    refuses = 'echo "$*" >&2; exit 1'
    path = programs(tmp_path / "programs", id="echo 0", **{"apt-get": refuses})

    def run(*command):
        code, out, err = bash(*command, cwd=tmp_path, LMD_VENV=environment, CI="true", PATH=path)
        return code, (out.splitlines() or [""])[-1], out + err

    test, ci = repository / "scripts" / "test.sh", repository / ".ci" / "run"
    (repository / "tests").mkdir()
    assert run(test)[0] == 5, "a run without tests must not pass"
    assert run(ci)[0] == 5
    (repository / "tests" / "test_two.py").write_text("def test_one():\n    pass\n\n\ndef test_two():\n    pass\n")
    code, last, output = run(test)
    assert (code, last.split(" in ")[0]) == (0, "2 passed"), output
    code, last, output = run("-c", f"exec 0<&-; '{ci}'")
    assert (code, last.split(" in ")[0]) == (0, "2 passed"), output
    assert "-qq update\nno browser could be installed" in output
    code, last, output = run(test, "tests/test_two.py", "-k", "one")
    assert (code, last.split(" in ")[0]) == (0, "1 passed"), output
    (repository / "tests" / "test_two.py").write_text("def test_one():  pass\n")
    code, _, output = run(test)
    assert code == 1
    assert "would be reformatted" in output


# ------------------------------------------------------------------------------------------------------ the demo


def test_demo_runs_and_reuses(tmp_path):
    """The README's first command at few network evaluations: all the parts fit, and no batch is made twice.

    Without the learned distance where its weights are not installed.
    """
    environment = declare_complete(stand_in(tmp_path / "environment"), ROOT)
    learned = importlib.util.find_spec("stlpips_pytorch") is not None
    variables = {"LMD_VENV": environment, "WORKDIR": tmp_path / "demo", "REPS": 1, "STEPS": 2}
    variables |= {"HELD_BACK": 50, "CARD_IMAGES": 0}
    variables |= {} if learned else {"METRICS": "MSE,SSIM"}
    outputs, batches = [], []
    for _ in range(2):
        code, out, err = bash(ROOT / "scripts" / "demo.sh", cwd=tmp_path, **variables)
        assert code == 0, err
        outputs.append(re.findall(r"^(?:MSE|SSIM|STLPIPS) ROC AUC: [01]\.\d{4}$", out, re.M))
        files = (tmp_path / "demo").rglob("batch_*.pth")
        batches.append({path: path.stat().st_mtime_ns for path in files})
    assert len(outputs[0]) == 2 + learned
    assert outputs[0] == outputs[1]
    assert batches[0]
    assert batches[0] == batches[1]
    assert re.search(r"^environment \d+ s, .*, scoring \d+ s, calibration \d+ s, decisions \d+ s$", out, re.M)
    assert re.search(r"^\d+ of 36 images are flagged at a false-alarm rate of 5 % ", out, re.M)
    folder = tmp_path / "demo" / "checkerboard_alt_blocks8_reps1"
    report = tmp_path / "demo" / "incoming" / "report.html"
    assert out.splitlines()[-2:] == [f"pictures: {folder}/*.png", f"report: {report}"]
    assert report.is_file()
    assert {path.name for path in folder.glob("*.png")} >= {"roc_MSE.png", "pictures_SSIM.png"}


def test_train_demo_trains_and_exports(tmp_path):
    """The training command on a tiny network and data of its own; its weights are of the size it was told."""
    environment = declare_complete(stand_in(tmp_path / "environment"), ROOT)
    data, workdir = write_pictures(tmp_path / "pictures.npz", 8), tmp_path / "run"
    flags = config_flags(data__dataset=str(data))[1:]  # the script names the config file itself
    variables = {"LMD_VENV": environment, "WORKDIR": workdir}
    code, out, err = bash(ROOT / "scripts" / "train_demo.sh", *flags, cwd=tmp_path, **variables)
    assert code == 0, err
    assert f"CHECKPOINT={workdir}/ema.safetensors" in out.splitlines()[-1]
    from safetensors.numpy import load_file

    weights = load_file(workdir / "ema.safetensors")
    assert weights
    assert all(np.isfinite(value).all() for value in weights.values())
