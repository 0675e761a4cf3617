"""Scores of results folders against the published numbers; what is written; folders that cannot be scored."""

import concurrent.futures
import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_scores
from sklearn.metrics import roc_auc_score

import metrics
from basics import files
from basics.console import EXIT_USER_ERROR, UserError
from lmd import detection, distances, pictures, scoring, separation
from lmd.pictures import _groups, _read_pictures, shown_text
from metrics import perceptual
from storage import results_folder
from storage.results_folder import ResultsFolder
from storage.scores import read_results
from storage.tensors import read_tensors

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
PICTURES = ["roc", "histogram", "pictures"]


def fill(folder, side, sizes, reps=3, shape=(3, 16, 16), noise=0.1):
    """Writes batches of random images; reconstructions are off by `noise` times the repetition's number."""
    rng = torch.Generator().manual_seed(sum(sizes) + len(side) + ord(side[0]))
    for index, size in enumerate(sizes):
        orig = torch.rand(size, *shape, generator=rng)
        masks = [(torch.rand(shape, generator=rng) < 0.5).float() for _ in range(reps)]
        recon = [orig + noise * (1 + rep) * torch.randn(orig.shape, generator=rng) for rep in range(reps)]
        folder.write_batch(side, index, orig, [orig * mask for mask in masks], recon)


@pytest.fixture
def published(tmp_path):
    """A results folder of the published code: 11 in-domain and 9 out-of-domain images, 3 repetitions, no manifest."""
    return Path(shutil.copytree(GOLDEN / "results_small", tmp_path / "center_reps3"))


