"""Measuring a set of images in chunks: kept, continued, shared, and made anew where it no longer fits."""

import dataclasses
import re

import numpy as np
import pytest
import tiny
import torch

from basics.console import UserError
from basics.distributed import ALONE
from basics.image_sets import ImageSet, InMemory
from lmd import measurement, methods, open_model
from lmd.measurement import Measurement, measure_together, statistics_of
from lmd.methods.base import Examined, Method
from lmd.methods.lmd import LMD


class Brightness(Method):
    """Each image's mean and its key; counts what it sees."""

    name, parts = "brightness", ("brightness",)

    def __init__(self):
        self.seen = []

    def evaluations(self, model):
        return 0

    def statistics(self, model, images, keys):
        self.seen.append(len(images))
        return np.stack([images.double().mean(dim=(1, 2, 3)).numpy(), keys.double().numpy()], axis=1)

    def examine(self, model, images, keys):
        return Examined(self.statistics(model, images, keys), distances=images[:, 0].float())

    def score_statistics(self, statistics):
        return statistics[:, :1]


def images_of(pixels, store=None):
    pixels = torch.from_numpy(np.asarray(pixels))[:, None]
    return ImageSet("images", len(pixels), tuple(pixels.shape[1:]), store or InMemory(pixels))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(measurement, "_CHUNK", 8)


@pytest.fixture
def method():
    return Brightness()


PIXELS = tiny.pictures(30)


def measure(method, folder=None, pixels=PIXELS, ranks=ALONE, **options):
    return Measurement(method, None, images_of(pixels), 0, folder=folder, **options).run("measuring", ranks)


def test_chunks_are_fixed_by_the_images(method, monkeypatch):
    assert Measurement(method, None, images_of(PIXELS), 0).chunks == [(0, 8), (8, 16), (16, 24), (24, 30)]
    monkeypatch.setattr(measurement, "_CHUNK", 256)
    monkeypatch.setattr(measurement, "_CHUNK_VALUES", 20 * 64)
    assert Measurement(method, None, images_of(PIXELS), 0).chunks == [(0, 20), (20, 30)]


def test_derivatives_are_in_the_precision_of_the_network(tmp_path, monkeypatch):
    """They are computed outside of its calls, where torch's convolutions on a GPU are in TF32 by themselves."""
    model, seen = open_model(str(tiny.write_checkpoint(tmp_path / "checkpoint.pth")), tiny.config(), "cpu"), []
    grad, switch = torch.autograd.grad, torch.backends.cudnn
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: seen.append(switch.allow_tf32) or grad(*given))
    monkeypatch.setattr(switch, "allow_tf32", True)
    for name in ("nll", "scoped"):
        Measurement(methods.create(name), model, images_of(PIXELS[:2]), 0).run(None)
    assert set(seen) == {False}
    assert switch.allow_tf32


def test_numbers_are_free_of_chunks_and_place(method, monkeypatch):
    statistics = statistics_of(measure(method))
    np.testing.assert_array_equal(statistics[:, 0], PIXELS.mean(axis=(1, 2)))
    order = np.random.default_rng(0).permutation(30)
    np.testing.assert_array_equal(statistics_of(measure(method, pixels=PIXELS[order])), statistics[order])
    monkeypatch.setattr(measurement, "_CHUNK", 17)
    np.testing.assert_array_equal(statistics_of(measure(method)), statistics)


def test_what_is_in_the_folder_is_not_measured_again(method, tmp_path, capsys):
    first = statistics_of(measure(method, tmp_path))
    (tmp_path / "chunk_2.npz").unlink()
    method.seen.clear()
    capsys.readouterr()
    np.testing.assert_array_equal(statistics_of(measure(method, tmp_path)), first)
    assert method.seen == [8]
    out, err = capsys.readouterr()
    assert out == "measuring: 22 of 30 images are measured already\n"
    assert re.findall(r"\d+/30", err) == ["22/30", "30/30"]


def test_the_bar_moves_within_a_chunk(tmp_path):
    """With the evaluations of the network, five an image here."""
    model, moves = open_model(tiny.write_checkpoint(tmp_path / "checkpoint.pth"), device="cpu"), []
    Measurement(LMD(reps=1), model, images_of(PIXELS[:12]), 0).run(None, on_images=moves.append)
    assert moves == [1, 2, 1, 2, 1, 1, 1, 1, 1, 1]  # chunks of 8 and 4
    assert model.score.net.net._forward_hooks == {}


def test_a_folder_that_grew(method, tmp_path, capsys):
    """Images added behind the others: the chunks before them are kept.  Nothing of this is an error."""
    more = np.concatenate([PIXELS, tiny.pictures(10, seed=1)])
    measure(method, tmp_path)
    method.seen.clear()
    np.testing.assert_array_equal(
        statistics_of(measure(method, tmp_path, more)), statistics_of(measure(method, None, more))
    )
    assert method.seen[:2] == [8, 8]  # the last, which was not full, and a new one
    assert capsys.readouterr().out == (
        f"{tmp_path}: 1 of 5 parts was measured from other images, or otherwise, and is measured anew\n"
        "measuring: 24 of 40 images are measured already\n"
    )


