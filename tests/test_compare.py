"""Many methods in one table: the numbers against scikit-learn and SciPy, what is measured when, and bad input."""

import csv
import inspect
import json
import re
import shutil

import numpy as np
import pytest
import sklearn.metrics
import tiny
import torch
from PIL import Image
from scipy import stats
from test_commands import HELP

from basics import files, noise
from basics.console import UserError
from lmd import comparison, methods, separation, shifts
from lmd.candidates import Bench
from lmd.combination import combined
from lmd.comparison_report import aligned, every_set, notes
from lmd.methods.base import Method
from lmd.methods.selection import ablations, check_overrides, select
from lmd.ranking import Candidate, tabulate
from lmd.trained_model import TrainedModel, load_model
from storage.comparisons import COLUMNS


class Brightness(Method):
    """How far an image's mean is from that of in-domain images; costs nothing."""

    name = "brightness"
    parts = ("brightness",)
    measured = []  # numbers of images, a call each

    def __init__(self, power=1.0, fewest=1, broken=""):
        self.settings = {"power": power, "fewest": fewest, "broken": broken}
        self.fewest_images = fewest

    def evaluations(self, model):
        if self.settings["broken"] == "cost":
            raise UserError("it has no cost")
        return 0

    def statistics(self, model, images, keys):
        self.measured.append(len(images))
        values = images.double().mean(dim=(1, 2, 3))[:, None].numpy()
        if self.settings["broken"] == "statistics" and values.max() > 120:  # uniform noise alone is so bright
            values[0] = np.nan
        return values

    def fit_statistics(self, statistics):
        self.mean = statistics.mean()
        return self

    def score_statistics(self, statistics):
        scores = np.abs(statistics - self.mean) ** self.settings["power"]
        return np.where(scores > 5, np.nan, scores) if self.settings["broken"] == "scores" else scores


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "brightness", ("test_compare", "Brightness"))
    monkeypatch.setattr(methods.method_class("brightness"), "measured", [])
    return methods.method_class("brightness").measured


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint of random weights, images to fit and to score, uniform noise, and a single image."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_checkpoint(folder / "checkpoint.pth")
    tiny.write_pictures(folder / "fit.npz", 30, seed=1)
    tiny.write_pictures(folder / "many.npz", 60, seed=1)
    tiny.write_pictures(folder / "known.npz", 20, seed=2)
    np.savez(folder / "noise.npz", images=np.random.default_rng(2).integers(0, 256, (12, 8, 8), dtype=np.uint8))
    Image.fromarray(tiny.pictures(1, seed=5)[0]).save(folder / "one.png")
    return folder


def compared(data, output, chosen, foreign="noise.npz", **changes):
    """Runs a comparison on the CPU; its `Table`."""
    paths = ",".join(str(data / name) if "." in name else name for name in foreign.split(","))
    options = {"fit": str(data / "fit.npz"), "in_domain": str(data / "known.npz"), "config": tiny.config()}
    options |= {"ckpt_path": str(data / "checkpoint.pth"), "output": str(output), **changes}
    return comparison.compare(comparison.ComparisonJob(out_of_domain=paths, methods=chosen, **options), tiny.CPU)


