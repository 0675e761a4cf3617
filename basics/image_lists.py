"""Which files are a user's images: folders and lists.

What systems put among images and what this program wrote is left out.
"""

import collections
import functools
import os
import re
from pathlib import Path

from basics import files
from basics.console import UserError, are, counted, say
from basics.images import first_line


@functools.cache
def say_once(line):
    """Tells what holds for a source, however often it is loaded: as test and training set, or at another size."""
    say(line)


def folder_files(folder):
    """Labels (paths below the folder) and full paths of its images, sorted, and the labels of files that are none.

    Links to folders are followed once.

    All files are taken for images but those whose ending says otherwise (they are counted in a line), system files,
    and what this program wrote (it is named in a line).

    Raises:
        UserError: it cannot be listed, holds no images, or was itself written by this program.
    """
    paths, written, left_out, endings = [], [], [], collections.Counter()
    runs, users = set(), set()  # folders in which runs wrote, and those that hold, at any depth, what they did not
    for parent, below, names in _walk(folder):
        if _is_written(parent, below, names, whole=parent != folder):
            written.append(parent)
            below.clear()
            continue
        ours = _files_of_runs(below, names)
        written += [parent / name for name in ours - {files.MARK}]
        if ours:
            runs.add(parent)
        for path in (Path(parent, name) for name in names if name not in ours):
            users.update((parent, *parent.parents) if parent not in users else ())
            ending = ".tfevents" if _EVENTS.fullmatch(path.name) else path.suffix.lower()
            if ending in NOT_IMAGES:
                endings[ending] += 1
                left_out.append(path.relative_to(folder).as_posix())
            else:
                paths.append(path)
    if folder in {*written, *(runs - users)} and written:
        raise UserError(f"{folder} is written by this program, so its images are no input; give a folder of your own")
    told = _tell_left_out(folder, _outermost(folder, written, runs - users), endings)
    if not paths:
        raise UserError(f"folder {folder} holds no images{told}; check the path")
    labels = sorted(path.relative_to(folder).as_posix() for path in paths)
    return labels, [Path(folder, label) for label in labels], sorted(left_out)


def _outermost(folder, written, whole):
    """Labels of what was written, once each: of what lies in one of the folders `whole`, that folder's alone."""
    whole = whole - {folder}
    places = {next((each for each in reversed(path.parents) if each in whole), path) for path in written}
    return sorted(path.relative_to(folder).as_posix() for path in places)


def _walk(folder):
    """As os.walk, from the top, in sorted order: each folder once, links or not, without what systems put there."""

    def refuse(error):
        raise UserError(f"folder {error.filename} cannot be listed ({error.strerror}); change its permissions")

    seen = set()
    for parent, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not _is_systems(name))
        yield Path(parent), below, sorted(name for name in names if name == files.MARK or not _is_systems(name))


def _is_systems(name):
    return name.startswith(".") or name in _SYSTEM_NAMES


def _is_written(folder, below, names, whole):
    """Whether this program wrote all of a folder: it is marked, or has what nobody else writes, as marks can be lost.

    A folder of the user's own to which a run has added something is not among these, see `_files_of_runs`.

    Args:
        folder: its path.
        below: the names of its folders.
        names: the names of its files.
        whole: whether what another program might write, too, will do, as below the folder that was given.
    """
    if files.MARK in names and not files.is_owned(folder):
        return True
    if whole and set(names) == {files.MARK, "manifest.json"} and {"masks", "pos", "neg"}.issuperset(below):
        return not any(_visible(folder / side) for side in ("pos", "neg"))  # of recon.py, before there is a batch
    if "manifest.json" in names or "results.json" in names:  # a results folder: other programs have a manifest.json too
        batches = any(side in below and next(Path(folder, side).glob("batch_*.pth"), None) for side in ("pos", "neg"))
        if batches or any(name.startswith("scores_") and name.endswith(".csv") for name in names):
            return True
    if any(kind.issubset(names) for kind in _WHOLE):
        return True
    if whole and not below and names and all(map(_PIECE.fullmatch, names)):
        return True
    return _is_of_training(folder, [*below, *names])


def _files_of_runs(below, names):
    """Which of a folder's files a run wrote that may share the folder with the user's own.

    Args:
        below: the names of its folders.
        names: the names of its files.

    Returns:
        set of names, among them the mark.
    """
    marked = {files.MARK}.intersection(names)
    found = set(marked)
    if marked or _META in below:
        found |= {"stdout.txt"}.intersection(names)
    if marked and "chunks" in below:  # of predict.py, stopped before it wrote the rest
        found |= {"outcome.json"}.intersection(names)
    if "compare.json" in names and (marked or "compare.csv" in names):
        found |= _COMPARISON.intersection(names)
    evaluation = {name for name in names if _EVALUATION.fullmatch(name)}
    if marked or len(evaluation) == len(names):
        found |= evaluation
    return found


def _is_of_training(folder, names):
    """Whether a folder with these names in it is one of a work folder, all of which training wrote."""
    if folder.parent.name == "samples" and _ITERATION.fullmatch(folder.name):
        return bool(names) and _SAMPLES.issuperset(names)
    pattern = _OF_TRAINING.get(folder.name)
    if pattern is None or not names or not all(map(pattern.fullmatch, names)):
        return False
    return folder.name != "samples" or all(_is_of_training(folder / name, _visible(folder / name)) for name in names)


