import json
import os
import platform
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fedbbpt_jax.data.tasks import load_task
from fedbbpt_jax.errors import OutputError
from fedbbpt_jax.training.build import PromptSizes, build_generator
from fedbbpt_jax.training.compare import SeedResult, WhiteBox
from fedbbpt_jax.training.experiment import Experiment, TextOptions
from fedbbpt_jax.training.records import (
    append_row,
    create_folder,
    read_config,
    summarise,
    write_config,
    write_json,
    write_prompt,
)
from fedbbpt_jax.training.resolve import resolve
from fedbbpt_jax.training.run import Outcome


def outcome(zero_shot=0.4, accuracy=0.7, seed=0) -> Outcome:
    """An outcome of which only the summary counts."""
    summary = {"zero_shot_accuracy": zero_shot, "test_accuracy": accuracy, "num_requests": 1600, "seed": seed}
    return Outcome(*[None] * 6, summary)


def test_new_folder_is_made_with_its_parents(tmp_path):
    create_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_empty_folder_is_taken(tmp_path):
    create_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["summary.json", ".hidden", "folder/summary.json"])
def test_occupied_folder_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=f"{tmp_path} is not empty and may hold another run"):
        create_folder(tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("below", [".", "new", "new/newer"])
def test_file_in_the_way_is_refused_and_left_alone(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path / 'file' / below}: "):
        create_folder(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path}: Permission denied"):
        create_folder(tmp_path)


def test_config_holds_the_experiment_seeds_versions_and_device(tmp_path):
    experiment = resolve(Experiment("blocks", lr=0.25, precision="default", seed=3))
    write_config(tmp_path, experiment, [3, 4], {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert json.loads(json.dumps(asdict(experiment))).items() <= config.items()
    assert config["seeds"] == [3, 4]
    assert config["versions"]["python"] == platform.python_version()
    assert config["versions"]["jax"] == jax.__version__
    assert {"fedbbpt_jax", "jaxlib", "flax", "optax", "transformers", "numpy"} <= config["versions"].keys()
    assert config["device"]["platform"] == jax.default_backend()
    assert config["device"]["count"] == jax.device_count()


def test_what_was_asked_is_read_again(tmp_path):
    """With the chunk size that was found: another would round in another way."""
    text = TextOptions(label_words=(" bad", " good"), replaced=0.5)
    experiment = Experiment(cohort=2, templates=("a {}.", "the {}."), text=text)
    asked = {"experiment": asdict(experiment), "seeds": "0..2", "lr": None, "compare": True}
    write_config(tmp_path, replace(resolve(experiment), chunk_size=48), [0, 1, 2], asked)
    found = read_config(tmp_path)
    assert found == asked | {"experiment": replace(experiment, chunk_size=48)}


def test_rows_are_appended_as_they_come(tmp_path):
    rows = [{"round": 0, "accuracy": 0.5}, {"round": 4, "accuracy": 0.75}]
    for i, row in enumerate(rows):
        append_row(tmp_path, "federated", row)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"run": "federated", **r} for r in rows[: i + 1]]


def test_json_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None, "é"]})
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": [1, None, "é"]}


def test_summary_of_one_run_is_its_own():
    one = outcome()
    assert summarise([SeedResult({"federated": one}, None)]) == one.summary


def test_summary_of_several_seeds_lists_every_figure_by_seed():
    results = [SeedResult({"federated": outcome(accuracy=a, seed=s)}, None) for s, a in [(3, 0.6), (5, 0.7)]]
    figures = {"zero_shot_accuracy": [0.4, 0.4], "test_accuracy": [0.6, 0.7], "num_requests": [1600, 1600]}
    assert summarise(results) == {"runs": {"federated": {**figures, "seed": [3, 5]}}, "white_box": []}


def test_summary_of_a_comparison_adds_the_recovered_share():
    """(0.7 - 0.4) / (0.9 - 0.4) and (0.4 - 0.4) / (0.9 - 0.4)."""
    outcomes = {"federated": outcome(accuracy=0.7), "local": outcome(accuracy=0.4)}
    summary = summarise([SeedResult(outcomes, WhiteBox(0.95, 0.9))])
    assert summary["runs"]["federated"]["recovered"] == [pytest.approx(0.6)]
    assert summary["runs"]["local"]["recovered"] == [0.0]
    assert summary["white_box"] == [{"validation_accuracy": 0.95, "test_accuracy": 0.9}]


def test_a_ceiling_that_gains_nothing_has_no_share():
    """Not-a-number is no JSON, so the share is null."""
    result = SeedResult({"federated": outcome(zero_shot=0.9, accuracy=0.9)}, WhiteBox(0.9, 0.9))
    assert summarise([result, result])["runs"]["federated"]["recovered"] == [None, None]


@pytest.mark.parametrize("name", ["low-resolution", "coordinator"])
def test_prompt_file_holds_parameters_that_make_the_prompts(tmp_path, name):
    task = load_task("sensor", shots=1)
    experiment = resolve(Experiment("sensor", generator=name))
    generator = build_generator(experiment, PromptSizes(task.image_size, task.feature_size))
    keys = iter(jax.random.split(jax.random.key(0), 20))
    params = generator.init(next(keys))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    features = task.test.features[:6]
    prompts = np.broadcast_to(jax.jit(generator.generate)(params, features), (6, 32, 32, 3))
    models = jax.tree.map(lambda x: x[None], params)
    write_prompt(tmp_path, Outcome(experiment, task, models, prompts, None, [], {}))

    stored = load_file(tmp_path / "prompt.safetensors")
    assert (stored.pop("prompt") == prompts).all()
    paths, structure = jax.tree_util.tree_flatten_with_path(models)
    names = ["params." + jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert stored.keys() == set(names)
    read = structure.unflatten([stored[n] for n in names])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), read, models)))
    with safe_open(tmp_path / "prompt.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["fedbbpt_jax"]) == {"generator": name, "task": "sensor"}