def rows_of(output):
    with (output / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------- the table


def candidate(label, known, foreign, **changes):
    faults = {name: "broken" for name, values in foreign.items() if values is None}
    return Candidate(label, "m", {}, 10, 0.5, known, foreign, changes.get("faults", faults))


def drawn(seed, known=60, **counts):
    rng = np.random.default_rng(seed)
    return rng.normal(size=known).round(1), {name: rng.normal(1, size=n).round(1) for name, n in counts.items()}


def test_numbers_of_the_table():
    """Each row against scikit-learn, the ranks against SciPy, and Holm's correction over all tests of the table."""
    sides = {label: drawn(seed, a=40, b=50) for seed, label in enumerate(["x", "y", "z"])}
    table = tabulate([candidate(label, *each) for label, each in sides.items()], ["a", "b"])
    rows = {(row["method"], row["out_of_domain"]): row for row in table.rows}
    for (label, name), row in rows.items():
        known, foreign = sides[label][0], sides[label][1][name]
        truth, scores = np.repeat([0, 1], [len(known), len(foreign)]), np.concatenate([known, foreign])
        assert row["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores))
        assert row["roc_auc_low"] < row["roc_auc"] < row["roc_auc_high"]
        assert row["aupr_out"] == pytest.approx(sklearn.metrics.average_precision_score(truth, scores))
        assert row["aupr_in"] == pytest.approx(sklearn.metrics.average_precision_score(1 - truth, -scores))
        assert row["fpr95"] == separation.fpr95(known, foreign)
    aucs = np.array([[rows[label, name]["roc_auc"] for name in "ab"] for label in sides])
    ranks = stats.rankdata(-aucs, axis=0).mean(axis=1)
    for label, values, rank in zip(sides, aucs, ranks, strict=True):
        (summary,) = [row for row in table.summaries if row["method"] == label]
        assert (summary["mean"], summary["minimum"]) == (pytest.approx(values.mean()), values.min())
        assert summary["mean_rank"] == rank
    assert table.best == list(sides)[aucs.mean(axis=1).argmax()] == table.summaries[0]["method"]
    pairs = [(label, name) for label in sides for name in "ab" if label != table.best]
    best = lambda name: (sides[table.best][0], sides[table.best][1][name])
    raw = [separation.compare(best(name), (sides[label][0], sides[label][1][name])).p_value for label, name in pairs]
    assert [rows[pair]["p_holm"] for pair in pairs] == pytest.approx(separation.holm(raw))
    assert rows[table.best, "a"]["p_holm"] is rows[table.best, "b"]["p_holm"] is None


def test_roc_auc_counts_ties_half():
    assert separation.roc_auc([0, 1, 1, 2], [1, 3]) == (2 + 4) / 8
    assert separation.roc_auc([np.inf, 0], [-np.inf, np.inf]) == 1.5 / 4


def test_equal_methods_share_their_rank():
    known, foreign = drawn(0, a=20)
    table = tabulate([candidate("x", known, foreign), candidate("y", known, foreign)], ["a"])
    assert [row["mean_rank"] for row in table.summaries] == [1.5, 1.5]
    assert [row["p_holm"] for row in table.rows] == [None, 1.0]


def test_what_is_missing_is_marked_and_left_out_of_the_summaries():
    """A set that one method lacks costs it its summary; one that all lack is left out; one image has no interval."""
    known, foreign = drawn(0, a=20, b=20, one=1)
    whole = candidate("x", known, {**foreign, "none": None})
    other_known, other = drawn(1, a=20, one=1)
    table = tabulate([candidate("y", other_known, {**other, "b": None, "none": None}), whole], [*foreign, "none"])
    assert table.sets == ["a", "b", "one"]
    assert [(row["method"], row["mean"] is None) for row in table.summaries] == [("x", False), ("y", True)]
    rows = {(row["method"], row["out_of_domain"]): row for row in table.rows}
    assert rows["y", "b"]["roc_auc"] is rows["y", "b"]["p_holm"] is rows["y", "one"]["p_holm"] is None
    assert rows["x", "one"]["roc_auc"] is not None
    assert rows["x", "one"]["roc_auc_low"] is rows["x", "one"]["roc_auc_high"] is None
    assert notes(table) == [
        "(!) all methods on one: no interval and no test: there is one out-of-domain image",
        "(!) x on none: broken",
        "(!) y on b, none: broken",
    ]
    lines = aligned(every_set(table))
    assert [" ".join(line.split()) for line in lines if "(!)" in line] == [
        f"x one (!) {rows['x', 'one']['roc_auc']:.3f} - {rows['x', 'one']['aupr_out']:.3f} "
        f"{rows['x', 'one']['aupr_in']:.3f} {rows['x', 'one']['fpr95']:.3f} best",
        "x none (!) - - - - - best",
        "y b (!) - - - - - -",
        f"y one (!) {rows['y', 'one']['roc_auc']:.3f} - {rows['y', 'one']['aupr_out']:.3f} "
        f"{rows['y', 'one']['aupr_in']:.3f} {rows['y', 'one']['fpr95']:.3f} -",
        "y none (!) - - - - - -",
    ]


# ------------------------------------------------------------------------------------------- methods as text


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("all", ["lmd", "brightness"]),
        (" lmd , brightness:power=2", ["lmd", "brightness:power=2"]),
        ("lmd:mask_type=center,lmd:mask_type=checkerboard:num_blocks=4", None),
        ("lmd:metrics=[MSE,SSIM]:reps=2,lmd:metrics=ssim", ["lmd:metrics=[MSE,SSIM]:reps=2", "lmd:metrics=ssim"]),
        ("lmd,lmd:num_blocks=8,lmd", ["lmd"]),
        ("brightness:broken=", UserError),
    ],
)
def test_methods_as_text(text, labels):
    if labels is UserError:
        with pytest.raises(UserError, match="settings are written name=value"):
            select(text)
    else:
        known = list(methods.METHODS) if text == "all" else labels or text.split(",")
        assert list(select(text)) == known


