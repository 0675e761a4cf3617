"""Reconstruction: the same whatever the batching, killed and resumed, shared between runs; all sources and masks."""

import csv
import errno
import json
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from helpers import GOLDEN
from PIL import Image
from tiny import CPU, SIZE, reconstruct

import datasets
import masks
import sampling
from basics import files, noise
from basics.console import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, guard
from basics.image_sets import ImageSet
from basics.pixels import to_model_range
from lmd import detection, reconstruction
from lmd.process import create_solvers
from lmd.reconstructor import MaskOptions, Reconstructor
from lmd.trained_model import load_model, rows_within
from storage.checkpoints import read_checkpoint
from storage.results_folder import FORMAT, ResultsFolder
from storage.scores import read_results

ALT = "checkerboard_alt_blocks4_reps2"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A checkpoint, seven in-domain and five out-of-domain images."""
    folder = tmp_path_factory.mktemp("shared")
    tiny.write_checkpoint(folder / "checkpoint.pth")
    tiny.write_pictures(folder / "squares.npz", 7, seed=0)
    np.savez(folder / "noise.npz", images=np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def checkpoint(shared):
    return shared / "checkpoint.pth"


@pytest.fixture(scope="module")
def sources(shared):
    return {"pos": shared / "squares.npz", "neg": shared / "noise.npz"}


@pytest.fixture(scope="module")
def made(shared, checkpoint, sources, tmp_path_factory):
    """A finished results folder, in batches of 4; a copy of it for each test is `results`."""
    return reconstruct(tmp_path_factory.mktemp("made") / "first", checkpoint, sources)


@pytest.fixture
def results(made, tmp_path):
    """A finished results folder in a workdir of its own, `tmp_path/first`."""
    return shutil.copytree(made, tmp_path / "first" / ALT)


def load(folder, side="pos"):
    """All batches of a side together: orig (N, C, H, W), masked and recon (R, N, C, H, W)."""
    count = len(list((folder / side).glob("batch_*.pth")))
    batches = [torch.load(folder / side / f"batch_{i}.pth", weights_only=True) for i in range(count)]
    orig = torch.cat([batch["orig"] for batch in batches])
    return orig, *(torch.cat([torch.stack(batch[name]) for batch in batches], dim=1) for name in ("masked", "recon"))


def tensors(folder):
    """The content of every batch file, by name."""
    return {
        path.relative_to(folder).as_posix(): torch.load(path, weights_only=True) for path in folder.rglob("batch_*.pth")
    }


@pytest.fixture
def counted(monkeypatch):
    """The positions of the images that are reconstructed, batch by batch."""
    calls, side_of = [], reconstruction.reconstruct_side

    def counting(job, images, reconstruct, missing, *rest):
        def counted(*batch):
            start = missing[len(calls) - before] * job.batch_size
            calls.append((images.name, list(range(start, start + len(batch[0])))))
            return reconstruct(*batch)

        before, counted.process = len(calls), reconstruct.process
        return side_of(job, images, counted, missing, *rest)

    monkeypatch.setattr(reconstruction, "reconstruct_side", counting)
    return calls


# ---------------------------------------------------------------------------------------------- what is written


def test_batches_are_as_published(made):
    theirs = torch.load(GOLDEN / "results_small" / "pos" / "batch_0.pth", weights_only=True)
    assert sorted(tensors(made)) == [
        "neg/batch_0.pth", "neg/batch_1.pth", "pos/batch_0.pth", "pos/batch_1.pth",
    ]  # fmt: skip
    for name, batch in tensors(made).items():
        count = {"pos/batch_1.pth": 3, "neg/batch_1.pth": 1}.get(name, 4)
        assert batch.keys() == {*theirs, "identity", "digest"}
        assert batch["orig"].shape == (count, 1, SIZE, SIZE)
        for part in ("masked", "recon"):
            assert isinstance(batch[part], list)
            assert [tensor.shape for tensor in batch[part]] == 2 * [batch["orig"].shape]
            assert all(tensor.dtype == torch.float32 for tensor in batch[part])


def test_originals_masks_and_known_pixels(made, sources):
    """The originals are the images in [0, 1]; known pixels come back as their mean at the last time."""
    orig, masked, rebuilt = load(made)
    pixels = torch.from_numpy(np.load(sources["pos"])["images"])[:, None] / 255
    assert torch.equal(orig, pixels)
    mask = torch.stack([masks.make_mask("checkerboard_alt", SIZE, rep) for rep in range(2)])[:, 0]  # (R, 1, S, S)
    assert torch.equal(masked, orig * mask[:, None])
    known = (mask[:, None] == 1).expand_as(rebuilt)
    alpha = 0.99995  # of sub-VP at t = 1e-3
    torch.testing.assert_close(rebuilt[known], (alpha * (2 * orig - 1) + 1).div(2).expand_as(rebuilt)[known])
    assert (rebuilt - orig)[~known].abs().mean() > 0.05
    assert not torch.equal(rebuilt[0], rebuilt[1])


def test_reconstruction_is_inpainting_with_the_images_own_noise(made, checkpoint, sources):
    """One image and repetition by hand: its score model, its key, its mask."""
    config = tiny.config()
    model, _ = load_model(config, checkpoint, CPU)
    images = datasets.load(sources["neg"], split="test", image_size=SIZE, num_channels=1)
    keys = noise.image_keys(0, noise.content_keys(images.read(4, 5)), [1])
    predictor, _ = create_solvers(config, model.sde)
    filled = sampling.inpaint_as_published(
        model,
        to_model_range(images.read(4, 5), True),
        masks.make_mask("checkerboard_alt", SIZE, 1),
        noise.KeyedNoise(keys, (1, SIZE, SIZE)),
        sampling.Scheme(predictor),
    )
    torch.testing.assert_close(load(made, "neg")[2][1, 4], (filled[0] + 1) / 2, rtol=1e-5, atol=1e-5)


def test_manifest(made, checkpoint):
    manifest = json.loads((made / "manifest.json").read_text())
    settings, sides = manifest["settings"], manifest["sides"]
    assert settings["checkpoint"] == files.file_hash(checkpoint)
    assert (settings["seed"], settings["reps_per_image"]) == (0, 2)
    assert settings["mask"] == {
        "mask_type": "checkerboard_alt", "num_blocks": 4, "patch_size": 4, "ratio": 0.5, "identifier": None,
    }  # fmt: skip
    assert settings["config"]["model"]["num_scales"] == 3
    assert settings["config"]["sampling"]["predictor"] == "euler_maruyama"
    assert {name: sides["neg"][name] for name in ("dataset", "images", "batch_size", "batches", "skipped")} == {
        "dataset": "noise", "images": 5, "batch_size": 4, "batches": 2, "skipped": [],
    }  # fmt: skip
    assert sides["pos"]["fingerprint"].startswith("7:")
    assert (sides["pos"]["labels"], manifest["format"]) == (None, FORMAT)
    assert {"torch", "python", "numpy", "device", "checkpoint_path", "checkpoint_step"} <= manifest["versions"].keys()


def test_folder_names(shared, checkpoint, sources, tmp_path):
    np.save(tmp_path / "own.npy", np.eye(SIZE))
    names = {
        "center_reps1": MaskOptions("center"),
        "checkerboard_blocks2_reps1": MaskOptions("checkerboard", num_blocks=2),
        "random_patch2_ratio0.3_reps1": MaskOptions("random", patch_size=2, ratio=0.3),
        "random_patch4_ratio0.5_mine_reps1": MaskOptions("random", identifier="mine"),
        "file_own_reps1": MaskOptions("file", file_path=str(tmp_path / "own.npy")),
        "file_mine_reps1": MaskOptions("file", file_path=str(tmp_path / "own.npy"), identifier="mine"),
    }
    for name, mask in names.items():
        path = reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"]}, mask=mask, reps=1, max_images=1)
        assert path == tmp_path / "run" / name


# -------------------------------------------------------------------------------------- the same whatever the batch


def memory(rows):
    """The GB that hold so many images in the network at once."""
    return (rows + 0.5) / rows_within(1.0, tiny.config(), CPU)


@pytest.mark.parametrize(("option", "value"), [("batch_size", 1), ("batch_size", 100), ("memory_gb", memory(3))])
def test_batching_changes_nothing(option, value, made, checkpoint, sources, tmp_path):
    """1e-5: convolutions sum in another order for another batch."""
    again = reconstruct(tmp_path / "run", checkpoint, sources, **{option: value})
    for side in sources:
        for mine, theirs in zip(load(again, side), load(made, side), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_budget_is_kept(monkeypatch, checkpoint, sources, tmp_path):
    assert rows_within(memory(3), tiny.config(), CPU) == 3
    seen, inpaint = [], sampling.inpaint_as_published

    def watched(model, data, *args):
        seen.append(len(data))
        return inpaint(model, data, *args)

    monkeypatch.setattr(sampling, "inpaint_as_published", watched)
    reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"]}, memory_gb=memory(3))
    assert seen == [3, 3, 2, 3, 3]  # 2 repetitions of 4 images, then of 3


def langevin():
    return tiny.config(sampling__corrector="langevin", model__num_scales=30)


def test_langevin_is_the_same_whatever_the_memory(checkpoint, sources, tmp_path):
    """Its step size is a mean over the batch of images: whole repetitions stay together, and no others join them."""
    few, all_ = (
        reconstruct(tmp_path / str(gb), checkpoint, {"pos": sources["pos"]}, langevin(), memory_gb=gb)
        for gb in (memory(3), 1.0)
    )
    # 1e-4 of the images' own size, for 30 steps add up their rounding
    mine, theirs = load(few)[2], load(all_)[2]
    assert mine.isfinite().all()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_langevin_is_that_of_a_batch_of_images(checkpoint, sources, tmp_path):
    """The same as each repetition by itself."""
    folder = reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"]}, langevin(), batch_size=7)
    config = langevin()
    model, _ = load_model(config, checkpoint, CPU)
    images = datasets.load(sources["pos"], split="test", image_size=SIZE, num_channels=1)
    expected = tiny.inpainted(Reconstructor(config, model, CPU, 100), images.read(0, 7), reps=1)
    scale = expected.abs().max().item()
    torch.testing.assert_close(load(folder)[2][0], expected[0], rtol=0, atol=1e-4 * scale)


def test_too_little_memory(checkpoint, sources, tmp_path):
    with pytest.raises(UserError, match=r"^--memory_gb 1e-06 is too little: one image needs about 0\.000"):
        reconstruct(tmp_path / "run", checkpoint, sources, memory_gb=1e-6)
    assert not (tmp_path / "run").exists()


def test_seeds_and_images_have_noise_of_their_own(made, checkpoint, sources, tmp_path):
    other = reconstruct(tmp_path / "other", checkpoint, sources, seed=1)
    assert not torch.equal(load(other)[2], load(made)[2])
    _, _, rebuilt = load(made)
    assert len((rebuilt - rebuilt.mean(dim=(2, 3, 4), keepdim=True)).flatten(1).unique(dim=0)) == 2  # repetitions
    assert (rebuilt[0, 0] - rebuilt[0, 1]).abs().mean() > 0.05


def test_an_image_has_one_reconstruction_whatever_its_place_and_company(made, checkpoint, sources, tmp_path):
    """Equal images come back equally; renaming the set, adding to it and turning it round change nothing."""
    pixels = np.load(sources["pos"])["images"]
    order = [6, 3, 3, 0, 5, 1, 2, 4, 3]
    np.savez(tmp_path / "renamed.npz", images=pixels[order])
    expected = load(made)[2][:, order]
    found = load(reconstruct(tmp_path / "run", checkpoint, {"pos": tmp_path / "renamed.npz"}, batch_size=3))[2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # 1e-5: sums in another order in another batch
    np.savez(tmp_path / "changed.npz", images=pixels ^ np.eye(SIZE, dtype=np.uint8))
    other = load(reconstruct(tmp_path / "other", checkpoint, {"pos": tmp_path / "changed.npz"}))[2]
    assert (other - load(made)[2]).abs().mean() > 0.05


def test_random_masks_do_not_know_the_names_of_the_sets(checkpoint, sources, tmp_path):
    shutil.copy(sources["pos"], tmp_path / "renamed.npz")
    first, second = (
        load(
            reconstruct(tmp_path / str(i) / "x", checkpoint, {"pos": source}, mask=MaskOptions("random", patch_size=2))
        )
        for i, source in enumerate((sources["pos"], tmp_path / "renamed.npz"))
    )
    assert tiny.same(first, second)


# -------------------------------------------------------------------------------------------- killed and resumed

CHILD = """
import os, signal, sys
from pathlib import Path
import tiny
from basics import files

