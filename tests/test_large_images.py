"""Sets of image files: CelebA-HQ at 256x256 from list to ROC-AUC, and training by the published configs' names."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from helpers import load_config, read_scores
from PIL import Image

import datasets
from basics.console import UserError
from basics.pixels import crop, resize_bilinear
from lmd import evaluation, training

CONFIG = "configs/ve/celebahq_256_ncsnpp_continuous.py"
SMALL = {"model.nf": 8, "model.num_scales": 2}  # all seven levels, at 1/16 of the width


def picture(seed, size):
    """A smooth RGB picture, width x height."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------ 256x256, end to end

FACES = {"a.jpg": (300, 420), "b.png": (1024, 1024), "c.webp": (256, 256)}  # in-domain: format -> width x height
OTHERS = {"d.bmp": (200, 150), "e.png": (70, 90)}  # out-of-domain: smaller than the model's images


@pytest.fixture(scope="module")
def celebahq(tmp_path_factory):
    """recon.py and detect.py on the lists of two sets under one data root: their outputs and the results folder."""
    root = tmp_path_factory.mktemp("data")
    for name, size in {**FACES, **OTHERS}.items():
        picture(len(name) + size[0], size).save(root / name)
    (root / "cut.jpg").write_bytes((root / "a.jpg").read_bytes()[:2000])
    (root / "CelebAHQ_test.txt").write_text("# faces\na.jpg\ncut.jpg\nb.png\nc.webp\n")
    (root / "other.txt").write_text("\n".join(str(root / name) for name in OTHERS))
    tree = load_config("ve/celebahq_256_ncsnpp_continuous.py")
    tree.update_from_flattened_dict(SMALL)
    checkpoint = tiny.write_checkpoint(root / "random.pth", tree)
    recon = tiny.command(
        "recon.py", "--config", CONFIG, *(f"--config.{name}={value}" for name, value in SMALL.items()),
        "--ckpt_path", checkpoint, "--in_domain", "CelebAHQ", "--out_of_domain", root / "other.txt",
        "--data_root", root, "--batch_size", "2", "--mask_type", "checkerboard_alt", "--mask_num_blocks", "8",
        "--workers", "2", "--match_resolution", "--workdir", root / "results",
    )  # fmt: skip
    results = root / "results" / "checkerboard_alt_blocks8_reps1"
    detect = tiny.command("detect.py", "--result_path", f"{results}/", "--metric", "MSE,SSIM")
    return {"root": root, "recon": recon, "detect": detect, "results": results}


def test_celebahq_reconstruction(celebahq):
    code, out, err = celebahq["recon"]
    assert code == 0, err
    assert "warning: 'CelebAHQ': cut.jpg is left out: image file is truncated" in err
    assert "all images are reduced to 70 pixels first (smallest: in-domain 256, out-of-domain 70)" in out
    sides = json.loads((celebahq["results"] / "manifest.json").read_text())["sides"]
    assert [len(sides[side]["skipped"]) for side in ("pos", "neg")] == [1, 0]
    assert (sides["pos"]["dataset"], sides["pos"]["images"]) == ("CelebAHQ", 3)
    assert sides["pos"]["match_resolution"] == sides["neg"]["match_resolution"] == 70
    orig = []
    for index, count in enumerate([2, 1]):
        batch = torch.load(celebahq["results"] / "pos" / f"batch_{index}.pth", weights_only=True)
        assert batch["recon"][0].shape == batch["orig"].shape == (count, 3, 256, 256)
        assert batch["recon"][0].isfinite().all()
        orig.append(batch["orig"])
    expected = []
    for name in FACES:
        small = torch.from_numpy(np.array(crop(Image.open(celebahq["root"] / name), 70))).permute(2, 0, 1)
        expected.append(resize_bilinear(small[None], 256))
    assert torch.equal(torch.cat(orig), torch.cat(expected) / 255)