def test_settings_arrive():
    found = select("lmd:metrics=ssim:reps=3:lift=both,brightness:power=2:fewest=4:broken=scores")
    assert [method.name for method in found.values()] == ["lmd", "brightness"]
    first, second = (method.settings for method in found.values())
    assert {name: first[name] for name in ("metrics", "reps", "lift")} == {
        "metrics": ["SSIM"],
        "reps": 3,
        "lift": "both",
    }
    assert second == {"power": 2, "fewest": 4, "broken": "scores"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--methods names no method; choose some of: all, ablations, "),
        ("lmx", "unknown method 'lmx'; choose one of: all, ablations, "),
        (
            "lmd:mask=center",
            "there is no setting 'mask'; the settings of lmd are: metrics, sampler, reps, mask_type, num_blocks",
        ),
        ("ablations:reps=1", "ablations stands for several methods and has no settings"),
        ("lmd:reps", "'lmd:reps': settings are written name=value, not 'reps'"),
        ("lmd:mask_type=centre", "unknown mask_type of lmd 'centre'; choose one of: center, checkerboard, checker"),
        ("lmd:metrics=FOO", "unknown metric 'FOO'"),
        ("lmd:metrics=[]", "metrics is empty; give one at least"),
        ("lmd:reps=0", "reps is 0; it must be a whole number of 1 at least"),
        ("lmd:reps=many", "reps is many; it must be a whole number"),
        ("lmd:num_blocks=2.5", "num_blocks is a whole number, not 2.5"),
        ("lmd:num_blocks=true", "num_blocks is a whole number, not true"),
        ("lmd:sampler=3", "sampler is a word, not 3"),
        (
            "lmd:mask_type=center:num_blocks=4",
            "lmd: num_blocks has no effect with the mask type 'center'; leave it out",
        ),
        ("lmd:lift=noise:num_blocks=4", "lmd: num_blocks has no effect with the lift 'noise'; leave it out"),
        ("lmd:lift=noise:mask_type=center", "lmd: mask_type has no effect with the lift 'noise', with which no pixel"),
        ("lmd:reps=1:reps=2", "'lmd:reps=1:reps=2': reps is given twice; leave one out"),
        ("lmd:metrics=[MSE,mse]", r"metrics names one twice, \[MSE,mse\]; leave one out"),
        ("lmd:sampler=published:lift=both", "the lift 'both' is not of the published sampler"),
        ("brightness:power=[1,2]", r"power is a number, not \[1,2\]"),
        ("brightness:power=1e999", "power is one number or word, not Infinity"),
        ("ddpm_ood:metrics=FOO", "unknown metric 'FOO'"),
        ("ddpm_ood:smallest=0.05", "smallest is 0.05; it must be above 0.05"),
        ("projection_regret:ratio_b=0.01", "ratio_b is 0.01; it must be above 0.05"),
        ("denoising_loss:fraction=1", "fraction is 1; it must be above 0 and below 1"),
        ("denoising_loss:levels=1", "levels is 1; it must be a whole number of 2 at least"),
        ("diffpath:steps=1", "steps is 1; it must be a whole number of 2 at least"),
        ("scoped:ratios=[1,0]", "ratios is 0; it must be above 0"),
        ("ufcod:references=5", "references are 5; they must be as many as the 10 neighbours"),
    ],
)
def test_methods_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        select(text)


def test_what_is_set_in_the_config_and_not_seen_is_refused():
    chosen = lambda text: select(text).values()
    check_overrides(chosen("lmd,complexity"), tiny.config(), {"model.nf", "data.dataset"})
    check_overrides(chosen("lmd:sampler=published,msma"), tiny.config(), {"sampling.steps"})
    for text, field, message in (
        ("lmd,complexity", "sampling.steps", r"^--config\.sampling\.steps has no effect: .*; write lmd:sampler=p"),
        ("lmd:sampler=published", "sampling.eta", r"^config\.sampling: eta: eta goes with the sampler ddim$"),
        ("all", "seed", r"^--config\.seed has no effect here; write --seed$"),
        ("all", "device", r"^--config\.device has no effect here; write --device$"),
    ):
        with pytest.raises(UserError, match=message):
            check_overrides(chosen(text), tiny.config(), {field})