checkpoint, pos, neg, workdir = map(Path, sys.argv[1:])
writes, flush = [], files.os.fsync

def fsync(handle):  # the manifest, two in-domain batches, then the first out-of-domain one
    writes.append(handle)
    if len(writes) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(handle)

files.os.fsync = fsync
tiny.reconstruct(workdir, checkpoint, {"pos": pos, "neg": neg})
"""


def test_a_killed_run_is_continued(made, checkpoint, sources, tmp_path, counted):
    code, _, err = tiny.command("-c", CHILD, checkpoint, sources["pos"], sources["neg"], tmp_path / "run")
    assert code == -signal.SIGKILL, err
    assert sorted(tensors(tmp_path / "run" / ALT)) == ["pos/batch_0.pth", "pos/batch_1.pth"]
    folder = reconstruct(tmp_path / "run", checkpoint, sources)
    assert counted == [("noise", [0, 1, 2, 3]), ("noise", [4])]
    assert tiny.same(tensors(folder), tensors(made))


def test_interrupted_between_batches(made, checkpoint, sources, tmp_path, monkeypatch, counted):
    read = ImageSet.read

    def interrupted(self, start, stop):
        if start == 4:
            raise KeyboardInterrupt
        return read(self, start, stop)

    monkeypatch.setattr(ImageSet, "read", interrupted)
    assert guard(lambda _: reconstruct(tmp_path / "run", checkpoint, sources), None) == EXIT_INTERRUPTED
    monkeypatch.setattr(ImageSet, "read", read)
    folder = reconstruct(tmp_path / "run", checkpoint, sources)
    assert [positions for _, positions in counted] == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [4]]
    assert tiny.same(tensors(folder), tensors(made))


def test_a_rerun_makes_nothing(results, checkpoint, sources, counted, capsys):
    before = tiny.snapshot(results)
    assert reconstruct(results.parent, checkpoint, sources) == results
    assert tiny.snapshot(results) == before
    assert counted == []
    out = capsys.readouterr().out
    assert "in-domain: all 7 images of squares are there already" in out
    assert "out-of-domain: all 5 images of noise are there already" in out


def test_missing_and_truncated_batches_are_made_again(results, made, checkpoint, sources, counted):
    (results / "pos" / "batch_0.pth").unlink()
    damaged = results / "neg" / "batch_1.pth"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    reconstruct(results.parent, checkpoint, sources)
    assert counted == [("squares", [0, 1, 2, 3]), ("noise", [4])]
    assert tiny.same(tensors(results), tensors(made))


def zero_bytes(path):
    """Zeroes 500 bytes within the pixels of the last reconstruction."""
    last = torch.load(path, weights_only=True)["recon"][-1].numpy().tobytes()
    data = bytearray(path.read_bytes())
    at = data.index(last)
    data[at : at + 500] = bytes(500)
    path.write_bytes(data)


def test_a_damaged_batch_is_refused_by_detect_and_made_again_by_recon(
    results, made, checkpoint, sources, counted, capsys
):
    """The same command mends it, as the message says."""
    zero_bytes(results / "pos" / "batch_1.pth")
    shutil.copy(results / "pos" / "batch_0.pth", results / "neg" / "batch_0.pth")
    with pytest.raises(UserError, match=r"pos/batch_1\.pth is damaged.*; run the same recon\.py command again, it"):
        detection.detect(results, ["MSE"])
    reconstruct(results.parent, checkpoint, sources)
    assert counted == [("squares", [4, 5, 6]), ("noise", [0, 1, 2, 3])]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: in-domain, made again: batch_1.pth is damaged: the checksum of its part archive/data/3 differs",
        "warning: out-of-domain, made again: batch_0.pth was made from other images or settings",
    ]
    assert tiny.same(tensors(results), tensors(made))
    assert detection.detect(results, ["MSE"], plots=False)


def test_a_renamed_set_continues(results, made, checkpoint, sources, tmp_path, counted):
    """The manifest tells the new name."""
    (results / "pos" / "batch_1.pth").unlink()
    shutil.copy(sources["pos"], tmp_path / "renamed.npz")
    reconstruct(results.parent, checkpoint, {**sources, "pos": tmp_path / "renamed.npz"})
    assert counted == [("renamed", [4, 5, 6])]
    assert tiny.same(tensors(results), tensors(made))
    assert ResultsFolder(results).manifest()["sides"]["pos"]["dataset"] == "renamed"


def test_a_folder_of_an_earlier_version_is_scored_but_not_continued(results, checkpoint, sources, counted):
    manifest = json.loads((results / "manifest.json").read_text())
    del manifest["format"], manifest["settings"]["noise"]
    (results / "manifest.json").write_text(json.dumps(manifest))
    for path in results.rglob("batch_*.pth"):
        batch = torch.load(path, weights_only=True)
        torch.save({name: batch[name] for name in ("orig", "masked", "recon")}, path)
    before = tensors(results)
    with pytest.raises(UserError, match=r"holds batches of an earlier version, with another noise; choose another"):
        reconstruct(results.parent, checkpoint, sources)
    assert counted == []
    assert tiny.same(tensors(results), before)
    assert detection.detect(results, ["MSE"], plots=False)


# ------------------------------------------------------------------------------------------------- one run a folder


def test_a_second_run_is_refused_while_the_first_writes(made, checkpoint, sources, tmp_path, monkeypatch, counted):
    """Also one of another seed, in the time before the first batch is there; the first is not disturbed."""
    tried, inpaint = [], sampling.inpaint_as_published

    def interfering(*args):
        if not tried:
            tried.append(True)
            for seed in (0, 1):
                with pytest.raises(UserError, match=rf"{ALT} is being written to by process \d+ on .*; wait until it"):
                    reconstruct(tmp_path / "run", checkpoint, sources, seed=seed)
        return inpaint(*args)

    monkeypatch.setattr(sampling, "inpaint_as_published", interfering)
    folder = reconstruct(tmp_path / "run", checkpoint, sources)
    assert tried
    assert len(counted) == 4
    assert tiny.same(tensors(folder), tensors(made))
    assert reconstruct(tmp_path / "run", checkpoint, sources) == folder  # it is free again


def test_a_checkpoint_that_is_replaced_while_it_is_read(checkpoint, sources, tmp_path, monkeypatch):
    """As by a training that goes on: the manifest tells of the weights that were used, or nothing is made."""
    path, load, load_sides = tmp_path / "newest.pth", reconstruction.load_model, reconstruction.load_sides
    shutil.copy(checkpoint, path)

    def replaced(*arguments, **options):
        tiny.write_checkpoint(path, seed=9)
        return load(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "load_model", replaced)
        with pytest.raises(UserError, match=r"newest\.pth was replaced while it was read; run the same command again"):
            reconstruct(tmp_path / "run", path, sources)
    shutil.copy(checkpoint, path)

    def later(*arguments, **options):
        tiny.write_checkpoint(path, seed=9)
        return load_sides(*arguments, **options)

    monkeypatch.setattr(reconstruction, "load_sides", later)
    folder = reconstruct(tmp_path / "run", path, sources)
    assert ResultsFolder(folder).manifest()["settings"]["checkpoint"] == files.file_hash(checkpoint)


def test_a_mask_file_is_read_once(checkpoint, sources, tmp_path, monkeypatch):
    mask, inpaint, used = np.tile([0.0, 1.0], (SIZE, SIZE // 2)), sampling.inpaint_as_published, []
    np.save(tmp_path / "mask.npy", mask)

    def editing(model, data, mask, *args):
        used.append(mask[0, 0])
        np.save(tmp_path / "mask.npy", 1 - used[0].numpy())
        return inpaint(model, data, mask, *args)

    monkeypatch.setattr(sampling, "inpaint_as_published", editing)
    options = MaskOptions("file", file_path=str(tmp_path / "mask.npy"))
    folder = reconstruct(tmp_path / "run", checkpoint, sources, mask=options)
    assert len(used) > 1
    assert all(torch.equal(each, used[0]) for each in used)
    with pytest.raises(UserError, match=r"was made with other settings \(mask\.content"):
        reconstruct(tmp_path / "run", checkpoint, sources, mask=options)
    assert folder.name == "file_mask_reps2"


def test_a_manifest_that_goes_while_batches_are_made(checkpoint, sources, tmp_path, monkeypatch):
    """No batch is written beside another manifest, or none."""
    inpaint = sampling.inpaint_as_published

    def removing(*args):
        if (tmp_path / "run" / ALT / "pos" / "batch_0.pth").exists():
            (tmp_path / "run" / ALT / "manifest.json").unlink(missing_ok=True)
        return inpaint(*args)

    monkeypatch.setattr(sampling, "inpaint_as_published", removing)
    with pytest.raises(UserError, match=r"manifest\.json was removed or replaced while this run wrote there; run"):
        reconstruct(tmp_path / "run", checkpoint, sources)


def test_the_next_command_is_quoted_for_the_shell(checkpoint, sources, tmp_path, capsys):
    folder = reconstruct(tmp_path / "it's $HOME; a run", checkpoint, sources, max_images=2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next: python detect.py --result_path ")
    assert shlex.split(line)[1:] == [
        "python", "detect.py", "--result_path", str(folder), "--reps", "2", "--metric", "MSE,SSIM",
    ]  # fmt: skip


OTHER = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "batch size": ({"batch_size": 3}, r"neg\.batch_size: 4 there, 3 here"),
    "images": ({"max_images": 2}, "other images: in-domain 7 there, 2 here, out-of-domain 5 there, 2 here"),
    "steps": ({"tree": {"model__num_scales": 4}}, r"config\.model\.num_scales: 3 there, 4 here"),
    "sampler": ({"tree": {"sampling__noise_removal": False}}, "noise_removal: true there, false here"),
    "mask": ({"mask": {"num_blocks": 4, "ratio": 0.4}}, r"mask\.ratio: 0\.5 there, 0\.4 here"),
    "checkpoint": ({"checkpoint": 5}, r"checkpoint: .* there, .* here"),
    "in-domain": (
        {"pos": "noise.npz"},
        "other images: in-domain 7 there, 5 here, or in another order",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_folder_of_other_settings_is_refused(name, results, shared, sources, tmp_path, counted):
    changes, message = OTHER[name]
    options = {key: value for key, value in changes.items() if key in ("seed", "batch_size", "max_images")}
    checkpoint = shared / "checkpoint.pth"
    if "checkpoint" in changes:
        checkpoint = tiny.write_checkpoint(tmp_path / "other.pth", seed=changes["checkpoint"])
    if "pos" in changes:
        sources = {**sources, "pos": shared / changes["pos"]}
    tree, mask = tiny.config(**changes.get("tree", {})), MaskOptions("checkerboard_alt", **changes.get("mask", {}))
    before = tiny.snapshot(results)
    with pytest.raises(UserError, match=rf"was made (with other settings \(.*|of ){message}.*choose another --workdir"):
        reconstruct(results.parent, checkpoint, sources, tree, mask, **options)
    assert tiny.snapshot(results) == before
    assert counted == []


def test_a_run_that_failed_before_its_first_batch_stands_in_nobodys_way(checkpoint, sources, tmp_path):
    broken = tiny.config(model__beta_max=1e30, model__num_scales=3)
    light = tiny.write_checkpoint(tmp_path / "broken.pth", broken)
    with pytest.raises(UserError, match=r"the reconstructions of batch 0 are NaN or infinite"):
        reconstruct(tmp_path / "run", light, sources, broken)
    assert tensors(tmp_path / "run" / ALT) == {}
    assert len(tensors(reconstruct(tmp_path / "run", checkpoint, sources))) == 4


# ----------------------------------------------------------------------------------------------- matched resolutions


@pytest.fixture
def coarse(tmp_path):
    """Three images of 5x5 pixels, which the model's 8x8 enlarges."""
    return tiny.write_pictures(tmp_path / "coarse.npz", 3, seed=6, size=5)


