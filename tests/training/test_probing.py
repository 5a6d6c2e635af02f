"""The perturbation size that a probe recommends follows the answers' precision; the commands use it."""

import json

import jax
import pytest

from fedbbpt_jax import cli
from fedbbpt_jax.black_box.faults import noisy, rounded
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.prepare import prepare
from fedbbpt_jax.training.probing import LARGEST, SMALLEST, probe_setup, probed
from fedbbpt_jax.types import Response

pytestmark = pytest.mark.slow
TINY = Experiment(num_clients=2, chunk_size=8)


@pytest.fixture(scope="module")
def setup():
    return prepare(TINY)


def answered(setup, change):
    """Returns the setup whose box's answers go through something first."""
    inner, calls = setup.box, iter(range(1_000))

    def box(query):
        response = inner(query)
        return Response(change(response.scores, jax.random.key(next(calls))), response.valid)

    return setup._replace(box=box)


def test_exact_answers_take_a_small_size(setup):
    found = probe_setup(setup)
    assert (found.character.noise, found.character.num_distinct, found.character.unusable) == (0, 1, 0)
    assert found.loss_deviation < 1e-5
    assert SMALLEST <= found.perturbation_size < 0.05
    assert found.num_requests <= 70 * 8


def test_coarser_answers_take_a_larger_size_by_the_cube_root(setup):
    fine, coarse = (probe_setup(answered(setup, rounded(decimals))) for decimals in (4, 2))
    assert (fine.character.quantum, coarse.character.quantum) == (pytest.approx(1e-4), pytest.approx(1e-2))
    ratio = coarse.perturbation_size / fine.perturbation_size
    assert 100 ** (1 / 3) / 2 < ratio < 100 ** (1 / 3) * 2 or coarse.perturbation_size == LARGEST
    assert probe_setup(setup).perturbation_size < fine.perturbation_size


def test_noise_takes_a_larger_size(setup):
    found = probe_setup(answered(setup, noisy(0.1)))
    assert found.character.noise > 0.05
    assert found.perturbation_size > 2 * probe_setup(setup).perturbation_size


def test_a_prompt_for_each_example_is_not_moved():
    with pytest.raises(ValueError, match="--generator coordinator"):
        probed(Experiment(generator="coordinator", chunk_size=8))


def test_the_commands(tmp_path, capsys):
    assert cli.main(["probe", "mini-clip", "sensor", "--num-clients", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert f"--perturbation-size {found['perturbation_size']:.3g}" in err
    options = ["--num-clients", "2", "--num-rounds", "1", "--chunk-size", "8", "--output-dir", str(tmp_path / "run")]
    assert cli.main(["run", "--perturbation-size", "auto", *options]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["perturbation_size"] == pytest.approx(found["perturbation_size"], rel=1e-6)
    assert "by a probe" in capsys.readouterr().err
    assert cli.main(["run", "--perturbation-size", "big", "--output-dir", str(tmp_path / "other")]) == 2
