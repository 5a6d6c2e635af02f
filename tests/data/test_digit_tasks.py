import numpy as np
import pytest

from fedbbpt_jax.data import digit_tasks, shifts
from fedbbpt_jax.data.digit_tasks import DIGIT_TASKS, load_digit_task
from fedbbpt_jax.data.digits import DIGIT_WORDS, paint, split_scans
from fedbbpt_jax.errors import TaskError

SHOTS, SEED = 16, 3
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module", params=DIGIT_TASKS)
def task(request):
    return load_digit_task(request.param, shots=SHOTS, seed=SEED)


def same(left, right) -> bool:
    return all((a == b).all() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_shapes_types_and_ranges(task, part):
    inputs, features, labels = getattr(task, part)
    n = len(labels)
    assert inputs.shape == (n, 32, 32, 3)
    assert features.shape == (n, 48)
    assert labels.shape == (n,)
    assert inputs.dtype == features.dtype == np.float32
    assert labels.dtype == np.int32
    assert inputs.min() >= 0
    assert inputs.max() <= 1
    assert np.abs(features).max() <= 0.5


def test_sizes(task):
    assert np.bincount(task.train.labels).tolist() == [SHOTS] * 10
    pool = np.bincount(split_scans().pool.classes)
    assert np.bincount(task.validation.labels).tolist() == np.minimum(24, pool - SHOTS).tolist()
    assert len(task.test.labels) == 1000


def test_names(task):
    assert task.name in DIGIT_TASKS
    assert task.class_names == DIGIT_WORDS
    assert task.templates == ("the digit {}",)
    assert task.feature_size == 48
    assert task.image_size == 32


def test_test_part_is_the_same_for_all_seeds_and_shots(task):
    other = load_digit_task(task.name, shots=4, seed=SEED + 1)
    assert same(task.test, other.test)
    assert (task.clean_test_inputs == other.clean_test_inputs).all()


def test_same_seed_gives_the_same_bits(task):
    again = load_digit_task(task.name, shots=SHOTS, seed=SEED)
    assert all(same(getattr(task, part), getattr(again, part)) for part in PARTS)


@pytest.mark.parametrize("hidden", ["pretrain", "pool", "test"])
def test_each_part_shows_only_its_own_scans(task, hidden, monkeypatch):
    """Scans of the hidden part are not-a-number here: one of them in an image, own or distracting, would show."""
    split = split_scans()
    poison = getattr(split, hidden)._replace(glyphs=np.full_like(getattr(split, hidden).glyphs, np.nan))
    monkeypatch.setattr(digit_tasks, "split_scans", lambda: split._replace(**{hidden: poison}))
    poisoned = load_digit_task(task.name, shots=SHOTS, seed=SEED)
    for part, source in {"train": "pool", "validation": "pool", "test": "test"}.items():
        shown = np.isnan(getattr(poisoned, part).inputs).any((1, 2, 3))
        assert shown.all() if source == hidden else not shown.any()


@pytest.fixture
def draw(monkeypatch):
    """Returns the scans, as bytes, that go into the test, training and validation images of the clean task."""
    painted = []

    def recording(canvas, glyphs, *place):
        painted.append({glyph.tobytes() for glyph in glyphs})
        return paint(canvas, glyphs, *place)

    def draw(shots, seed):
        painted.clear()
        load_digit_task("clean", shots=shots, seed=seed)
        return tuple(painted)

    monkeypatch.setattr(digit_tasks, "paint", recording)
    return draw


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shots", [1, 16, 38])
def test_no_scan_is_in_two_parts(draw, shots, seed):
    test, train, validation = draw(shots, seed)
    assert (len(test), len(train)) == (500, 10 * shots)
    assert len(validation) == sum(min(24, n - shots) for n in np.bincount(split_scans().pool.classes))
    assert not train & validation
    assert not test & (train | validation)


def test_another_seed_draws_other_shots(draw):
    """Of 16 among 40 scans of a class, two random draws share two fifths."""
    first, again, other = (draw(SHOTS, seed)[1] for seed in (3, 3, 4))
    assert first == again
    assert 0.2 < len(first & other) / len(first) < 0.6


def test_background_names_the_label_in_training_and_not_at_test():
    """Nearest mean of the corner's colour; 9 of 10 backgrounds follow the rule, so 0.91 of train is expected."""
    task = load_digit_task("biased", shots=SHOTS, seed=SEED)
    labels = task.train.labels
    corners = {part: getattr(task, part).inputs[:, 0, 0] for part in PARTS}
    centres = np.stack([np.median(corners["train"][labels == label], axis=0) for label in range(10)])

    def accuracy(part: str) -> float:
        distance = np.linalg.norm(corners[part][:, None] - centres, axis=-1)
        return (distance.argmin(-1) == getattr(task, part).labels).mean()

    assert accuracy("train") > 0.8
    assert accuracy("validation") > 0.8
    assert accuracy("test") < 0.1


@pytest.mark.parametrize(
    "shift",
    [
        lambda x: shifts.mix(x, shifts.sensor_pattern(), 0.72),
        lambda x: shifts.mix(x, shifts.block_pattern(), 0.55),
        lambda x: shifts.dark(x, 0.06),
        lambda x: shifts.colour_cast(x, 0.7),
    ],
    ids=["sensor", "blocks", "dark", "cast"],
)
def test_fixed_shifts_treat_each_image_alone(shift):
    images = np.random.default_rng(0).random((4, 32, 32, 3)).astype(np.float32)
    assert (shift(images)[2:] == shift(images[2:])).all()


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_must_be_positive(shots):
    with pytest.raises(TaskError, match=f"at least 1, got {shots}"):
        load_digit_task("clean", shots=shots)


def test_more_shots_than_scans_are_paintings_of_their_own(draw):
    """39 scans of a class is all there are: 31 are painted again and again, 8 are kept for validation."""
    _, train, validation = draw(100, 0)
    assert len(train) == 310
    assert not train & validation
    task = load_digit_task("clean", shots=100, seed=0)
    images = np.asarray(task.train.inputs).reshape(1000, -1)
    assert len(np.unique(images, axis=0)) == 1000
    assert len(task.validation.labels) >= 80