def test_matched_sides(coarse, checkpoint, sources, tmp_path, capsys):
    """Both go through the smaller resolution, whichever side it is of, and the manifest says so."""
    expected = {
        path: datasets.load(path, split="test", image_size=SIZE, num_channels=1, reduced_to=5).read(0, 99) / 255
        for path in (coarse, sources["pos"])
    }
    for sides in ({"pos": sources["pos"], "neg": coarse}, {"pos": coarse, "neg": sources["pos"]}):
        workdir = tmp_path / sides["pos"].stem / "run"
        folder = reconstruct(workdir, checkpoint, sides, match_resolution=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        for side, path in sides.items():
            assert torch.equal(load(folder, side)[0], expected[path])
            assert manifest["sides"][side]["match_resolution"] == 5
        names = {sources["pos"]: "8", coarse: "5"}
        assert (
            f"--match_resolution: all images are reduced to 5 pixels first (smallest: in-domain {names[sides['pos']]}, "
            f"out-of-domain {names[sides['neg']]})" in capsys.readouterr().out
        )


def test_matched_results_are_shared_with_those_alone_that_were_matched_alike(
    results, coarse, checkpoint, sources, tmp_path, counted
):
    matched = {"pos": sources["pos"], "neg": coarse}
    reconstruct(tmp_path / "plain", checkpoint, matched)
    assert counted == [("coarse", [0, 1, 2])]  # in-domain ones were taken from `results`
    counted.clear()
    with pytest.raises(UserError, match=r"neg\.match_resolution: null .*pos\.match_resolution: null there, 5 here"):
        reconstruct(tmp_path / "plain", checkpoint, matched, match_resolution=True)
    reconstruct(tmp_path / "matched", checkpoint, matched, match_resolution=True)
    assert [positions for _, positions in counted] == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2]]  # nothing is shared
    counted.clear()
    reconstruct(tmp_path / "again", checkpoint, matched, match_resolution=True)
    assert counted == []
    coarser = tiny.write_pictures(tmp_path / "coarser.npz", 3, seed=6, size=4)
    reconstruct(tmp_path / "other", checkpoint, {"pos": sources["pos"], "neg": coarser}, match_resolution=True)
    assert len(counted) == 3