def test_commands_refuse_what_their_methods_do_not_see(data, tmp_path):
    for command, flags in (
        ("calibrate.py", ["--method=complexity", f"--detector={tmp_path / 'out'}"]),
        (
            "compare.py",
            ["--methods=complexity", f"--output={tmp_path / 'out'}", f"--out_of_domain={data / 'noise.npz'}"],
        ),
    ):
        held = [f"--ckpt_path={data / 'checkpoint.pth'}", f"--in_domain={data / 'many.npz'}"]
        code, _, err = tiny.command(command, *held, *flags, "--config.sampling.steps=3")
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("error: --config.sampling.steps has no effect: ")
    assert list(tmp_path.iterdir()) == []


NUMBERS = [
    (name, key, field.default)
    for name in methods.METHODS
    for key, field in inspect.signature(methods.method_class(name)).parameters.items()
    if isinstance(np.ravel(field.default)[0], (np.number, int, float))
]


@pytest.mark.parametrize(("name", "key", "default"), NUMBERS, ids=[f"{name}-{key}" for name, key, _ in NUMBERS])
def test_numbers_of_every_method_have_a_range(name, key, default):
    """What is too small is refused with its name, and the default is not."""
    select(f"{name}:{key}={str(default).replace(' ', '').replace('(', '[').replace(')', ']')}")
    if (name, key) != ("cfs", "log_snr"):  # a logarithm
        for value in 0, -3:
            with pytest.raises(UserError, match=f"{key} is {value}; it must be"):
                select(f"{name}:{key}={value}")
    if not np.isscalar(default):
        with pytest.raises(UserError, match=f"{key} is empty"):
            select(f"{name}:{key}=[]")


def test_ablations_change_one_setting_at_a_time():
    found = select("ablations")
    assert len(found) == len(ablations())  # no two are the same
    assert {"lmd", "lmd:mask_type=center", "lmd:num_blocks=16", "lmd:reps=10", "lmd:metrics=MSE", "lmd:lift=noise"} <= {
        *found
    }
    usual = methods.create("lmd").settings
    for label, method in found.items():
        assert sum(method.settings[name] != usual[name] for name in usual) == (label != "lmd")


@pytest.mark.parametrize("lift", ["noise", "both"])
def test_lifts_of_lmd(lift, data):
    """With the lift 'noise' no pixel is known; either gives other distances than the masks alone."""
    model = TrainedModel(tiny.config(), load_model(tiny.config(), data / "checkpoint.pth", tiny.CPU)[0], tiny.CPU, 8)
    pixels = torch.from_numpy(tiny.pictures(3))[:, None]
    keys = noise.seed_keys(0, noise.content_keys(pixels))
    lifted, masked = methods.create("lmd", lift=lift), methods.create("lmd")
    assert lifted.evaluations(model) == masked.evaluations(model)
    assert not np.allclose(lifted.statistics(model, pixels, keys), masked.statistics(model, pixels, keys))
    known = lifted._prepared(model)[1].sum()
    assert (known == 0) == (lift == "noise")


def test_foreign_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    everything = [f"shifts:{kind}" for kind in shifts.SHIFTS]
    assert comparison.foreign_sources("SVHN, x/,shifts:blur") == ["SVHN", "x/", "shifts:blur"]
    assert comparison.foreign_sources("shifts:blur,shifts,LSUN:bedroom") == [
        "shifts:blur", *(kind for kind in everything if kind != "shifts:blur"), "LSUN:bedroom",
    ]  # fmt: skip
    for text, message in {
        "a,b": "the path a,b has a comma in it",
        " ,": "names no images",
        "shifts:blurr": "unknown made-up shift 'blurr'; choose one of: noise, blur",
    }.items():
        with pytest.raises(UserError, match=message):
            comparison.foreign_sources(text)


# ---------------------------------------------------------------------------------------------------- measuring


