"""Which files are a user's images: folders and lists, without what systems and this program put there."""

import os

import pytest
import torch
from picture_files import cropped, load, put, read_all, save

from basics import files, image_sets
from basics.console import UserError
from storage import detector_folder

# ---------------------------------------------------------------------------------------------------- folders and lists


def test_a_folder_is_searched_below_and_sorted(folder, memory):
    images = load(folder)
    assert (images.name, len(images)) == ("pictures", 7)
    assert isinstance(images.store, image_sets.InMemory if memory else image_sets.OnDemand)
    expected = cropped(3, 1, 0, 2, 4, 5, 6)  # a/b/y, a/x, b, c, d, e, f
    assert torch.equal(read_all(images), expected)
    assert torch.equal(images.read(2, 6), expected[2:6])


def test_linked_folders_are_followed_once(folder, tmp_path):
    save(tmp_path / "elsewhere" / "z.png", 9)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert len(load(folder)) == 8


def test_links_to_folders_do_not_depend_on_the_file_system(folder, tmp_path, monkeypatch):
    """Two links to one folder: the first by name counts, in whatever order the system lists them."""
    save(tmp_path / "elsewhere" / "z.png")
    for name in ("link2", "link1"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    walk = os.walk

    def backwards(top, **options):
        for parent, below, names in walk(top, **options):
            below.sort(reverse=True)
            yield parent, below, names[::-1]

    expected = load(folder).labels
    assert "link1/z.png" in expected
    monkeypatch.setattr(os, "walk", backwards)
    assert load(folder).labels == expected


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(os, "walk", walk)  # the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match="cannot be listed"):
        load(folder)


def test_a_list_resolves_paths_beside_itself_then_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "a")
    lines = ["# a comment", "", "  b.png  ", "x.png", str(folder / "e.png"), "b.png"]
    (folder / "chosen.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    images = load(folder / "chosen.txt")
    assert images.name == "chosen"
    assert len(images) == 4
    assert torch.equal(read_all(images), cropped(0, 1, 5, 0))


LINES = {
    "plain": "a b/x.png",
    "label": "a b/x.png 3",
    "word": "a b/x.png\tcat",
    "comma": "a b/x.png, 3",
    "quotes": '"a b/x.png"',
    "single quotes": "'a b/x.png'",
    "quotes and label": '"a b/x.png" 3',
    "backslashes": "a b\\x.png",
    "all": '"a b\\x.png";3',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_lines_of_a_list(line, tmp_path):
    save(tmp_path / "a b" / "x.png", 3)
    (tmp_path / "list.txt").write_text(f"{line}\n")
    images = load(tmp_path / "list.txt")
    assert images.labels[0].strip() in ("a b/x.png", r"a b\x.png")
    assert torch.equal(read_all(images), cropped(3))


def test_lines_that_name_no_file_are_told_as_they_are(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.png 1")  # a name with a blank is that name, not a label
    save(tmp_path / "x.png", 1)
    (tmp_path / "list.txt").write_text('x.png 1\n"gone.png" 2\n')
    images = load(tmp_path / "list.txt")
    assert images.labels == ["x.png 1"]
    assert images.skipped == [('"gone.png" 2', "no such file")]


# ----------------------------------------------------------------------------------------- what is no input of a folder


def leave_mark(folder):
    """Leaves the mark of a run that wrote there."""
    with files.owned(folder):
        pass


WORK_FOLDER = (
    "stdout.txt", "samples/iter_5/sample.png", "checkpoints/checkpoint_1.pth", "checkpoints-meta/checkpoint.pth",
    "tensorboard/events.out.tfevents.17.host.1.0", "eval/report_1.npz", "cats_vs_dogs/center_reps1/manifest.json",
    "cats_vs_dogs/center_reps1/pos/batch_0.pth",
)  # fmt: skip
DETECTOR = detector_folder.DESCRIPTION, detector_folder.WEIGHTS, detector_folder.CALIBRATION, detector_folder.CARD
PREDICTIONS = (
    "predictions.csv", "skipped.csv", "summary.json", "report.html", "outcome.json", "outcome.npz",
    "chunks/chunk_0.npz", "maps/000003_a.png",
)  # fmt: skip
COMPARISON = (
    "compare.csv", "compare.json", "compare.md", "compare.npz", "compare.png", "measured/lmd_0123/chunk_0.npz",
)  # fmt: skip

WRITTEN = {  # what is left out, how which folder is marked, and what lies there
    "marked": ("run", (files.mark, "run"), ["run/plot.png"]),
    "a run's": ("run", (leave_mark, "run"), ["run/manifest.json", "run/masks/mask.png"]),
    "results": ("run", None, ["run/histogram.png", "run/pos/batch_0.pth", "run/manifest.json"]),
    "scores": ("a/run", None, ["a/run/histogram.png", "a/run/results.json", "a/run/scores_MSE.csv"]),
    "training": ("run/samples", None, ["run/samples/iter_5/sample.png", "run/checkpoints-meta/"]),
    "samples": ("samples", None, ["samples/iter_5/sample.png"]),
    "evaluation": ("eval", None, ["eval/report_3.npz", "eval/ckpt_3_loss.npz"]),
    "work folder": ("checkpoints", (leave_mark, "."), ["checkpoints/checkpoint_1"]),
    "work folder below": ("run", (leave_mark, "run"), [f"run/{name}" for name in WORK_FOLDER]),
    "evaluated samples": ("eval", (leave_mark, "eval"), [
        "eval/ckpt_1/samples_0.npz", "eval/ckpt_1/statistics_0.npz", "eval/reference/statistics_0.npz"]),
    "detector": ("mine", None, [f"mine/{name}" for name in DETECTOR]),
    "unfinished detector": ("mine.unfinished", (leave_mark, "mine.unfinished"), [
        "mine.unfinished/statistics/chunk_0.npz", "mine.unfinished/blind_spots/blur/chunk_0.npz"]),
    "predictions": ("run", (leave_mark, "run"), [f"run/{name}" for name in PREDICTIONS]),
    "predictions without marks": ("run", None, [f"run/{name}" for name in PREDICTIONS]),
    "predictions, stopped": ("run", (leave_mark, "run"), ["run/chunks/chunk_0.npz", "run/outcome.json"]),
    "comparison": ("run", (leave_mark, "run"), [f"run/{name}" for name in COMPARISON]),
    "comparison, stopped": ("run", (leave_mark, "run"), ["run/measured/lmd_0123/chunk_0.npz"]),
    "comparison among pictures": (
        "sub/compare.csv, sub/compare.json, sub/compare.md, sub/compare.npz, sub/compare.png, sub/measured/lmd_0123",
        (leave_mark, "sub"), [f"sub/{name}" for name in COMPARISON]),
}  # fmt: skip


def write(root, kind):
    """Writes one of the above; returns what is left out."""
    left_out, marked, names = WRITTEN[kind]
    if marked:
        mark, below = marked
        mark(root / below)
    put(root, *names)
    return left_out


@pytest.mark.parametrize("kind", WRITTEN)
def test_folders_that_this_program_wrote_are_left_out(kind, tmp_path, capsys):
    root = tmp_path / "photos"
    put(root, "a.png", "sub/b.png")
    left_out = write(root, kind)
    images = load(root)
    assert (images.labels, images.without_row) == (["a.png", "sub/b.png"], [])
    assert f"'{root}': left out, as this program wrote it: {left_out}\n" in capsys.readouterr().out


def test_users_folders_that_look_alike_are_read(tmp_path, capsys):
    put(tmp_path, "pos/a.png", "neg/b.png", "samples/c.png", "eval/d.png", "checkpoints/e.png", "iter_5/f.png")
    put(tmp_path, "manifest.json", "results.json", "detector.json", "outcome.json", "a/compare.json", "a/compare.png")
    put(tmp_path, "chunks/g.png", "maps/000003_h.png", "measured/i.png", "reference/j.png", "chunks/chunk_0.npz")
    assert len(load(tmp_path)) == 11
    for name in ("pos", "neg", "chunks", "maps"):  # as runs do that begin in them
        put(tmp_path / name, "manifest.json", "compare.png", "outcome.json")
        leave_mark(tmp_path / name)
    assert len(load(tmp_path)) == 15
    assert "wrote" not in capsys.readouterr().out


OWN_NAMES = ("cats/a.png", "samples/b.png", "samples/iter_7/c.png", "checkpoints/d.png", "checkpoints-meta/e.png",
             "tensorboard/f.png", "eval/g.png")  # fmt: skip


def train_in(root):
    """What training and an evaluation write in a folder."""
    leave_mark(root)
    leave_mark(root / "eval")
    files.mark(root / "samples")
    put(root, "samples/iter_5/sample.png", "samples/iter_5/sample.np", "checkpoints/checkpoint_1.pth", "stdout.txt")
    put(root, "checkpoints-meta/checkpoint.pth", "tensorboard/events.out.tfevents.17.host.1.0", "eval/report_1.npz")


@pytest.mark.parametrize("workdir", [".", "cats"])
@pytest.mark.parametrize("own", [OWN_NAMES, *((name, "cats/a.png") for name in OWN_NAMES), ("a.png",)])
def test_training_in_the_folder_of_the_images_leaves_them_the_same(own, workdir, tmp_path):
    """Also where they lie in folders of the names that training uses, and when all of its marks are lost."""
    for index, name in enumerate(own):
        save(tmp_path / name, index)
    before = load(tmp_path)
    assert before.labels == sorted(set(own))
    with files.owned(tmp_path / workdir):
        starting = load(tmp_path)
    train_in(tmp_path / workdir)
    during = load(tmp_path)
    for mark in tmp_path.rglob(files.MARK):
        mark.unlink()
    without = load(tmp_path)
    assert before.labels == starting.labels == during.labels == without.labels
    assert before.fingerprint == starting.fingerprint == during.fingerprint == without.fingerprint
    assert not during.skipped


@pytest.mark.parametrize("kind", ["marked", "results", "work folder below", "detector", "predictions", "comparison"])
def test_a_folder_of_results_is_no_input(kind, tmp_path):
    name = write(tmp_path, kind)
    with pytest.raises(
        UserError, match=f"{name} is written by this program, so its images are no input; give a folder of"
    ):
        load(tmp_path / name)
    with pytest.raises(UserError, match=rf"holds no images \(this program wrote {name}\); check the path"):
        load(tmp_path)


def test_what_systems_put_among_images_is_no_image(folder, capsys):
    put(folder, ".hidden.png", "__MACOSX/._b.png", "@eaDir/b.png/SYNOPHOTO.jpg", ".ipynb_checkpoints/b.png")
    put(folder, ".thumbnails/b.png", "a/.trash/b.png")
    assert len(load(folder)) == 7
    assert "eaDir" not in "".join(capsys.readouterr())


def test_other_files_are_counted_by_their_endings(folder, capsys):
    put(folder, "b.CSV", "clip.mp4", "more.txt", "figure.eps", "README", "damaged.xyz")
    os.mkfifo(folder / "pipe.png")
    images = load(folder)
    assert images.skipped == [
        ("README", "not an image, or damaged"),
        ("damaged.xyz", "not an image, or damaged"),
        ("pipe.png", "not a regular file"),
    ]
    assert images.left_out == ["b.CSV", "clip.mp4", "figure.eps", "more.txt", "notes.txt"]
    assert [name for name, _ in images.without_row] == [name for name, _ in images.skipped] + images.left_out
    line = f"'{folder}': 5 files are left out by their endings: 1 .csv, 1 .eps, 1 .mp4, 2 .txt\n"
    assert line in capsys.readouterr().out
    put(folder / "a", "b.CSV")
    load(folder / "a")
    assert f"'{folder / 'a'}': 1 file is left out by its ending: 1 .csv\n" in capsys.readouterr().out
    put(folder, "only/x.csv")
    with pytest.raises(UserError, match=r"holds no images \(1 \.csv\); check the path"):
        load(folder / "only")