def test_sides_that_nothing_enlarges_are_left_as_they_are(made, checkpoint, sources, tmp_path, capsys):
    folder = reconstruct(tmp_path / "run", checkpoint, sources, match_resolution=True)
    assert "no image is enlarged (smallest: in-domain 8, out-of-domain 8 pixels)" in capsys.readouterr().out
    assert tiny.same(tensors(folder), tensors(made))


def test_unusable_files_are_named_once_and_counted(checkpoint, sources, tmp_path, capsys):
    for index, image in enumerate(tiny.pictures(3, size=6)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "list.txt").write_text("0.png\ndamaged.png\n1.png\n2.png\n")
    (tmp_path / "damaged.png").write_bytes(b"")
    sides = {"pos": sources["pos"], "neg": tmp_path / "list.txt"}
    for name, match in [("plain", False), ("matched", True)]:
        folder = reconstruct(tmp_path / name, checkpoint, sides, match_resolution=match)
        entry = json.loads((folder / "manifest.json").read_text())["sides"]["neg"]
        assert entry["images"] == 3
        assert entry["skipped"] == [["damaged.png", "not an image, or damaged"]]
        assert capsys.readouterr().err.count("damaged.png is left out") == 1


def test_workers_change_nothing(checkpoint, sources, tmp_path, monkeypatch):
    monkeypatch.setattr("basics.image_sets.IN_MEMORY_BYTES", 0)
    for index, image in enumerate(tiny.pictures(9, size=13)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    made = [
        reconstruct(tmp_path / f"run{workers}" / "x", checkpoint, {"pos": tmp_path}, workers=workers)
        for workers in (1, 4)
    ]
    assert tiny.same(*map(tensors, made))


# -------------------------------------------------------------------------------------------------- shared results


def test_in_domain_results_serve_every_out_of_domain_set(results, shared, checkpoint, sources, tmp_path, counted):
    tiny.write_pictures(shared / "others.npz", 3, seed=5)
    second = reconstruct(tmp_path / "second", checkpoint, {"pos": sources["pos"], "neg": shared / "others.npz"})
    assert counted == [("others", [0, 1, 2])]
    for index in range(2):
        assert (second / "pos" / f"batch_{index}.pth").samefile(results / "pos" / f"batch_{index}.pth")
    (scores,) = detection.detect(second, ["MSE"], reps=2, plots=False)
    assert len(scores.tables["neg"]["score"]) == 3


def test_out_of_domain_results_serve_as_in_domain_ones(results, checkpoint, sources, tmp_path, counted, capsys):
    swapped = reconstruct(tmp_path / "second", checkpoint, {"pos": sources["neg"], "neg": sources["pos"]})
    assert counted == []
    assert (swapped / "pos" / "batch_1.pth").samefile(results / "neg" / "batch_1.pth")
    assert "in-domain: 2 batches taken over from an earlier run with the same settings" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"seed": 1}, {"batch_size": 3}, {"reps": 3}])