@pytest.mark.parametrize(
    ("options", "anew"),
    [({"origin": {"detector": "b"}}, 4), ({"pixels": 255 - PIXELS}, 4), ({"pixels": PIXELS[1:]}, 4)],
)
def test_other_images_or_another_detector(options, anew, method, tmp_path):
    measure(method, tmp_path, origin={"detector": "a"})
    method.seen.clear()
    options = {"origin": {"detector": "a"}, **options}
    found = statistics_of(measure(method, tmp_path, **options))
    assert len(method.seen) == anew
    np.testing.assert_array_equal(found, statistics_of(measure(method, None, **options)))


def test_a_set_that_is_not_in_memory(method, tmp_path, monkeypatch):
    """Its own digest stands for it, once for all chunks."""

    class Store:
        hashed = 0

        def take(self, indices):
            return torch.from_numpy(PIXELS)[:, None][indices]

        def hash_into(self, digest):
            self.hashed += 1
            digest.update(PIXELS)

    for expected in ([8, 8, 8, 6], []):
        method.seen.clear()
        store = Store()
        measured = Measurement(method, None, images_of(PIXELS, store), 0, folder=tmp_path).run("measuring")
        np.testing.assert_array_equal(statistics_of(measured)[:, 0], PIXELS.mean(axis=(1, 2)))
        assert (method.seen, store.hashed) == (expected, 1)


def test_a_damaged_chunk_is_measured_anew(method, tmp_path, capsys):
    expected = measure(method, tmp_path)
    (tmp_path / "chunk_1.npz").write_bytes((tmp_path / "chunk_1.npz").read_bytes()[:-100])
    np.testing.assert_array_equal(statistics_of(measure(method, tmp_path)), statistics_of(expected))
    assert "chunk_1.npz is damaged or truncated; it is measured anew\n" in capsys.readouterr().err


def test_nan_is_one_line_and_loses_nothing(method, tmp_path, monkeypatch):
    plain = method.statistics
    monkeypatch.setattr(method, "statistics", lambda *a: plain(*a) * (np.nan if len(method.seen) == 3 else 1))
    with pytest.raises(
        UserError, match=r"^what the method brightness measures is NaN or infinite: .* another checkpoint"
    ):
        measure(method, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunk_0.npz", "chunk_1.npz"]


def test_pictures_stay_in_the_files(method, tmp_path):
    keep = lambda pixels, examined, start: {"picture_rows": start + np.arange(len(pixels)), "sums": np.zeros(3)}
    for _ in range(2):
        chunks = measure(method, tmp_path, keep=keep)
        assert [chunk.keys() for chunk in chunks] == 4 * [{"statistics", "sums"}]
    whole = Measurement(method, None, images_of(PIXELS), 0, folder=tmp_path, keep=keep).read(3)
    np.testing.assert_array_equal(whole["picture_rows"], np.arange(24, 30))
    assert "picture_rows" in measure(method, keep=keep)[0]  # without files


def test_images_are_changed_before_they_are_measured(method):
    negative = measure(method, change=lambda pixels, indices: 255 - pixels + 0 * indices[:, None, None, None].byte())
    np.testing.assert_array_equal(statistics_of(negative), statistics_of(measure(method, pixels=255 - PIXELS)))


@dataclasses.dataclass(frozen=True)
class Second:
    """The second of two processes, and what the first saw before either began."""

    missing: list
    rank = 1
    world_size = 2
    together = ALONE.together

    def on_main(self, function):
        return self.missing

    def check_same(self, value, what):
        assert what == "images"


def test_processes_share_what_the_first_saw_to_be_missing(method, tmp_path):
    """It may have written some of that before the second looks."""
    measure(method, tmp_path)
    for number in (1, 3):
        (tmp_path / f"chunk_{number}.npz").unlink()
    method.seen.clear()
    np.testing.assert_array_equal(
        statistics_of(measure(method, tmp_path, ranks=Second([0, 1, 2, 3])))[:, 0], PIXELS.mean(axis=(1, 2))
    )
    assert method.seen == [8, 6]
    with pytest.raises(ValueError, match="share their chunks through a folder"):
        measure(method, None, ranks=Second([]))


class First(Second):
    rank = 0


def test_chunks_of_several_sets_are_dealt_out_together(tmp_path):
    """Where each has one alone, neither process waits for the other; what fails is left for `run`, which says why."""
    broken = np.full((5, *PIXELS.shape[1:]), 7, np.uint8)

    class Failing(Brightness):
        def statistics(self, model, images, keys):
            return super().statistics(model, images, keys) * (np.nan if bool((images == 7).all()) else 1)

    sets = {"a": PIXELS[:6], "b": PIXELS[6:8], "broken": broken, "c": PIXELS[8:20], "d": PIXELS[20:21]}
    missing, seen, told = [[0], [0], [0], [0, 1], [0]], {}, []
    for ranks in (First(missing), Second(missing)):
        method = Failing()
        work = [
            (Measurement(method, None, images_of(pixels), 0, folder=tmp_path / name), 10)
            for name, pixels in sets.items()
        ]
        measure_together(work, ranks, told.append)
        seen[ranks.rank] = method.seen, sum(told)
        told.clear()
    # each image counts 10; the first tells of 10 of its 15, the second of its 11, as shares of all 26
    assert seen == {0: ([6, 5, 4], 173), 1: ([2, 8, 1], 260)}
    for name, pixels in sets.items():
        again = Brightness()
        if name != "broken":
            found = statistics_of(measure(again, tmp_path / name, pixels))[:, 0]
            np.testing.assert_array_equal(found, pixels.mean(axis=(1, 2)))
            assert again.seen == []
    with pytest.raises(UserError, match="is NaN or infinite"):
        measure(Failing(), tmp_path / "broken", broken)