def test_scores_are_those_of_the_methods(data, tmp_path):
    """Each method's own way from images to scores, on real and made-up foreign images."""
    table = compared(data, tmp_path, "lmd,brightness", "noise.npz,shifts:halves", parts=True)
    model = TrainedModel(tiny.config(), load_model(tiny.config(), data / "checkpoint.pth", tiny.CPU)[0], tiny.CPU, 8)
    load = lambda name: torch.from_numpy(np.load(data / name)["images"])[:, None]
    key = lambda pixels: noise.seed_keys(0, noise.content_keys(pixels))
    known = load("known.npz")
    partners = known[shifts.partner_positions(noise.content_keys(known))]
    made_up = shifts.make("halves", known, noise.content_keys(known), partners)
    foreign = {str(data / "noise.npz"): load("noise.npz"), "shifts:halves": made_up}
    rows = {(row["method"], row["out_of_domain"]): row for row in table.rows}
    for name in ("lmd", "brightness"):
        method, fit = methods.create(name), load("fit.npz")
        reference = method.fit(model, fit, key(fit)).score(model, fit, key(fit))
        parts = {None: method.score(model, known, key(known))}
        parts |= {one: method.score(model, pixels, key(pixels)) for one, pixels in foreign.items()}
        columns = {name: lambda scores, known=reference: combined(known, scores)}
        columns |= {
            f"lmd[{part}]": lambda scores, k=k: scores[:, k]
            for k, part in enumerate(method.parts)
            if k or name == "lmd"
        }
        for label, column in columns.items():
            for one in foreign:
                auc = separation.roc_auc(column(parts[None]), column(parts[one]))
                assert rows[label, one]["roc_auc"] == pytest.approx(auc, abs=0.01), (label, one)
    assert {row["evaluations"] for row in table.rows if row["method"] == "lmd"} == {20}
    assert len(rows) == 2 * (1 + 2 + 1)


def test_only_what_is_new_is_measured(data, tmp_path, brightness):
    """One more set, one more method, another order: cached numbers stay, seconds too."""
    compared(data, tmp_path, "brightness")
    assert brightness == [30, 20, 12]
    before = rows_of(tmp_path)
    compared(data, tmp_path, "brightness,brightness:power=2", "shifts:flat,noise.npz")
    assert brightness[3:] == [20, 30, 20, 20, 12]  # the new set, then the new method
    after = rows_of(tmp_path)
    assert [row["roc_auc"] for row in after if row["out_of_domain"] == before[0]["out_of_domain"]] == 2 * [
        before[0]["roc_auc"]
    ]
    compared(data, tmp_path, "brightness,brightness:power=2", "shifts:flat,noise.npz")
    assert len(brightness) == 8
    assert rows_of(tmp_path) == after
    compared(data, tmp_path, "brightness", seed=1)
    assert len(brightness) == 11


class Both(Brightness):
    """Two brightnesses side by side, of which the first decides."""

    name = "both"
    pieces = Brightness(), Brightness(power=2.0)

    def assembled(self, statistics):
        return np.concatenate(statistics, axis=1)

    def score_statistics(self, statistics):
        return super().score_statistics(statistics[:, :1])


def test_what_several_methods_look_at_is_measured_once(data, tmp_path, brightness, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "both", ("test_compare", "Both"))
    paths, path = [], methods.method_class("diffpath").statistics
    spy = lambda self, model, images, keys: paths.append(len(images)) or path(self, model, images, keys)
    monkeypatch.setattr(methods.method_class("diffpath"), "statistics", spy)
    table = compared(data, tmp_path, "both,brightness,diffpath:form=1d,ufcod")
    assert brightness == [30, 30, 20, 20, 12, 12]
    assert paths == [30, 20, 12]
    rows = {row["method"]: row for row in table.rows}
    assert rows.keys() == {"both", "brightness", "diffpath:form=1d", "ufcod"}
    assert all(row["roc_auc"] is not None for row in table.rows)
    assert rows["both"]["roc_auc"] == rows["brightness"]["roc_auc"]


@pytest.mark.parametrize(
    ("name", "settings"), [("combined", {}), ("ufcod", {"steps": 4}), ("diffpath", {"form": "6d", "reach": 2.0})]
)
def test_pieces_put_together_are_what_a_method_measures(name, settings, data):
    model = TrainedModel(tiny.config(), load_model(tiny.config(), data / "checkpoint.pth", tiny.CPU)[0], tiny.CPU, 8)
    pixels = torch.from_numpy(np.load(data / "known.npz")["images"])[:3, None]
    keys, method = noise.seed_keys(0, noise.content_keys(pixels)), methods.create(name, **settings)
    expected = method.statistics(model, pixels, keys)
    pieces = [piece.statistics(model, pixels, keys) for piece in method.pieces]
    np.testing.assert_array_equal(method.assembled(pieces), expected)
    np.testing.assert_array_equal(method.examine(model, pixels, keys).statistics, expected)