def test_results_of_other_settings_are_not_shared(options, results, checkpoint, sources, tmp_path, counted):
    reconstruct(tmp_path / "second", checkpoint, {"pos": sources["pos"]}, **options)
    assert sum(len(positions) for _, positions in counted) == 7


def test_changed_images_of_the_same_name_are_not_shared(results, checkpoint, tmp_path, counted):
    (tmp_path / "changed").mkdir()
    changed = tiny.write_pictures(tmp_path / "changed" / "squares.npz", 7, seed=9)
    reconstruct(tmp_path / "second", checkpoint, {"pos": changed})
    assert len(counted) == 2


def test_the_out_of_domain_side_may_come_later(made, checkpoint, sources, tmp_path, counted, capsys):
    folder = reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"]})
    assert not (folder / "neg").exists()
    assert "next: python detect.py" not in capsys.readouterr().out
    with pytest.raises(UserError, match="holds the in-domain side only"):
        detection.detect(folder, ["MSE"])
    counted.clear()
    reconstruct(tmp_path / "run", checkpoint, sources)
    assert [name for name, _ in counted] == ["noise", "noise"]
    assert tiny.same(tensors(folder), tensors(made))
    assert f"next: python detect.py --result_path {folder} --reps 2" in capsys.readouterr().out
    before = tiny.snapshot(folder)
    reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"]})  # nor does it go again
    assert tiny.snapshot(folder) == before