@pytest.fixture
def made(tmp_path):
    """A results folder as recon.py makes it, with a manifest that tells of files left out."""
    folder = ResultsFolder(tmp_path / "random_patch4_ratio0.5_reps3")
    entry = {"dataset": "CIFAR10", "images": 10, "batch_size": 4, "batches": 3, "skipped": []}
    left_out = {
        "dataset": "some/photos",
        "images": 6,
        "batch_size": 3,
        "batches": 2,
        "skipped": [["a.png", "empty"], ["b.png", "no image"]],
        "labels": ["c.png", "d.png", "e.png", "f.png", "g.png", "h.png"],
    }
    settings = {"seed": 3, "reps_per_image": 3, "mask": {"mask_type": "random"}, "config": {"data": {"image_size": 16}}}
    folder.claim(settings, {"pos": entry, "neg": left_out}, {"torch": "2"})
    fill(folder, "pos", [4, 4, 2])
    fill(folder, "neg", [3, 3], noise=0.15)
    return folder.path


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("trailing", ["", "/"])
def test_published_scores(published, trailing):
    """1e-5: the published SSIM sums float32 windows in another order."""
    golden = np.load(GOLDEN / "results_small_scores.npz")
    results = detection.detect(f"{published}{trailing}", ["MSE", "SSIM"], reps=3, bootstrap=0, plots=False)
    for result in results:
        name = result.metric.lower()
        assert result.roc_auc == pytest.approx(float(golden[f"{name}_auc"]), abs=1e-12)
        for side, table in result.tables.items():
            ours = 1 - table["distances"] if name == "ssim" else table["distances"]
            np.testing.assert_allclose(ours, golden[f"{name}_{side}"], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(table["score"], np.median(table["distances"], axis=0))


def test_even_number_of_repetitions_takes_the_mean_of_the_middle_two(published):
    (result,) = detection.detect(published, ["MSE"], reps=2, plots=False)
    for table in result.tables.values():
        assert len(table["distances"]) == 2
        np.testing.assert_allclose(table["score"], table["distances"].mean(axis=0), rtol=1e-6)


def test_fewer_repetitions_are_the_first(published):
    one, three = (detection.detect(published, ["MSE"], reps=reps, plots=False)[0] for reps in (1, 3))
    for side in ("pos", "neg"):
        np.testing.assert_array_equal(one.tables[side]["distances"], three.tables[side]["distances"][:1])


def test_streaming_equals_all_at_once(made):
    """1e-6: a batch's chunks are averaged in the same order, up to vector lanes."""
    result = detection.detect(made, ["SSIM"], reps=3, plots=False)[0]
    metric, scores = metrics.create("SSIM", CPU), {}
    for side, count in (("pos", 3), ("neg", 2)):
        batches = [read_tensors(made / side / f"batch_{i}.pth", "batch") for i in range(count)]
        orig = torch.cat([batch["orig"] for batch in batches])
        recons = [torch.cat([batch["recon"][rep] for batch in batches]) for rep in range(3)]
        distances = np.stack([metric(orig, recon).numpy() for recon in recons])
        np.testing.assert_allclose(result.tables[side]["distances"], distances, rtol=1e-6, atol=1e-7)
        scores[side] = np.median(distances, axis=0)
    labels = np.repeat([1, 0], [10, 6])
    assert result.roc_auc == pytest.approx(roc_auc_score(labels, -np.concatenate([scores["pos"], scores["neg"]])))


def test_images_are_compared_in_chunks(monkeypatch):
    """Chunks of one image give what one chunk of all gives."""
    orig = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    recons = [orig.roll(shift, 3) for shift in (1, 2)]
    tools = [metrics.create(name, CPU) for name in ("MSE", "SSIM")]
    whole = distances.distances_of(tools, orig, recons, CPU)
    monkeypatch.setattr(metrics.Metric, "pixels_at_once", 1)
    assert whole.shape == (2, 2, 5)
    np.testing.assert_allclose(distances.distances_of(tools, orig, recons, CPU), whole, rtol=1e-6)


def test_memory_holds_one_batch_at_a_time(made, monkeypatch):
    """Every batch read is gone before the next one is; each file is read once."""
    read, alive, paths = ResultsFolder.read_batch, weakref.WeakSet(), []

    def watched(folder, side, index, reps):
        assert not alive
        orig, recons = read(folder, side, index, reps)
        alive.update([orig, *recons])
        paths.append((side, index))
        return orig, recons

    monkeypatch.setattr(ResultsFolder, "read_batch", watched)
    detection.detect(made, ["MSE", "SSIM"], reps=3, plots=False)
    assert paths == [("pos", 0), ("pos", 1), ("pos", 2), ("neg", 0), ("neg", 1)]


def test_pictures_read_each_file_once_more_at_most(made, monkeypatch):
    read, paths = read_tensors, []

    def watched(path, what):
        paths.append(path)
        return read(path, what)

    for module in (results_folder, pictures):
        monkeypatch.setattr(module, "read_tensors", watched)
    detection.detect(made, ["MSE", "SSIM"], reps=3)
    assert max(paths.count(path) for path in paths) == 2


# ----------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_interval_is_as_wide_as_theory_says():
    """Against the normal interval of DeLong (1988); 10%: the Monte Carlo error of two quantiles of 4000 resamples."""
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(0, 1, 400), rng.normal(1, 1, 300)
    low, high = scoring.bootstrap_interval(pos, neg, 4000)
    wins = (pos[:, None] < neg[None]).astype(float)
    deviation = (wins.mean(axis=1).var(ddof=1) / 400 + wins.mean(axis=0).var(ddof=1) / 300) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert (low + high) / 2 == pytest.approx(wins.mean(), abs=0.3 * deviation)


def test_bootstrap_interval_at_the_ends_and_with_ties():
    near, far = np.zeros(20), np.ones(30)
    assert scoring.bootstrap_interval(near, far, 50) == (1, 1)
    assert scoring.bootstrap_interval(far, near, 50) == (0, 0)
    assert scoring.bootstrap_interval(near, near[:7], 50) == (0.5, 0.5)


def test_bootstrap_interval_is_reproducible(published):
    first, second = (detection.detect(published, ["MSE"], bootstrap=20, plots=False)[0].interval for _ in range(2))
    assert first == second
    assert first[0] < first[1]
    assert detection.detect(published, ["MSE"], bootstrap=21, plots=False)[0].interval != first


# ------------------------------------------------------------------------------------------------- what is written


def test_scores_csv(made):
    result = detection.detect(made, ["MSE"], reps=3, plots=False)[0]
    with (made / "scores_MSE.csv").open() as file:
        header, *rows = csv.reader(file)
    distances = [f"distance_rep{rep}" for rep in range(3)]
    assert header == ["side", "position", "batch", "score", *distances, "file"]
    assert [row[:3] for row in rows[:5]] == [["pos", str(i), str(i // 4)] for i in range(5)]
    assert [row[:3] for row in rows[10:]] == [["neg", p, b] for p, b in zip("012345", "000111", strict=True)]
    back = read_scores(made / "scores_MSE.csv")
    for side, table in result.tables.items():
        for name in ("position", "batch", "score", "distances"):
            values = table[name]
            np.testing.assert_array_equal(back[side][name].astype(values.dtype), values)  # float32 to the last bit


def test_results_json(made):
    """AUPR and FPR95 are those of the scores in the table; out of domain is the positive class of FPR95."""
    result = detection.detect(made, ["MSE"], reps=3, plots=False)[0]
    sides = [table["score"] for table in read_scores(made / "scores_MSE.csv").values()]
    others = {name: getattr(separation, name)(*sides) for name in ("aupr_out", "aupr_in", "fpr95")}
    assert json.loads((made / "results.json").read_text()) == {
        "repetitions": 3,
        "images": {"pos": 10, "neg": 6},
        "failures": {"pos": 0, "neg": 2},
        "settings": {"seed": 3, "reps_per_image": 3, "mask": {"mask_type": "random"}},
        "sides": {
            "pos": {"dataset": "CIFAR10", "images": 10, "batch_size": 4, "batches": 3},
            "neg": {"dataset": "some/photos", "images": 6, "batch_size": 3, "batches": 2},
        },
        "metrics": {
            "MSE": {"roc_auc": result.roc_auc, "interval_95": list(result.interval), "bootstrap": 1000, **others}
        },
    }


def test_results_of_an_earlier_version_are_read(made):
    """Which have no AUPR and FPR95."""
    entry = {"roc_auc": 0.5, "interval_95": None, "bootstrap": 0}
    (made / "results.json").write_text(json.dumps({"metrics": {"SSIM": entry}, "repetitions": 3}))
    assert read_results(made)["metrics"]["SSIM"] == entry


def test_sides_are_called_by_their_data_sets(made, published):
    (result,) = detection.detect(made, ["MSE"], plots=False)
    assert result.names == {"pos": "in-domain CIFAR10", "neg": "out-of-domain photos"}
    (result,) = detection.detect(published, ["MSE"], plots=False)
    assert result.names == {"pos": "in-domain", "neg": "out-of-domain"}


EARLIER = {
    "as it was": ({}, None),
    "positions": ({"positions": [0, 2, 3, 4, 6, 7]}, None),
    "few positions": ({"positions": [0, 2]}, "manifest.json cannot be read .*tells of 6 images and of 2 positions"),
    "more images": (
        {"images": 9, "batch_size": 5, "labels": None}, "holds 6 images, but its manifest.json tells of 9; make all",
    ),
    "more positions": (
        {"images": None, "positions": list(range(9))}, "holds 6 images, but its manifest.json tells of 9; make all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EARLIER)
def test_folders_of_an_earlier_version_keep_their_positions_or_are_refused(made, name):
    """Which are told in their manifests; never are the images renumbered without a word."""
    changes, message = EARLIER[name]
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["format"]
    entry = {**manifest["sides"]["neg"], **changes}
    manifest["sides"]["neg"] = {name: value for name, value in entry.items() if value is not None}
    (made / "manifest.json").write_text(json.dumps(manifest))
    for path in made.rglob("batch_*.pth"):
        batch = torch.load(path, weights_only=True)
        torch.save({name: batch[name] for name in ("orig", "masked", "recon")}, path)
    if message is None:
        (result,) = detection.detect(made, ["MSE"], reps=3, plots=False)
        assert result.tables["neg"]["position"].tolist() == changes.get("positions", [0, 1, 2, 3, 4, 5])
        return
    with pytest.raises(UserError, match=message):
        detection.detect(made, ["MSE"], reps=3, plots=False)


def test_results_json_keeps_metrics_scored_earlier_on_the_same(made):
    detection.detect(made, ["MSE"], reps=3, plots=False)
    detection.detect(made, ["SSIM"], reps=3, bootstrap=0, plots=False)
    results = read_results(made)
    assert list(results["metrics"]) == ["MSE", "SSIM"]
    assert results["metrics"]["SSIM"]["interval_95"] is None
    detection.detect(made, ["SSIM"], reps=2, plots=False)
    assert list(read_results(made)["metrics"]) == ["SSIM"]
    assert read_results(made)["repetitions"] == 2


REPETITIONS = {  # folder's name, what its manifest says, --reps -> how many were made
    "all": ("center_reps3", None, 3, None),
    "fewer, by the name": ("center_reps3", None, 1, 3),
    "fewer, by the manifest": ("renamed", 3, 2, 3),
    "the manifest before the name": ("center_reps10", 3, 2, 3),
}


@pytest.mark.parametrize("name", REPETITIONS)
def test_repetitions_that_are_not_used_are_told(name, made, capsys):
    folder, told, reps, expected = REPETITIONS[name]
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["settings"].update({} if told is None else {"reps_per_image": told})
    (made / "manifest.json").write_text(json.dumps(manifest))
    detection.detect(made.rename(made.parent / folder), ["MSE"], reps=reps, plots=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    line = f"warning: using {reps} of {expected} repetitions; --reps {expected} uses all"
    assert lines == ([line] if expected else [])


class Stub(metrics.Metric):
    """MSE under another name and with options."""

    def __init__(self, device, **options):
        self.options = options

    def prepare(self, images):
        return images

    def compare(self, orig, recon):
        return (orig - recon).square().mean(dim=(1, 2, 3))


def with_options(monkeypatch, name, **options):
    """Has the metric `name` be the stub with these options."""
    create = metrics.create

    def stub(asked, device, **ignored):
        if asked != name:
            return create(asked, device, **ignored)
        tool = Stub(device, **options)
        tool.name = name
        return tool

    monkeypatch.setattr(metrics, "create", stub)


def warnings_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    usual = "repetitions; --reps", "has no manifest.json"
    return [line for line in lines if line.startswith("warning: ") and not any(words in line for words in usual)]


def test_variants_of_a_metric_do_not_replace_each_other_silently(made, monkeypatch, capsys):
    with_options(monkeypatch, "SIMCLR", resize_type="bicubic", weights="aa")
    detection.detect(made, ["SIMCLR", "MSE"], reps=3, plots=False)
    entry = read_results(made)["metrics"]["SIMCLR"]
    assert entry["options"] == {"resize_type": "bicubic", "weights": "aa"}
    assert "options" not in read_results(made)["metrics"]["MSE"]
    detection.detect(made, ["SIMCLR"], reps=3, plots=False)
    assert warnings_of(capsys) == []
    with_options(monkeypatch, "SIMCLR", resize_type="none", weights="aa")
    detection.detect(made, ["SIMCLR"], reps=3, plots=False)
    assert warnings_of(capsys) == [
        "warning: earlier SIMCLR scores were made with other options and are replaced "
        '(resize_type: "bicubic" there, "none" here)'
    ]
    assert read_results(made)["metrics"]["SIMCLR"]["options"]["resize_type"] == "none"
    assert "MSE" in read_results(made)["metrics"]


def test_simclr_keeps_its_weights_and_resizing(made, monkeypatch):
    """Of the metric itself: the weights' content, not their path, which says nothing once they are replaced."""
    from metrics import simclr

    path = made / "w.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(simclr, "read_network", lambda path: torch.nn.Identity())
    tool = metrics.create("SIMCLR", CPU, resize_type="nearest", path=path)
    assert tool.options == {"resize_type": "nearest", "weights": files.file_hash(path)}


def test_metrics_that_leave_the_summary_are_told(made, capsys):
    detection.detect(made, ["MSE", "SSIM"], reps=3, plots=False)
    assert warnings_of(capsys) == []
    detection.detect(made, ["SSIM"], reps=2, plots=False)
    told = "warning: results.json no longer tells of MSE, measured otherwise (repetitions: 3 there, 2 here)"
    assert warnings_of(capsys) == [told]


def test_two_at_once_lose_nothing(made):
    """Read, changed and written by one process at a time."""
    (result,) = detection.detect(made, ["MSE"], reps=3, bootstrap=0, plots=False)
    names = [f"M{number}" for number in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        folder = ResultsFolder(made)
        work = [
            pool.submit(detection.write, folder, [dataclasses.replace(result, metric=name)], 3, 0) for name in names
        ]
    assert [future.result() for future in work] == [None] * 16
    assert sorted(read_results(made)["metrics"]) == sorted(["MSE", *names])


@pytest.mark.parametrize("part", ["_roc", "_grid", "to_png"])
def test_a_picture_that_fails_is_a_warning(part, published, monkeypatch, capsys):
    """The scores are written by then."""

    def fail(*arguments):
        raise ValueError("ParseFatalException: \x1b[31m$")

    monkeypatch.setattr(detection if part == "to_png" else pictures, part, fail)
    (result,) = detection.detect(published, ["MSE"], reps=3)
    lost = {"_roc": ["roc"], "_grid": ["pictures"], "to_png": PICTURES}[part]
    assert warnings_of(capsys) == [
        f"warning: {name}_MSE.png is left out, the scores are there: ParseFatalException: \\x1b[31m$" for name in lost
    ]
    assert result.files == ["scores_MSE.csv", *(f"{name}_MSE.png" for name in PICTURES if name not in lost)]
    assert read_results(published)["metrics"]["MSE"]["roc_auc"] == result.roc_auc


def test_a_picture_that_cannot_be_written_is_a_warning(published, monkeypatch, capsys):
    (published / "roc_MSE.png").mkdir()
    (result,) = detection.detect(published, ["MSE"], reps=3)
    assert [line for line in warnings_of(capsys) if "roc_MSE.png is left out" in line]
    assert "roc_MSE.png" not in result.files


SHOWN = {  # name of a data set -> what pictures show
    "plain": ("CIFAR10", "CIFAR10"),
    "a formula": ("$x^2$", "$x^2$"),
    "half a formula": ("a$b", "a$b"),
    "no formula": ("$\\frac$", "$\\frac$"),
    "an escaped sign": ("a\\$b$", "a\\$b$"),
    "bytes and codes": ("caf\udce9\x1b[31m\n", "caf\\xe9\\x1b[31m\\n"),
    "long": ("n" * 200, "n" * 40 + "..." + "n" * 17),
}


@pytest.mark.parametrize("name", SHOWN)
def test_names_in_pictures_are_no_formulas(name):
    from matplotlib.text import Text

    given, shown = SHOWN[name]
    text = shown_text(given)
    assert Text(0, 0, text)._preprocess_math(text) == (shown, False)


def test_no_plots(published):
    (result,) = detection.detect(published, ["MSE"], plots=False)
    assert result.files == ["scores_MSE.csv"]
    assert sorted(path.name for path in published.iterdir()) == ["neg", "pos", "results.json", "scores_MSE.csv"]


@pytest.mark.parametrize(("count", "expected"), [(0, PICTURES[:2]), (2, PICTURES), (50, PICTURES)])
def test_grid_images(published, count, expected):
    from PIL import Image

    (result,) = detection.detect(published, ["SSIM"], reps=2, grid_images=count)
    names = [f"{name}_SSIM.png" for name in expected]
    assert result.files == ["scores_SSIM.csv", *names]
    for name in names:
        image = np.asarray(Image.open(published / name).convert("RGB"))
        assert min(image.shape[:2]) > 500
        assert image.std() > 10


def test_grid_shows_the_nearest_and_the_furthest(made):
    """Picks are sorted by score, come from the right rows, and show the repetition nearest to the median."""
    result = detection.detect(made, ["MSE"], reps=3, plots=False)[0]
    groups = _groups(result.tables, 4)
    pictures = _read_pictures(ResultsFolder(made), {pick for picks in groups.values() for pick in picks})
    for (side, group), picks in groups.items():
        scores = np.sort(result.tables[side]["score"])
        expected = scores[:4] if group == "least" else scores[::-1][:4]
        for (_, batch, row, rep), score in zip(picks, expected, strict=True):
            stored = torch.load(made / side / f"batch_{batch}.pth", weights_only=True)
            images = [stored["orig"][row], stored["masked"][rep][row], stored["recon"][rep][row]]
            assert (images[0] - images[2]).square().mean().item() == pytest.approx(score, rel=1e-5)
            shown = pictures[side, batch, row, rep]  # (3, H, W, 3) uint8
            for picture, image in zip(shown, images, strict=True):
                np.testing.assert_array_equal(picture, (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0))


def test_grey_images(tmp_path):
    folder = ResultsFolder(tmp_path)
    fill(folder, "pos", [3], shape=(1, 20, 16))
    fill(folder, "neg", [2], shape=(1, 20, 16))
    result = detection.detect(tmp_path, ["MSE", "SSIM"], reps=3)[1]
    assert result.files == ["scores_SSIM.csv", *(f"{name}_SSIM.png" for name in PICTURES)]


# ---------------------------------------------------------------------------------------------------- the command


def command(*arguments):
    run = [sys.executable, str(ROOT / "detect.py"), *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300)


def test_command_prints_the_published_line(published):
    done = command(
        "--result_path", f"{published}/", "--reps", 3, "--metric", "mse,SSIM", "--bootstrap=20", "--device=cpu"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "MSE ROC AUC: 0.7475"
    assert re.fullmatch(r"MSE 95 % interval: 0\.\d{4} to [01]\.\d{4} \(20 resamples\)", lines[1])
    assert lines[2] == "SSIM ROC AUC: 0.7475"
    assert lines[4:] == [
        f"written to {published}/:",
        "  scores_MSE.csv, roc_MSE.png, histogram_MSE.png, pictures_MSE.png",
        "  scores_SSIM.csv, roc_SSIM.png, histogram_SSIM.png, pictures_SSIM.png",
        "  results.json",
    ]


def test_command_flags(published):
    done = command("--result_path", published, "--metric=MSE", "--noplots", "--bootstrap=0", "--grid_images=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [f"written to {published}:", "  scores_MSE.csv", "  results.json"]
    assert read_results(published)["repetitions"] == 1
    assert not list(published.glob("*.png"))


def test_command_fails_in_one_line(published):
    before = snapshot(published)
    done = command("--result_path", published, "--reps=4", "--metric=MSE")
    assert done.returncode == EXIT_USER_ERROR
    error = done.stderr.splitlines()[-1]
    assert error == f"error: {published}/pos/batch_0.pth holds 3 repetitions, 4 were asked for; lower --reps"
    assert "Traceback" not in done.stderr
    assert snapshot(published) == before


def test_command_without_result_path():
    done = command("--metric=MSE")
    assert done.returncode == EXIT_USER_ERROR
    assert "--result_path" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy():
    heavy = ["torch", "matplotlib", "sklearn", "scipy", "lpips"]
    code = f"import sys, detect; detect.define_flags(); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "[]\n", done.stderr


# ----------------------------------------------------------------------------------------- what cannot be scored


def rewrite(change):
    """A change of the tensors of the second out-of-domain batch file."""

    def apply(folder):
        path = folder / "neg" / "batch_1.pth"
        batch = torch.load(path, weights_only=True)
        change(batch)
        torch.save(batch, path)

    return apply


def resize(batch):
    batch.update({name: [image[..., :8, :] for image in batch[name]] for name in ("masked", "recon")})
    batch["orig"] = batch["orig"][..., :8, :]


def truncate(folder):
    path = folder / "neg" / "batch_1.pth"
    path.write_bytes(path.read_bytes()[:-2000])


def empty(folder):
    blank = torch.zeros(0, 3, 16, 16)
    shutil.rmtree(folder / "neg")
    ResultsFolder(folder).write_batch("neg", 0, blank, [blank] * 3, [blank] * 3)


DAMAGES = {
    "gap": (lambda folder: (folder / "neg" / "batch_1.pth").unlink(), r"neg is incomplete: batch_1\.pth is missing"),
    "truncated": (truncate, r"neg/batch_1\.pth is damaged or truncated"),
    "no in-domain side": (lambda folder: shutil.rmtree(folder / "pos"), r"pos holds no batches \(in-domain images\)"),
    "no out-of-domain side": (lambda folder: shutil.rmtree(folder / "neg"), r"in-domain side only.*--out_of_domain"),
    "no side": (lambda folder: [shutil.rmtree(folder / side) for side in ("pos", "neg")], "holds no reconstructions"),
    "fewer repetitions": (rewrite(lambda batch: batch["recon"].pop()), r"neg/batch_1\.pth holds 2 repetitions, 3 were"),
    "another size": (
        rewrite(resize),
        r"neg/batch_1\.pth holds images of 8x16 with 3 channels, .* 16x16 with 3 channels",
    ),
    "nan": (rewrite(lambda batch: batch["recon"][2].fill_(np.nan)), r"neg/batch_1\.pth .*model's weights are broken"),
    "infinite": (rewrite(lambda batch: batch["recon"][0][0, 0, 0].fill_(-np.inf)), "model's weights are broken"),
    "huge": (rewrite(lambda batch: batch["recon"][0].fill_(1e30)), "model's weights are broken"),
    "integers": (
        rewrite(lambda batch: batch.update(orig=batch["orig"].byte())),
        r"holds images of torch\.uint8; numbers in \[0, 1\]",
    ),
    "no batch": (rewrite(lambda batch: batch.pop("orig")), r"is no batch of reconstructions"),
    "no images": (empty, "neg holds batches without images"),
    "no masked images": (rewrite(lambda batch: batch.pop("masked")), r"no masked images to show; --grid_images=0"),
    "masked too few": (rewrite(lambda batch: batch["masked"].clear()), r"no masked images to show; --grid_images=0"),
    "results.json": (lambda folder: (folder / "results.json").write_text("{"), r"results\.json cannot be read"),
    "manifest": (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_and_left_alone(published, damage):
    change, message = DAMAGES[damage]
    (published / "scores_MSE.csv").write_text("earlier\n")
    change(published)
    before = snapshot(published)
    with pytest.raises(UserError, match=message):
        detection.detect(published, ["MSE"], reps=3)
    assert snapshot(published) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reps": 0}, "--reps must be at least 1, not 0"),
        ({"reps": -2}, "--reps must be at least 1, not -2"),
        ({"reps": 4}, "holds 3 repetitions, 4 were asked for"),
        ({"bootstrap": -1}, "--bootstrap must be at least 0"),
        ({"bootstrap": 10**12}, "--bootstrap must be at most 10000000, not 10{12}: more make no difference"),
        ({"grid_images": -1}, "--grid_images must be at least 0"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"metric_names": []}, "--metric names no metric"),
        ({"metric_names": ["MSE", "PSNR"]}, "unknown metric 'PSNR'; choose one of: MSE, SSIM, LPIPS"),
        ({"metric_names": ["LPIPS"]}, "LPIPS needs .* at least 31x31"),
    ],
)
def test_wrong_options_are_refused(published, options, message, monkeypatch):
    monkeypatch.setattr(perceptual.LPIPS, "__init__", lambda self, device: None)  # its weights are not needed here
    before = snapshot(published)
    with pytest.raises(UserError, match=message):
        detection.detect(published, **{"metric_names": ["MSE"], **options})
    assert snapshot(published) == before


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no results folder at .*nowhere"):
        detection.detect(tmp_path / "nowhere", ["MSE"])


def test_folder_above_the_results_folder(published):
    with pytest.raises(UserError, match=f"did you mean {published}"):
        detection.detect(published.parent, ["MSE"])


def test_folder_that_may_not_be_written_to(published, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match="may not be written to"):
        detection.detect(published, ["MSE"])
