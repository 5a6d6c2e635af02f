"""The variance study as a user runs it: on the quadratic, on the embedded images, with an estimator of one's own."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedbbpt_jax import cli
from fedbbpt_jax.black_box import faults
from fedbbpt_jax.estimators.catalogue import ESTIMATORS
from fedbbpt_jax.estimators.variance import Measurement, draw_trials
from fedbbpt_jax.training import laboratory
from fedbbpt_jax.training.laboratory import SIZES_AROUND, Study, prepare_study, run_study

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ["--task", "quadratic", "--num-directions", "1,4", "--trials", "30", "--quiet"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study of a shipped estimator and of one's own, found in the working directory."""
    folder = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXPERIMENTS)
        names = "spsa,own_estimator:laplace_spsa"
        assert cli.main(["variance", *SMALL, "--estimators", names, "--output-dir", str(folder)]) == 0
    return folder


def test_a_study_leaves_its_files(study):
    assert {file.name for file in study.iterdir()} == {"variance.json", "variance.parquet", "variance.png"}
    with Image.open(study / "variance.png") as figure:
        assert figure.size[0] > 1000


def test_rows_are_estimators_and_numbers_of_directions(study):
    found = json.loads((study / "variance.json").read_text())
    assert [(row["estimator"].split(":")[0], row["num_directions"]) for row in found["rows"]] == [
        ("spsa", 1), ("spsa", 4), ("own_estimator", 1), ("own_estimator", 4)]  # fmt: skip
    assert [row["num_evaluations"] for row in found["rows"]] == [2, 8, 2, 8]
    assert found["num_parameters"] == 64
    for row in found["rows"]:
        assert (row["theory"] is None) == row["estimator"].startswith("own")
        assert {*Measurement._fields, "mse_error", "cosine_error"} <= row.keys()
    assert found["study"]["trials"] == 30


def test_the_sweep_names_a_best_size_for_each(study):
    found = json.loads((study / "variance.json").read_text())
    assert len(found["sweep"]) == 2 * len(SIZES_AROUND)
    sizes = [row["perturbation_size"] for row in found["sweep"]]
    assert found["best_sizes"].keys() == {"spsa", "own_estimator:laplace_spsa"}
    assert all(min(sizes) <= size <= max(sizes) for size in found["best_sizes"].values())


def test_parquet_holds_both_tables(study):
    found = json.loads((study / "variance.json").read_text())
    stored = pq.read_table(study / "variance.parquet").to_pylist()
    assert [row.pop("table") for row in stored] == ["directions"] * 4 + ["sizes"] * 2 * len(SIZES_AROUND)
    assert stored == found["rows"] + found["sweep"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_findings():
    small = Study(task="quadratic", estimators="spsa-hadamard", num_directions="2", trials=10)
    found, again, other = (run_study(s, prepare_study(s)) for s in (small, small, replace(small, seed=1)))
    assert found == again
    assert found.rows != other.rows


BAD = {
    "estimator": (["--estimators", "spas"], "did you mean 'spsa'"),
    "module": (["--estimators", "nothing:at_all"], "cannot import estimator 'nothing:at_all'"),
    "factory": (["--estimators", "json:at_all"], "cannot import estimator 'json:at_all'"),
    "directions": (["--num-directions", "1,x"], "--num-directions"),
    "no directions": (["--num-directions", "0,4"], "--num-directions"),
    "trials": (["--trials", "2"], "--trials"),
    "batch": (["--batch-size", "0"], "--batch-size"),
    "size": (["--perturbation-size", "-1"], "--perturbation-size"),
    "answers": (["--answers", "decimals:x"], "--answers"),
    "noise": (["--answers", "noise:-1"], "--answers"),
    "task": (["--task", "nothing"], "unknown task 'nothing'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["variance", *SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_answers_are_what_they_say(key):
    scores = jax.random.normal(key, (1000,))
    np.testing.assert_allclose(faults.rounded(2)(scores, key), np.round(np.asarray(scores), 2), atol=1e-6)
    assert (np.asarray(faults.exact()(scores, key)) == np.asarray(scores)).all()
    error = np.abs(np.asarray(faults.bfloat16()(scores, key) / scores) - 1)
    assert 2**-12 < error.max() <= 2**-8
    noise = np.asarray(faults.noisy(0.1)(scores, key) - scores)
    assert noise.std() == pytest.approx(0.1, rel=0.1)


@pytest.fixture(scope="module")
def image_landscape():
    return prepare_study(Study(batch_size=4))


@pytest.mark.slow
def test_the_true_gradient_of_the_images_is_that_of_finite_differences(image_landscape, key):
    """Along a direction, over all of one minibatch; float32 losses of size 3 divided by 2c = 0.002 carry 3e-4."""
    trials = draw_trials(image_landscape, key, 8)
    direction = jax.random.normal(key, (8, 8, 3))
    sides = {"picture": jax.numpy.concatenate([s * 1e-3 * jax.numpy.repeat(direction[None], 8, 0) for s in (1, -1)])}
    draws = jax.tree.map(lambda x: jax.numpy.concatenate([x, x]), trials.draws)
    losses = np.asarray(image_landscape.losses(sides, draws, key)[0], np.float64).mean(1)
    slopes = (losses[:8] - losses[8:]) / 2e-3
    np.testing.assert_allclose(slopes, trials.of_batch @ np.asarray(direction).ravel(), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["decimals:2", "bfloat16"])
def test_recommended_size_under_rounded_answers(answers):
    """Within a factor of 2 of the best of a grid that is finer than the one it was found on."""
    study = Study(estimators="spsa", num_directions="1", answers=answers, trials=100)
    landscape = prepare_study(study)
    recommended = run_study(study, landscape).best_sizes["spsa"]
    trials = draw_trials(landscape, jax.random.key(7), 100)
    grid = np.geomspace(2e-4, 1.0, 20)
    build = lambda c: ESTIMATORS["spsa"].build(1, c)  # noqa: E731
    errors = [m.perturbation.value for m in laboratory.measure_sizes(landscape, build, grid, trials)]
    assert 0.5 <= recommended / grid[int(np.argmin(errors))] <= 2