def _visible(folder):
    """The names in a folder but those that systems put there; none where it cannot be listed."""
    try:
        return [name for name in (path.name for path in folder.iterdir()) if not _is_systems(name)]
    except OSError:
        return []


def _tell_left_out(folder, written, endings):
    """Says what of a folder is not taken for images; returns it as a half sentence."""
    left_out = ""
    if written:
        named = ", ".join(written[:10]) + (f" and {len(written) - 10} more" if len(written) > 10 else "")
        say_once(f"'{folder}': left out, as this program wrote it: {named}")
        left_out += f" (this program wrote {named})"
    if endings:
        named = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
        count, whose = endings.total(), "its ending" if endings.total() == 1 else "their endings"
        say_once(f"'{folder}': {counted(count, 'file')} {are(count)} left out by {whose}: {named}")
        left_out += f" ({named})"
    return left_out


_SYSTEM_NAMES = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
_META = "checkpoints-meta"
_ITERATION = re.compile(r"iter_\d+")
_SAMPLES = {"sample.png", "sample.np"}  # in samples/iter_{step}/
_EVENTS = re.compile(r"events\.out\.tfevents\..+")

_OF_TRAINING = {  # the folders in a work folder: what training writes there
    "samples": _ITERATION,
    "checkpoints": re.compile(r"checkpoint_\d+(\.pth)?"),
    _META: re.compile(r"checkpoint\.pth"),
    "tensorboard": _EVENTS,
}

_EVALUATION = re.compile(r"(ckpt_\d+_loss|report_\d+|(train|test)_ckpt_\d+_bpd_\d+)\.npz")
_COMPARISON = {"compare.csv", "compare.json", "compare.npz", "compare.md", "compare.png"}
_PIECE = re.compile(r"(chunk|samples|statistics)_\d+\.npz")  # of what is measured, of an evaluation's samples

_WHOLE = (  # what lies together in each folder that calibrate.py or predict.py wrote; they write into no other
    {"detector.json", "calibration.npz"},
    {"outcome.json", "outcome.npz"},
)


# Endings of files that are no pictures, or of which Pillow would read something else (a raw photo's thumbnail).
NOT_IMAGES = frozenset(
    " ".join(
        [
            ".txt .md .rst .rtf .tex .bib .pdf .doc .docx .odt .xls .xlsx .ppt .pptx .html .htm .css .url .lnk",
            ".csv .tsv .lst .json .jsonl .xml .xmp .aae .yaml .yml .toml .ini .cfg .conf .log .md5 .sha256",
            ".py .pyc .ipynb .js .sh .c .cpp .h .m .r .o .so .dll .exe .lock .tmp .part .bak",
            ".np .npy .npz .pt .pth .ckpt .pkl .pickle .h5 .hdf5 .mat .parquet .arrow .feather .safetensors .onnx",
            ".tfrecord .tfevents .lmdb .mdb .db .sqlite .zip .tar .gz .tgz .bz2 .xz .7z .rar .zst",
            ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wav .mp3 .m4a .flac .ogg",
            ".ps .eps .ai .svg .wmf .emf .thm .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .pef .srw",
        ]
    ).split()
)


def listed_files(path):
    """Labels (the lines, or what of them is the path) and full paths of a txt list.

    A line that begins with # is a comment, unless there is a file of that name.

    Raises:
        UserError: it cannot be read, names no images, or nothing that it names is there: it may be no list.
    """
    lines = [line for line in lines_of(path) if not line.startswith("#") or _listed_file(line, path.parent)[1].exists()]
    if not lines:
        raise UserError(f"list {path} names no images; write one image path a line")
    found = [_listed_file(line, path.parent) for line in lines]
    if not any(os.path.exists(full) for _, full in found):  # noqa: PTH110 (never raises)
        raise UserError(
            f"{path} was read as a list of image paths, one a line, and none of these files is there; the first is "
            f"'{lines[0][:100]}'; correct the paths, or give images"
        )
    return [label for label, _ in found], [full for _, full in found]


def _listed_file(line, folder):
    """What of a line is the path, and that path in full: beside the list, else from here, as far as it exists."""
    for label in _readings(line):
        expanded = files.expand_home(label)
        for full in (os.path.join(folder, expanded), expanded):  # noqa: PTH118
            if os.path.exists(full):  # noqa: PTH110 (never raises)
                return label, Path(full)
    return line, Path(folder, line)


def _readings(line):
    """What a line of a list may mean: a path as it is, in quotes, of Windows, or with a label behind it."""
    yield line
    label = _LABELLED.fullmatch(line)
    for path in (line, label and label["path"]):
        if path:
            plain = path[1:-1] if len(path) > 2 and path[0] == path[-1] and path[0] in "'\"" else path
            yield from (plain, plain.replace("\\", "/"))


_LABELLED = re.compile(r"(?P<path>.*[^\s,;])(\s*[,;]\s*|\s+)[^\s,;/]+")


def lines_of(path):
    """The lines of a text file, stripped, without blank ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"list {path} cannot be read as text ({first_line(error)}); save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]