def test_celebahq_detection(celebahq):
    code, out, err = celebahq["detect"]
    assert code == 0, err
    assert re.findall(r"^(\w+) ROC AUC: \d\.\d{4}$", out, re.MULTILINE) == ["MSE", "SSIM"]
    scores = read_scores(celebahq["results"] / "scores_MSE.csv")
    assert [len(scores[side]["score"]) for side in ("pos", "neg")] == [3, 2]
    assert scores["pos"]["position"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------ training by the published names

TINY = {
    "data.image_size": 16, "model.nf": 8, "model.ch_mult": (1,), "model.num_res_blocks": 1,
    "model.attn_resolutions": (), "model.num_scales": 3, "training.batch_size": 2, "training.n_iters": 2,
    "training.log_freq": 1, "training.snapshot_freq": 2, "training.snapshot_sampling": False, "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1, "eval.enable_sampling": False,
}  # fmt: skip
PUBLISHED = {
    "ve/celeba_ncsnpp.py": "CelebA",
    "ve/celebahq_256_ncsnpp_continuous.py": "CelebAHQ",
    "ve/ffhq_256_ncsnpp_continuous.py": "FFHQ",
    "ve/church_ncsnpp_continuous.py": "LSUN_church_outdoor",
}


def tiny_tree(path):
    tree = load_config(path)
    tree.update_from_flattened_dict(TINY)
    return tree


@pytest.mark.parametrize("path", PUBLISHED)
def test_training_by_a_published_config(path, memory, tmp_path, capsys):
    """As `main.py --config configs/{path}` does it, with a damaged file among the images."""
    for split in ("train", "test"):
        folder = tmp_path / PUBLISHED[path] / split
        folder.mkdir(parents=True)
        for index in range(4):
            picture(index, (40, 50)).save(folder / f"{index}.jpg")
        (folder / "2a.jpg").write_bytes(b"damaged")
    tree = tiny_tree(path)
    training.train(tree, tmp_path / "run", tiny.CPU, tmp_path)
    warnings = capsys.readouterr().err
    assert "2a.jpg is left out" in warnings
    assert ("the next image stands in for it" in warnings) == (memory == 0)  # nobody decoded them all beforehand
    assert "images left out because they could not be used: 1\n" in (tmp_path / "run" / "stdout.txt").read_text()
    evaluation.evaluate(tree, tmp_path / "run", "eval", tiny.CPU, tmp_path)
    assert "over 4 images; written to" in capsys.readouterr().out  # no image stands in for another in a mean


CALLS = {
    "train": lambda *arguments: training.train(*arguments, tiny.CPU, "root", workers=3),
    "evaluate": lambda *arguments: evaluation.evaluate(*arguments, "eval", tiny.CPU, "root", workers=3),
}


@pytest.mark.parametrize("call", CALLS)
def test_workers_and_category_reach_the_loader(call, tmp_path, monkeypatch):
    def load(source, **options):
        raise UserError(f"{source} {options['category']} {options['workers']} {options['data_root']}")

    monkeypatch.setattr(datasets, "load", load)
    tree = tiny_tree("ve/church_ncsnpp_continuous.py")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint_1.pth").touch()
    monkeypatch.setattr(evaluation, "load_ema_weights", lambda *arguments: 0)
    monkeypatch.setattr(evaluation, "data_of", lambda path: None)
    with pytest.raises(UserError, match=r"^LSUN church_outdoor 3 root$"):
        CALLS[call](tree, tmp_path)


MAIN = """
import command_line, main
from lmd import evaluation, training
training.train = lambda *arguments: print(arguments[3:5])
evaluation.evaluate = lambda *arguments: print(arguments[4:6])
main.define_flags()
command_line.run(main.main)
"""


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_main_hands_its_flags_on(mode):
    flags = [f"--config={CONFIG}", "--workdir=w", f"--mode={mode}", "--data_root=root", "--workers=3", "--device=cpu"]
    code, out, err = tiny.command("-c", MAIN, *flags)
    assert code == 0, err
    assert out == "('root', 3)\n"


def test_training_data_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="the train split of LSUN_church_outdoor is not in"):
        training.train(tiny_tree("ve/church_ncsnpp_continuous.py"), tmp_path / "run", tiny.CPU, tmp_path)
    assert not (tmp_path / "run").exists()