# ------------------------------------------------------------------------------------------------ sources of images


def test_max_images_takes_evenly_spread_ones(made, checkpoint, sources, tmp_path):
    folder = reconstruct(tmp_path / "run", checkpoint, sources, max_images=2)
    for side, rows in {"pos": [0, 3], "neg": [0, 2]}.items():  # of 7 and of 5, in first batches of 4
        for mine, theirs in zip(load(folder, side), load(made, side), strict=True):
            batch = theirs[rows] if theirs.ndim == 4 else theirs[:, rows]
            torch.testing.assert_close(mine, batch, rtol=0, atol=1e-5)


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of several sizes and modes, two of which cannot be used, and a list of them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for name, size, mode in (("a", (20, 30), "RGB"), ("c", (9, 8), "L"), ("d", (40, 17), "CMYK"), ("f", (8, 8), "RGB")):
        bands = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
        values = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8).squeeze()
        Image.fromarray(values, mode).save(folder / f"{name}.{'tif' if mode == 'CMYK' else 'png'}")
    (folder / "b.png").write_text("no picture")
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:100])
    names = ["a.png", "b.png", "c.png", "missing.png", "d.tif", "f.png"]
    (folder / "list.txt").write_text("\n".join(names))
    return folder


@pytest.mark.parametrize("source", ["pictures", "pictures/list.txt"])
def test_pictures_in_a_folder_or_a_list(source, pictures, checkpoint, sources, tmp_path, capsys):
    """Unusable ones are named and left out; the others are numbered among themselves."""
    folder = reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"], "neg": tmp_path / source})
    orig, _, rebuilt = load(folder, "neg")
    assert orig.shape == (4, 1, SIZE, SIZE)
    assert rebuilt.shape == (2, 4, 1, SIZE, SIZE)
    unusable = ["b.png", "missing.png"] if source.endswith("txt") else ["b.png", "e.png"]
    entry = ResultsFolder(folder).manifest()["sides"]["neg"]
    assert [path for path, _ in entry["skipped"]] == unusable
    err = capsys.readouterr().err
    assert all(f"{name} is left out" in err for name in unusable)
    (scores,) = detection.detect(folder, ["MSE"], reps=2, plots=False)
    assert scores.tables["neg"]["position"].tolist() == [0, 1, 2, 3]
    with (folder / "scores_MSE.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows if row["side"] == "neg"] == entry["labels"]
    assert {row["file"] for row in rows if row["side"] == "pos"} == {""}  # an array has no names
    assert read_results(folder)["failures"] == {"pos": 0, "neg": 2}
    counted = tiny.snapshot(folder)
    reconstruct(tmp_path / "run", checkpoint, {"pos": sources["pos"], "neg": tmp_path / source})
    assert tiny.snapshot(folder) == counted


def test_an_unusable_picture_changes_nothing_for_the_others(pictures, checkpoint, tmp_path):
    first = load(reconstruct(tmp_path / "first", checkpoint, {"pos": pictures}))
    shutil.copy(pictures / "f.png", pictures / "b.png")
    second = load(reconstruct(tmp_path / "second", checkpoint, {"pos": pictures}))
    torch.testing.assert_close(first[2], second[2][:, [0, 2, 3, 4]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop", [True, False])
def test_crop_or_squeeze(crop, pictures, checkpoint, tmp_path):
    folder = reconstruct(tmp_path / "run", checkpoint, {"pos": (str(pictures), crop)})
    form = {"split": "test", "image_size": SIZE, "num_channels": 1, "center_crop": crop}
    expected = datasets.load(pictures, **form).read(0, 4)
    assert torch.equal(load(folder)[0], expected / 255)
    assert ResultsFolder(folder).manifest()["sides"]["pos"]["center_crop"] == crop


# ------------------------------------------------------------------------------------------------------- the masks


def masks_of(folder, side="pos"):
    """The masks seen in the masked images (which have no black pixels): a tensor (N, R, S, S)."""
    orig, masked, _ = load(folder, side)
    assert (orig > 0).all()
    return (masked > 0).transpose(0, 1)[:, :, 0].float()


@pytest.fixture
def bright(tmp_path):
    """Five images without black pixels."""
    np.savez(tmp_path / "bright.npz", images=tiny.pictures(5) // 2 + 50)
    return {"pos": tmp_path / "bright.npz"}


@pytest.mark.parametrize("kind", ["center", "checkerboard", "checkerboard_alt"])
def test_fixed_masks(kind, bright, checkpoint, tmp_path):
    seen = masks_of(reconstruct(tmp_path / "run", checkpoint, bright, mask=MaskOptions(kind, num_blocks=2), reps=3))
    expected = torch.cat([masks.make_mask(kind, SIZE, rep, num_blocks=2)[0] for rep in range(3)])  # (R, S, S)
    assert torch.equal(seen, expected.expand(5, 3, SIZE, SIZE))


def test_random_masks_are_new_for_each_batch_and_repetition(bright, checkpoint, tmp_path):
    mask = MaskOptions("random", patch_size=2, ratio=0.5)
    seen = masks_of(reconstruct(tmp_path / "run", checkpoint, bright, mask=mask, reps=3))
    assert torch.equal(seen[0].expand(4, -1, -1, -1), seen[:4])  # of one batch
    distinct = torch.cat([seen[0], seen[4]]).flatten(1).unique(dim=0)
    assert len(distinct) == 6
    assert (distinct.sum(dim=1) == SIZE * SIZE / 2).all()
    again = masks_of(reconstruct(tmp_path / "again", checkpoint, bright, mask=mask, reps=3, max_images=4))
    assert torch.equal(again, seen[:4])
    other = masks_of(reconstruct(tmp_path / "other", checkpoint, bright, mask=mask, reps=3, seed=1))
    assert not torch.equal(other, seen)


def test_a_mask_file(bright, checkpoint, tmp_path):
    own = np.eye(SIZE, dtype=np.uint8)
    np.save(tmp_path / "own.npy", own)
    mask = MaskOptions("file", file_path=str(tmp_path / "own.npy"))
    folder = reconstruct(tmp_path / "run", checkpoint, bright, mask=mask)
    assert torch.equal(masks_of(folder), torch.from_numpy(own).float().expand(5, 2, SIZE, SIZE))
    np.save(tmp_path / "own.npy", 1 - own)
    with pytest.raises(UserError, match=r"mask\.content"):
        reconstruct(tmp_path / "run", checkpoint, bright, mask=mask)


@pytest.mark.parametrize("kind", ["center", "checkerboard_alt", "random"])
def test_saved_masks_can_be_read_again(kind, bright, checkpoint, tmp_path):
    mask = MaskOptions(kind, patch_size=2, identifier="tag")
    folder = reconstruct(tmp_path / "run", checkpoint, bright, mask=mask, mask_directory="")
    saved = sorted(path.name for path in (folder / "masks").glob("*.png"))
    batches = ["pos_batch0_", "pos_batch1_"] if kind == "random" else [""]
    assert saved == [f"{mask.name}_{batch}rep{rep}.png" for batch in batches for rep in range(2)]
    seen = masks_of(folder)
    for number, name in enumerate(saved):
        batch, rep = divmod(number, 2)
        assert torch.equal(masks.load_mask_file(folder / "masks" / name, SIZE)[0, 0], seen[4 * batch, rep])
    own = MaskOptions("file", file_path=str(folder / "masks" / saved[1]), identifier="again")
    again = reconstruct(tmp_path / "run", checkpoint, bright, mask=own, reps=1)
    assert torch.equal(masks_of(again)[0, 0], seen[0, 1])


def test_masks_can_be_saved_elsewhere(bright, checkpoint, tmp_path):
    folder = reconstruct(tmp_path / "run", checkpoint, bright, mask_directory=tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").glob("*.png")) == [
        "checkerboard_alt_blocks4_rep0.png", "checkerboard_alt_blocks4_rep1.png",
    ]  # fmt: skip
    assert not (folder / "masks").exists()


# ------------------------------------------------------------------------------------------------------- bad input


def poison(good, bad):
    checkpoint = read_checkpoint(good)
    checkpoint["ema"]["shadow_params"][0].fill_(float("nan"))
    torch.save(checkpoint, bad)


BAD = {
    "checkpoint missing": ({"checkpoint": lambda good, bad: None}, "there is no checkpoint at"),
    "checkpoint truncated": (
        {"checkpoint": lambda good, bad: bad.write_bytes(good.read_bytes()[:3000])},
        "damaged or truncated",
    ),
    "checkpoint with code": (
        {"checkpoint": lambda good, bad: torch.save({"model": torch.nn.Linear(1, 1)}, bad)},
        "holds pickled code",
    ),
    "checkpoint with NaN": ({"checkpoint": poison}, "holds NaN or infinite weights"),
    "another architecture": ({"tree": {"model__nf": 64}}, r"another config \(model\.nf: 32 there, 64 here\)"),
    "another SDE": ({"tree": {"training__sde": "vpsde"}}, "another config .*subvpsde"),
    "data set": ({"pos": "CIFAR11"}, "unknown data set 'CIFAR11'; choose one of: CIFAR10, "),
    "out-of-domain set": ({"neg": "nowhere.txt"}, "unknown data set 'nowhere.txt'"),
    "empty folder": ({"neg": "empty"}, "holds no images"),
    "empty list": ({"neg": "empty.txt"}, "names no images"),
    "nothing usable": (
        {"neg": "useless.txt"},
        "useless.txt was read as a list of image paths, .* the first is 'a.png'",
    ),
    "mask type": ({"mask": MaskOptions("checkers")}, "unknown mask type 'checkers'; choose one of: center, "),
    "blocks": ({"mask": MaskOptions("checkerboard", num_blocks=3)}, "--mask_num_blocks is 3, .*use 2, 4, 8"),
    "patches": ({"mask": MaskOptions("random", patch_size=3)}, "--mask_patch_size is 3"),
    "ratio": ({"mask": MaskOptions("random", ratio=1.5)}, "--mask_ratio is 1.5"),
    "mask file": ({"mask": MaskOptions("file", file_path="nowhere.png")}, "there is no mask file nowhere.png"),
    "no mask file": ({"mask": MaskOptions("file")}, "give one with --mask_file_path"),
    "identifier": ({"mask": MaskOptions(identifier="a/b")}, "leave out slashes"),
    "predictor": ({"tree": {"sampling__predictor": "heun"}}, "unknown predictor"),
    "corrector": ({"tree": {"sampling__corrector": "heun"}}, "unknown corrector"),
    "max_images": ({"options": {"max_images": 0}}, "--max_images 0 must be at least 1"),
    "one side to match": (
        {"options": {"match_resolution": True}, "one_side": True},
        "--match_resolution needs two sides; add --out_of_domain or leave it out",
    ),
    "absent files": (
        {"neg": "FFHQ"},
        r"the test split of FFHQ is not in data: put a \.txt list of image paths at data/",
    ),
    "no category": ({"neg": "LSUN"}, "'LSUN' names no category of LSUN; write LSUN:bedroom"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line_and_writes_nothing(name, checkpoint, sources, tmp_path, monkeypatch, capsys):
    changes, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "useless.txt").write_text("a.png\nb.png\n")
    if "checkpoint" in changes:
        changes["checkpoint"](checkpoint, tmp_path / "bad.pth")
        checkpoint = tmp_path / "bad.pth"
    sources = {side: changes.get(side, source) for side, source in sources.items()}
    if changes.get("one_side"):
        del sources["neg"]
    tree, mask = tiny.config(**changes.get("tree", {})), changes.get("mask")
    with pytest.raises(SystemExit) as exit_:
        guard(lambda _: reconstruct("run", checkpoint, sources, tree, mask, **changes.get("options", {})), None)
    assert exit_.value.code == EXIT_USER_ERROR
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not (tmp_path / "run").exists()


def test_a_full_disk(checkpoint, sources, tmp_path, monkeypatch):
    """The batch that found no room is made again later; those before it stay."""
    writes, flush = [], files.os.fsync

    def fsync(handle):
        writes.append(handle)
        if len(writes) == 3:  # after the manifest and a batch
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(UserError, match=r"cannot write .*pos/batch_1\.pth: No space left on device; free some space"):
        reconstruct(tmp_path / "run", checkpoint, sources)
    assert sorted(path.name for path in (tmp_path / "run" / ALT).rglob("*") if path.is_file()) == [
        ".lift-map-detect", "batch_0.pth", "manifest.json",
    ]  # fmt: skip
    monkeypatch.undo()
    assert len(tensors(reconstruct(tmp_path / "run", checkpoint, sources))) == 4


def test_a_workdir_that_cannot_be_made(checkpoint, sources, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"cannot write to .*: .*a file stands where a folder is needed; choose another path"
    ):
        reconstruct(tmp_path / "file", checkpoint, sources)
