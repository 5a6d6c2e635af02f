import re

import pytest

from fedbbpt_jax.data.image_datasets import (
    AIRCRAFT,
    CALTECH_WORDS,
    EUROSAT_WORDS,
    IMAGE_TASKS,
    first_synonym,
    from_words,
    readable,
    split_camel_case,
    year_first,
)
from fedbbpt_jax.data.image_tasks import check_templates

NAMES = [
    *("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397"),
    *("dtd", "svhn", "eurosat", "resisc45", "clevr", "ucf101", "imagenet"),
]


def test_the_table_has_blackvips_data_sets():
    assert list(IMAGE_TASKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_well_formed(name):
    row = IMAGE_TASKS[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub_id)
    assert check_templates(row.templates) == row.templates
    assert len(set(row.class_names)) == len(row.class_names)


def test_aircraft_are_a_hundred_in_the_order_of_their_list():
    assert len(set(AIRCRAFT)) == 100
    assert list(AIRCRAFT) == sorted(AIRCRAFT)


@pytest.mark.parametrize(
    ("rename", "name", "expected"),
    [
        (readable, "apple_pie", "apple pie"),
        (readable, " 737-800 ", "737-800"),
        (year_first, "AM General Hummer SUV 2000", "2000 AM General Hummer SUV"),
        (year_first, "smart_fortwo", "smart fortwo"),
        (split_camel_case, "ApplyEyeMakeup", "Apply Eye Makeup"),
        (split_camel_case, "YoYo", "Yo Yo"),
        (first_synonym, "tench, Tinca tinca", "tench"),
        (from_words(EUROSAT_WORDS), "AnnualCrop", "Annual Crop Land"),
        (from_words(EUROSAT_WORDS), "SeaLake", "Sea or Lake"),
        (from_words(EUROSAT_WORDS), "Desert_Land", "Desert Land"),
        (from_words(CALTECH_WORDS), "Faces", "face"),
        (from_words(CALTECH_WORDS), "Faces_easy", None),
        (from_words(CALTECH_WORDS), "BACKGROUND_Google", None),
        (from_words(CALTECH_WORDS), "car_side", "car side"),
    ],
)
def test_renaming(rename, name, expected):
    assert rename(name) == expected