def test_a_stopped_run_loses_one_chunk(data, tmp_path, brightness, monkeypatch, capsys):
    slow = lambda: monkeypatch.setattr(Brightness, "evaluations", lambda self, model: 12_500)
    slow()  # so that a chunk has few images
    whole = compared(data, tmp_path / "whole", "brightness").rows
    chunks, statistics = list(brightness), Brightness.statistics
    assert chunks == [8, 8, 8, 6, 8, 8, 4, 8, 4]

    def stops(self, model, images, keys):
        if len(self.measured) == len(chunks) + 5:
            raise KeyboardInterrupt
        return statistics(self, model, images, keys)

    stopping = methods.method_class("brightness")
    monkeypatch.setattr(stopping, "statistics", stops)
    with pytest.raises(KeyboardInterrupt):
        compared(data, tmp_path / "stopped", "brightness")
    monkeypatch.undo()
    slow()
    monkeypatch.setitem(methods.METHODS, "brightness", ("test_compare", "Brightness"))
    stopping.measured.clear()
    capsys.readouterr()
    again = compared(data, tmp_path / "stopped", "brightness").rows
    assert stopping.measured == chunks[5:]
    out, err = capsys.readouterr()
    assert "comparing: 475,000 of 775,000 network evaluations are there already\n" in out
    bars = re.findall(r"\d+k/\d+k", err)
    assert (bars[0], bars[-1]) == ("475k/775k", "775k/775k")
    drop = lambda rows: [{**row, "seconds": None} for row in rows]
    assert drop(again) == drop(whole)


def test_half_of_the_images_are_learned_from(data, tmp_path, brightness, capsys):
    """Where --fit is left out; chosen by content, whatever the order."""
    table = compared(data, tmp_path / "out", "brightness", fit=None)
    assert brightness == [10, 10, 12]
    assert "methods learn from 10 of the images of " in capsys.readouterr().out
    np.savez(tmp_path / "turned.npz", images=tiny.pictures(20, seed=2)[::-1])
    turned = compared(data, tmp_path / "other", "brightness", fit=None, in_domain=str(tmp_path / "turned.npz"))
    assert [row["roc_auc"] for row in turned.rows] == [row["roc_auc"] for row in table.rows]
    with pytest.raises(UserError, match="--in_domain has 1 image, of which no half can be learned from; give --fit"):
        compared(data, tmp_path / "out", "brightness", fit=None, in_domain=str(data / "one.png"))


def test_cheapest_methods_come_first(data, tmp_path, brightness, monkeypatch):
    order = []
    for name in ("lmd", "brightness"):
        each = methods.method_class(name)
        known = each.statistics
        spy = lambda self, *given, name=name, known=known: order.append(name) or known(self, *given)
        monkeypatch.setattr(each, "statistics", spy)
    compared(data, tmp_path, "lmd,brightness")
    assert order == 3 * ["brightness"] + 3 * ["lmd"]


def test_files(data, tmp_path, capsys):
    table = compared(data, tmp_path, "brightness,lmd:reps=1", "noise.npz,one.png,shifts:flat", command="python x|y")
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    for row, known in zip(rows, table.rows, strict=True):
        for name in COLUMNS:
            value = known[name]
            text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            assert row[name] == text
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["rows"] == table.rows
    assert written["summaries"] == table.summaries
    assert {name: one["images"] for name, one in written["out_of_domain"].items()} == {
        str(data / "noise.npz"): 12, str(data / "one.png"): 1, "shifts:flat": 20,
    }  # fmt: skip
    assert written["command"] == "python x|y"
    text = (tmp_path / "compare.md").read_text()
    assert text.count("| lmd:reps=1 |") == 1 + 3
    assert "- (!) all methods on " in text
    with Image.open(tmp_path / "compare.png") as picture:
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert printed.startswith(f"whether {data / 'checkpoint.pth'} was trained on the in-domain images could not be ch")
    assert " ".join(printed.splitlines()[1].split()) == "method evaluations s/image mean ROC-AUC minimum mean rank"
    assert printed.splitlines()[-1].endswith("compare.csv, compare.json, compare.npz, compare.md, compare.png")


