import numpy as np
import pytest
from synthetic_images import write_folder

from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS, load_digit_task
from fedbbpt_jax.data.image_datasets import IMAGE_TASKS
from fedbbpt_jax.data.images import center_crop
from fedbbpt_jax.data.tasks import descriptions, load_task
from fedbbpt_jax.data.text_datasets import TEXT_TASKS
from fedbbpt_jax.errors import TaskError


@pytest.fixture
def folder(tmp_path):
    classes = {"cat": 5, "dog": 5}
    return write_folder(tmp_path / "my pets", {"train": classes, "test": classes})


def test_descriptions_name_digits_first():
    lines = descriptions()
    assert list(lines) == [*DIGIT_TASKS, *IMAGE_TASKS, *TEXT_TASKS]
    assert all(line and "\n" not in line for line in lines.values())


def test_digits_are_those_of_their_own_loader():
    ours, theirs = load_task("sensor", shots=2, seed=1), load_digit_task("sensor", shots=2, seed=1)
    assert ours._replace(train=None, validation=None, test=None, clean_test_inputs=None) == theirs._replace(
        train=None, validation=None, test=None, clean_test_inputs=None
    )
    assert (ours.train.inputs == theirs.train.inputs).all()
    assert ours.clean_test_inputs is not None
    assert ours.test.inputs.shape == ours.clean_test_inputs.shape


def test_templates_of_digits_can_be_replaced():
    assert load_task("clean", shots=1, templates=["a {}"]).templates == ("a {}",)


def test_a_folder_without_a_name_names_its_task(folder):
    task = load_task("", data=str(folder), shots=2, transform=center_crop(16))
    assert (task.name, task.image_size, task.class_names) == ("my pets", 16, ("cat", "dog"))
    assert task.templates == ("a photo of a {}.",)
    assert task.clean_test_inputs is None
    assert load_task("my pets", data=str(folder), shots=2, transform=center_crop(16)).name == "my pets"


def test_a_local_copy_of_a_known_task_has_its_templates(folder):
    task = load_task("oxford_pets", data=str(folder), shots=2, transform=center_crop(16))
    assert (task.name, task.templates) == ("oxford_pets", ("a photo of a {}, a type of pet.",))


@pytest.mark.parametrize(
    ("name", "nearest"), [("sensr", "sensor"), ("Clean", "clean"), ("bias", "biased"), ("eurosatt", "eurosat")]
)
@pytest.mark.parametrize("data", [None, "/elsewhere"])
def test_unknown_task_names_the_nearest(name, nearest, data):
    with pytest.raises(TaskError, match=f"unknown task '{name}'; did you mean '{nearest}'"):
        load_task(name, data=data)


def test_digits_are_painted_at_their_own_size():
    task = load_task("clean", shots=1, transform=center_crop(8))
    assert task.image_size == 32
    assert task.train.inputs.shape == (10, 32, 32, 3)


@pytest.mark.parametrize("option", [{"data": "digits"}, {"revision": "v1"}, {"test_limit": 7}])
def test_digits_take_no_option_of_images(option):
    with pytest.raises(TaskError, match=f"'dark' is made of digits .*takes no {next(iter(option))}"):
        load_task("dark", **option)


def test_options_reach_the_images(folder):
    task = load_task("", data=str(folder), shots=3, seed=1, test_limit=4, templates=["{}!"], transform=center_crop(8))
    assert np.bincount(task.train.labels).tolist() == [3, 3]
    assert len(task.test.labels) == 4
    assert task.templates == ("{}!",)
    assert task.image_size == 8
