import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.training.compare import SeedResult, WhiteBox
from fedbbpt_jax.training.experiment import Experiment
from fedbbpt_jax.training.report import (
    format_mean,
    mean_and_error,
    summary_table,
    write_accuracy_figure,
    write_prompt_figure,
)
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.run import NUM_SHOWN, Outcome


@pytest.fixture(scope="module")
def task():
    return load_task("sensor", shots=1)


@pytest.fixture
def make(task):
    """Makes outcomes by hand: validation accuracies in rows of 1,600 requests, a test accuracy, a prompt."""

    def make(accuracies=(0.4, 0.6, 0.8), test_accuracy=0.7, prompts=0.1) -> Outcome:
        rows = [{"num_requests": 1600 * i, "accuracy": a} for i, a in enumerate(accuracies)]
        summary = {"task": "sensor", "zero_shot_accuracy": 0.4, "test_accuracy": test_accuracy}
        summary |= {"num_requests": 4800, "uplink_bytes": 12_345, "wall_seconds": 6.54, "stopped_by": "budget"}
        images = np.broadcast_to(np.float32(prompts), (NUM_SHOWN, 32, 32, 3))
        return Outcome(resolve(Experiment()), task, {}, images, None, rows, summary)

    return make


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def picture(path) -> np.ndarray:
    """Returns a PNG's pixels `[H, W, 3]` and checks that it shows something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return pixels


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5], "50.0"), ([0.90, 0.92], "91.0 ± 1.0"), ([0.2, 0.4, 0.6], "40.0 ± 11.5"), ([1.0, 1.0], "100.0 ± 0.0")],
    ids=len,
)
def test_format_mean(values, expected):
    """Standard errors by hand: 0.2 / √3 = 0.115."""
    assert format_mean(values) == expected


def test_one_value_has_no_error():
    mean, error = mean_and_error([0.3])
    assert mean == 0.3
    assert np.isnan(error)


def test_accuracy_figure_shows_the_accuracies(make, tmp_path):
    for name, accuracies in {"a": (0.4, 0.6), "b": (0.4, 0.6), "c": (0.4, 0.9)}.items():
        write_accuracy_figure(tmp_path / f"{name}.png", [SeedResult({"federated": make(accuracies)}, None)])
    first, again, other = (picture(tmp_path / f"{name}.png") for name in "abc")
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.slow
def test_accuracy_figure_of_seeds_and_variants(make, tmp_path):
    """The last seed was interrupted and has no second variant; the first two have runs of other lengths."""
    results = [
        SeedResult({"federated": make(), "local": make((0.4, 0.5))}, WhiteBox(0.95, 0.94)),
        SeedResult({"federated": make((0.3, 0.7)), "local": make()}, WhiteBox(0.97, 0.95)),
        SeedResult({"federated": make((0.4,))}, None),
    ]
    write_accuracy_figure(tmp_path / "accuracy.png", results)
    write_accuracy_figure(tmp_path / "fewer.png", results[:1])
    with_band, without = (picture(tmp_path / f"{name}.png") for name in ("accuracy", "fewer"))
    assert with_band.shape == without.shape
    assert (with_band != without).any()


def test_accuracy_figure_of_a_run_that_was_interrupted_at_once(make, tmp_path):
    write_accuracy_figure(tmp_path / "accuracy.png", [SeedResult({"federated": make((0.4,))}, None)])
    picture(tmp_path / "accuracy.png")


def test_prompt_figure_shows_the_prompt(make, tmp_path):
    column = np.linspace(-0.3, 0.3, 32).reshape(32, 1, 1)
    for name, prompts in {"none": 0.0, "ramp": column}.items():
        write_prompt_figure(tmp_path / f"{name}.png", make(prompts=prompts))
    none, ramp = (picture(tmp_path / f"{name}.png") for name in ("none", "ramp"))
    assert none.shape == ramp.shape
    assert (none != ramp).any(-1).mean() > 0.05


def test_prompt_figure_shows_clean_received_prompt_and_prompted_images(make, task, tmp_path, monkeypatch):
    """The third row is centred on grey and scaled to the prompt's reach, here 0.4."""
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, image, **options: shown.append(image))
    prompts = np.linspace(-0.2, 0.4, 32, dtype=np.float32).reshape(32, 1, 1)
    write_prompt_figure(tmp_path / "prompt.png", make(prompts=prompts))
    received = task.test.inputs[:NUM_SHOWN]
    whole = np.broadcast_to(prompts, received.shape)
    rows = [task.clean_test_inputs[:NUM_SHOWN], received, 0.5 + whole / 0.8, np.clip(received + whole, 0, 1)]
    np.testing.assert_allclose(shown, np.concatenate(rows), atol=1e-6)  # float32


def table_rows(results) -> list[list[str]]:
    """Returns the words of each line of the table below its header."""
    console = Console(width=120, file=io.StringIO())
    console.print(summary_table(results))
    return [line.split() for line in console.file.getvalue().splitlines()[1:]]


def test_table_of_one_run(make):
    zero_shot, federated = table_rows([SeedResult({"federated": make()}, None)])
    assert zero_shot == ["zero-shot", "40.0"]
    assert federated == ["federated", "70.0", "4,800", "12,345", "6.5"]


def test_table_of_a_comparison(make):
    """(0.6 - 0.4) / 0.5 and (0.8 - 0.4) / 0.5 are 40 and 80 per cent of the white-box gain."""
    results = [SeedResult({"federated": make(test_accuracy=a)}, WhiteBox(0.95, 0.9)) for a in (0.6, 0.8)]
    zero_shot, federated, white_box = map(" ".join, table_rows(results))
    assert zero_shot == "zero-shot 40.0 ± 0.0"
    assert federated == "federated 70.0 ± 10.0 60.0 ± 20.0 4,800 12,345 6.5"
    assert white_box == "white-box 90.0 ± 0.0"


def test_table_of_a_ceiling_that_gains_nothing(make):
    rows = table_rows([SeedResult({"federated": make(test_accuracy=0.4)}, WhiteBox(0.4, 0.4))])
    assert [row[:2] for row in rows] == [["zero-shot", "40.0"], ["federated", "40.0"], ["white-box", "40.0"]]