def test_scores_of_single_images_are_written(data, tmp_path):
    """From which anyone can compute the table."""
    table = compared(data, tmp_path, "brightness,lmd:reps=1,brightness:broken=cost", "noise.npz,one.png,shifts:flat")
    with np.load(tmp_path / "compare.npz", allow_pickle=False) as file:
        found = dict(file)
    scored = [row for row in table.rows if row["roc_auc"] is not None]
    assert len(scored) == 6
    for row in scored:
        known = found[f"scores/{row['method']}/in_domain"]
        other = found[f"scores/{row['method']}/out_of_domain/{row['out_of_domain']}"]
        truth = np.repeat([0, 1], [len(known), len(other)])
        assert sklearn.metrics.roc_auc_score(truth, np.append(known, other)) == pytest.approx(row["roc_auc"])
    assert len([name for name in found if name.startswith("scores/")]) == 2 + len(scored)
    one = str(data / "one.png")
    files_of = {name: list(found[name]) for name in found if name.startswith("files/")}
    assert files_of == {f"files/out_of_domain/{one}": [one]}


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("broken", "lacking", "reason"),
    [
        ("brightness:broken=statistics", 1, "what the method brightness measures is NaN or infinite"),
        ("brightness:broken=scores", 1, "12 of 12 scores are not a number (NaN)"),
        ("brightness:broken=cost", 2, "it has no cost"),
        ("brightness:fewest=31", 2, "it needs at least 31 in-domain images to learn from, not 30"),
    ],
)
def test_a_method_that_fails_is_marked_and_the_rest_goes_on(broken, lacking, reason, data, tmp_path, capsys):
    table = compared(data, tmp_path, f"{broken},brightness", "noise.npz,shifts:blur")
    failed = [row for row in table.rows if row["method"] == broken and row["roc_auc"] is None]
    assert len(failed) == lacking
    assert all(reason in row["note"] for row in failed)
    assert all(row["roc_auc"] is not None for row in table.rows if row["method"] == "brightness")
    assert [row["method"] for row in table.summaries if row["mean"] is None] == [broken]
    assert len(re.findall(rf"warning: {broken}( \(which needs 31\))? is left out", capsys.readouterr().err)) == 1
    assert [row["roc_auc"] == "" for row in rows_of(tmp_path)].count(True) == lacking


def test_methods_that_refuse_a_model_of_discrete_times_are_marked(data, tmp_path):
    """Of 100 levels the first is at the noise ratio 0.03: too much for MSMA, not for a path."""
    tree = tiny.config(training__sde="vpsde", training__continuous=False, model__num_scales=100)
    checkpoint = tiny.write_checkpoint(tmp_path / "discrete.pth", tree)
    table = compared(
        data, tmp_path / "out", "nll,msma,ufcod", config=tree, ckpt_path=str(checkpoint), fit=str(data / "many.npz")
    )
    notes = {row["method"]: row["note"] for row in table.rows}
    assert "nll follows the image through continuous times" in notes["nll"]
    assert "trained at 100 discrete levels, has no level of the noise ratio 0.0" in notes["msma"]
    assert not notes["ufcod"]


def test_too_few_images_to_learn_from_are_told_first(data, tmp_path, brightness, monkeypatch, capsys):
    monkeypatch.setattr(Bench, "_made", tiny.failing(5))
    with pytest.raises(OSError, match="Input/output error"):
        compared(data, tmp_path, "brightness,brightness:fewest=31,brightness:fewest=99")
    few, left_out, *_ = capsys.readouterr().err.splitlines()
    assert few == "warning: 20 in-domain images to score are too few for the table to say much; give at least 50"
    assert left_out == (
        "warning: brightness:fewest=31 (which needs 31), brightness:fewest=99 (which needs 99) are left out: there are "
        "only 30 images to learn from; give more as --fit (--max_images holds for these, too)"
    )
    with pytest.raises(
        UserError, match=r"^there are only 2 images to learn from, too few for lmd:reps=1 \(which needs 3"
    ):
        compared(data, tmp_path, "lmd:reps=1", fit=None, max_images=4)  # for the p-values of its parts
    message = r"^there are only 30 images to learn from, too few for brightness:fewest=31 \(which needs 31\); give"
    with pytest.raises(UserError, match=message):
        compared(data, tmp_path, "brightness:fewest=31")
    assert brightness == []


def test_no_method_at_all(data, tmp_path, capsys):
    with pytest.raises(UserError, match="no method could be scored: it has no cost"):
        compared(data, tmp_path / "out", "brightness:broken=cost")
    assert "it has no cost" not in capsys.readouterr().err, "told once, by the error"
    assert list(tmp_path.iterdir()) == []


