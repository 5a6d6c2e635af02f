import io
import logging
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from synthetic_images import encode, picture, told

from fedbbpt_jax.data import image_hub
from fedbbpt_jax.data.image_hub import read_hub
from fedbbpt_jax.data.image_tasks import load_image_task
from fedbbpt_jax.data.images import center_crop, decode_image
from fedbbpt_jax.errors import TaskError

SPLITS = {"train": 6, "valid": 3, "test": 4, "extra": 2}
BLUE = {"train": "train", "valid": "validation", "test": "test", "extra": ""}


def made(sizes=SPLITS) -> datasets.DatasetDict:
    """As `load_dataset` gives it: two classes, alternating."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["AnnualCrop", "River"])}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": encode(picture(BLUE[split], i % 2, i)), "path": None} for i in range(size)],
                    "label": [i % 2 for i in range(size)],
                },
                features,
            )
            for split, size in sizes.items()
        }
    )


@pytest.fixture
def hub(monkeypatch):
    """Keeps the calls that reach the hub; it answers with `made()`, or raises its error if it is given one."""
    hub = SimpleNamespace(calls=[], error=None)

    def load_dataset(*args, **options):
        hub.calls.append((args, options))
        if hub.error is not None:
            raise hub.error
        return made()

    monkeypatch.setattr(image_hub.datasets, "load_dataset", load_dataset)
    return hub


def test_a_data_set_of_the_hub(hub):
    images = read_hub("someone/fields", "config", "v1")
    assert hub.calls == [(("someone/fields", "config"), {"revision": "v1"})]
    assert images.class_names == ("AnnualCrop", "River")
    assert [len(part.labels) for part in (images.train, images.validation, images.test)] == [6, 3, 4]
    decoded = [np.asarray(decode_image(content, name)) for name, content in images.test.read(np.array([0, 3]))]
    assert told(np.stack(decoded)) == [(30, 0, 0), (30, 1, 3)]


def test_a_row_of_the_table_comes_from_its_hub_id(hub):
    task = load_image_task("eurosat", shots=2, transform=center_crop(8), revision="main")
    assert hub.calls == [(("timm/eurosat-rgb", None), {"revision": "main"})]
    assert task.class_names == ("Annual Crop Land", "River")
    assert task.templates == ("a centered satellite photo of {}.",)
    assert [label for _, label, _ in told(task.train.inputs)] == task.train.labels.tolist()


def test_a_hub_id_names_its_task(hub):
    assert load_image_task("", data="someone/fields", shots=1, transform=center_crop(8)).name == "fields"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'someone/fields' on the Hub\n(OfflineModeIsEnabled)"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'someone/fields' doesn't exist on the Hub"),
        ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
        RuntimeError("Dataset scripts are no longer supported, but found fields.py"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(hub, error):
    hub.error = error
    with pytest.raises(TaskError, match="cannot load 'someone/fields': not a folder here, and the hub could") as caught:
        read_hub("someone/fields")
    message = str(caught.value)
    assert "\n" not in message
    assert " ".join(str(error).split()) in message
    assert "pass a local folder" in message
    assert str(datasets.config.HF_CACHE_HOME) in message


def test_offline_mode_is_honoured(monkeypatch, tmp_path):
    """The real library, told to stay offline, with nothing in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"cannot load 'someone/no-such-fields'.*pass a local folder"):
        read_hub("someone/no-such-fields")


def test_progress_bars_and_log_levels_are_left_as_they_were(hub, caplog):
    for name in ("datasets", "huggingface_hub"):
        caplog.set_level(logging.INFO, logger=name)
    datasets.enable_progress_bars()
    hub.error = OSError("gone")
    with pytest.raises(TaskError):
        read_hub("someone/fields")
    assert [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")] == [logging.INFO] * 2
    assert not datasets.are_progress_bars_disabled()


def test_a_webdataset(monkeypatch, tmp_path):
    """Tar files of N.jpg and N.cls, as the copy of FGVC aircraft, through the real library."""
    for split, size in (("train", 6), ("test", 3)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for i in range(size):
                for suffix, content in (("png", encode(picture(split, i % 3, i))), ("cls", str(i % 3).encode())):
                    entry = tarfile.TarInfo(f"s{i:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    files = {split: str(tmp_path / f"{split}.tar") for split in ("train", "test")}
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(image_hub.datasets, "load_dataset", lambda *_, **__: loaded)
    images = read_hub("someone/wds")
    assert (images.class_names, images.numbered) == (("0", "1", "2"), True)
    decoded = [np.asarray(decode_image(content, name)) for name, content in images.train.read(np.array([2, 4]))]
    assert told(np.stack(decoded)) == [(10, 2, 2), (10, 1, 4)]


def test_images_that_lie_beside_the_table(monkeypatch, tmp_path):
    """A repository of image files gives paths into the cache instead of bytes."""
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "0.png").write_bytes(encode(picture("train", len(label), 0)))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(image_hub.datasets, "load_dataset", lambda *_, **__: loaded)
    images = read_hub("someone/photos")
    assert images.class_names == ("cat", "dog")
    assert told(np.stack([np.asarray(decode_image(c, n)) for n, c in images.train.read(np.array([1]))])) == [(10, 3, 0)]
