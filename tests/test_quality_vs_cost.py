"""The statistics of benchmarks/quality_vs_cost.py, and its resuming from what it kept."""

import sys

import numpy as np
import pytest
from helpers import ROOT
from sklearn.metrics import roc_auc_score

from basics.console import UserError
from benchmarks import quality_vs_cost as bench


def scores(seed, shift, n=40, m=30):
    """Scores of in-domain images, and of others that are `shift` further away."""
    rng = np.random.default_rng(seed)
    return {"pos": rng.normal(0, 1, n), "neg": rng.normal(shift, 1, m)}


def test_auc_is_that_of_closeness_with_in_domain_as_positive():
    s = scores(0, 1.0)
    closeness = -np.concatenate([s["pos"], s["neg"]])
    assert bench.auc(s) == pytest.approx(roc_auc_score([1] * 40 + [0] * 30, closeness))


def test_paired_bootstrap_is_that_of_resampled_images():
    """Each resample's ROC-AUCs by scikit-learn, on the images drawn with the same generator."""
    a, b = scores(0, 1.0), scores(1, 0.5)
    found = bench.paired_bootstrap(a, b, resamples=50)
    rng = np.random.default_rng(0)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=50) for n in (40, 30)]
    for difference, *drawn in zip(found, *counts, strict=True):
        resampled = [{side: np.repeat(s[side], c) for side, c in zip(s, drawn, strict=True)} for s in (a, b)]
        assert difference == pytest.approx(bench.auc(resampled[0]) - bench.auc(resampled[1]))


def test_comparison_with_the_reference_uses_common_images():
    a, b = scores(0, 1.0), scores(1, 0.5, n=20, m=30)
    row = bench.against(a, b)
    expected = bench.auc({"pos": a["pos"][:20], "neg": a["neg"]}) - bench.auc(b)
    assert row["compared"] == 50
    assert row["difference"] == pytest.approx(expected, abs=1e-4)
    assert row["low"] < row["difference"] < row["high"]
    same = bench.against(a, a)
    assert (same["difference"], same["low"], same["high"], same["rank_correlation"]) == (0, 0, 0, 1)


def test_stopping_early_leaves_what_is_settled():
    """Far images stop after two repetitions, and the order of far and near stays."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(0, 1, (10, 200)), rng.normal(100, 1, (10, 50))
    result = bench.stop_early({"pos": near, "neg": far})
    assert 2 < result["early_reps"] < 10
    assert result["early_auc"] == 1
    assert bench.stop_early({"pos": far, "neg": far})["early_auc"] < 0.9
    assert bench.stop_early({"pos": near[:2], "neg": far[:2]})["early_auc"] is None


def test_every_setting_can_be_run():
    assert min(map(bench.evaluations, bench.SETTINGS)) == 2


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quality_vs_cost", *map(str, arguments)])
    bench.main()


def test_measures_once_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    pair = ["--pair", "demo", "--ckpt_path", "pretrained/fashion_mnist_small.safetensors", "--images", 4]
    pair += ["--in_domain", "demo/fashion_mnist.npz", "--out_of_domain", "demo/mnist.npz", "--folder", tmp_path]
    settings = ["--settings", "ddim_2,ddim_3_replace_0.6-0.1", "--device", "cpu"]
    run(monkeypatch, *pair, *settings)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 4
    assert capsys.readouterr().out.count(" s\n") == 4
    run(monkeypatch, *pair, *settings)
    assert "ddim" not in capsys.readouterr().out
    with np.load(files[0]) as arrays:
        assert arrays["MSE"].shape == arrays["SSIM"].shape == (4, 4)
    run(monkeypatch, "--report", "demo", "--folder", tmp_path, "--reference", "ddim_2")
    table = capsys.readouterr().out
    assert table.count("ddim_3_replace_0.6-0.1") == 6  # 1, 2 and 4 repetitions by two metrics
    header, *rows = (tmp_path / "quality_vs_cost.csv").read_text().splitlines()
    assert header.startswith("pair,metric,setting,reps,evaluations,cpu_seconds,images,auc,compared,difference")
    assert len(rows) == 12
    assert (tmp_path / "quality_vs_cost.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bench, "KEPT", tmp_path / "kept")
    run(monkeypatch, "--report", "demo", "--folder", tmp_path, "--reference", "ddim_2", "--keep")
    kept = bench.read(tmp_path / "elsewhere", "demo", "ddim_2", "SSIM")
    assert str(kept) == str(bench.read(tmp_path, "demo", "ddim_2", "SSIM"))
    (tmp_path / "part" / "demo").mkdir(parents=True)
    assert bench.read(tmp_path / "part", "demo", "ddim_2", "SSIM") is None  # never the kept beside others
    with pytest.raises(UserError, match="holds no scores of the reference 'published_1000'"):
        run(monkeypatch, "--report", "demo", "--folder", tmp_path)
    with pytest.raises(UserError, match="made from something else"):
        run(monkeypatch, *pair, *settings, "--seed", 7)
    with pytest.raises(UserError, match="unknown setting 'ddim_9'"):
        run(monkeypatch, *pair, "--settings", "ddim_9")