def test_images_that_must_not_be_the_same(data, tmp_path, capsys):
    """Fit and in-domain images; either and the training images; in-domain and out-of-domain ones."""
    fit, known = tiny.pictures(30, seed=1), tiny.pictures(20, seed=2)
    np.savez(tmp_path / "most.npz", images=np.concatenate([fit[:11], known[:9]]))
    np.savez(tmp_path / "some.npz", images=np.concatenate([fit[:5], known[:15]]))
    run = lambda **changes: compared(data, tmp_path / "out", "brightness", **changes)
    with pytest.raises(UserError, match=r"20 of the 20 images of --in_domain .* are those of --fit .*; give other"):
        run(fit=str(data / "known.npz"))
    with pytest.raises(UserError, match="11 of the 20 images"):
        run(in_domain=str(tmp_path / "most.npz"))
    for flag, name, count in (("fit", "fit.npz", 30), ("in_domain", "known.npz", 20)):
        trained = tiny.config(data__dataset=str(data / name))
        with pytest.raises(UserError, match=rf"{count} of the {count} images .* trained on; give --{flag} images that"):
            run(config=trained)
    capsys.readouterr()
    run(in_domain=str(tmp_path / "some.npz"))
    assert "warning: 5 of the 20 images of " in capsys.readouterr().err
    np.savez(tmp_path / "foreign.npz", images=np.concatenate([fit[:3], known[:4], tiny.pictures(3, seed=9)]))
    run(foreign=str(tmp_path / "foreign.npz"))
    told = "foreign.npz, out of domain, shares 7 of its 10 images with the in-domain ones; its ROC-AUC says little"
    assert told in capsys.readouterr().err
    shutil.copy(data / "noise.npz", tmp_path / "copy.npz")
    with pytest.raises(UserError, match=r"noise.npz and .*copy.npz, out of domain, are the same images; leave one out"):
        run(foreign=f"noise.npz,{tmp_path / 'copy.npz'}")


def test_other_files_are_not_mixed_with(data, tmp_path):
    (tmp_path / "compare.csv").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose an --output that is empty or not there yet"):
        compared(data, tmp_path, "brightness")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    with files.owned(tmp_path):  # the results of another command
        pass
    with pytest.raises(UserError, match="holds other files; choose an --output that is empty or not there yet"):
        compared(data, tmp_path, "brightness")


def test_copies_are_not_learned_from_and_scored(data, tmp_path, brightness, capsys):
    """Where --fit is left out."""
    for different, name in ((1, "one.npz"), (3, "three.npz")):
        np.savez(tmp_path / name, images=np.resize(tiny.pictures(different), (60, 8, 8)))
    with pytest.raises(UserError, match=r"^the images of 'one' are too often copies of one; give more different ones$"):
        compared(data, tmp_path / "out", "brightness", fit=None, in_domain=str(tmp_path / "one.npz"))
    compared(data, tmp_path / "out", "brightness", fit=None, in_domain=str(tmp_path / "three.npz"))
    assert sorted(brightness[:2]) == [20, 40]
    assert "warning: 'three': 57 of 60 images are copies of others, and tell less" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- commands


def test_two_processes_give_the_table_of_one(data, tmp_path, monkeypatch):
    """Also where a method fails in one of them; and the next run finds everything measured."""
    chosen = "lmd:reps=1,lmd:metrics=STLPIPS"  # which images of 8 pixels are too small for
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or sums are taken in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compared(data, tmp_path / "one", chosen)
    torch.set_num_threads(threads)
    code, _, err = tiny.command(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "compare.py", "--device=cpu",
        f"--ckpt_path={data / 'checkpoint.pth'}", f"--fit={data / 'fit.npz'}", f"--in_domain={data / 'known.npz'}",
        f"--out_of_domain={data / 'noise.npz'}", f"--output={tmp_path / 'two'}", f"--methods={chosen}",
    )  # fmt: skip
    assert code == 0, err
    assert err.count("warning: lmd:metrics=STLPIPS is left out: STLPIPS needs") == 1
    drop = lambda rows: [{**row, "seconds": ""} for row in rows]
    assert drop(rows_of(tmp_path / "one")) == drop(rows_of(tmp_path / "two"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("chunk_*.npz")}
    compared(data, tmp_path / "two", "lmd:reps=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("chunk_*.npz")} == kept


def test_help_imports_nothing_heavy():
    _, out, err = tiny.command("-c", HELP, "compare.py")
    assert "flags:" in out
    assert out.splitlines()[-1] == "[]", err
