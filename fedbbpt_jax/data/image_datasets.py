"""The table of image data sets: BlackVIP's 14, where the hub has them and how their classes are said.

Source: Oh et al., 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning"; templates from its code,
class names from there and from Zhou et al., 2022, "Learning to Prompt for Vision-Language Models" (CoOp). Both have
their own split files; here the splits are those of the hub, so that numbers are near theirs and not the same.

The hub could not be reached when this was written. That each data set has these splits and columns is known from public
code that loads it, unless a comment says otherwise; none of them needs a loading script.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from fedbbpt_jax.data.image_columns import Columns
from fedbbpt_jax.data.image_rows import Splits

Rename = Callable[[str], str | None]
"""A class name of the source to the words in a text; None leaves the class out."""


def readable(name: str) -> str:
    """Returns the name with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


class ImageTask(NamedTuple):
    """A row of the table.

    Attributes:
      description: a line for `fedbbpt list tasks`.
      hub_id: of a data set of the Hugging Face hub.
      templates: texts with one `{}` each.
      splits: which splits play which part, where they are there; None for those called train, validation and test.
      config: the name of the hub's configuration, where it has several.
      columns: which columns to read, where they have to be named.
      class_names: in the order of the labels, for sources whose classes are numbers.
      rename: for sources whose classes have names.
    """

    description: str
    hub_id: str
    templates: tuple[str, ...] = ("a photo of a {}.",)
    splits: Splits | None = None
    config: str | None = None
    columns: Columns = Columns()
    class_names: tuple[str, ...] = ()
    rename: Rename = readable


def from_words(words: dict[str, str | None]) -> Rename:
    """Returns the renaming by a dictionary, whose keys have small letters only; other names are made readable."""

    def rename(name: str) -> str | None:
        return words.get(re.sub("[^a-z]", "", name.lower()), readable(name))

    return rename


def lower_case(name: str) -> str:
    """Returns the readable name in small letters."""
    return readable(name).lower()


def year_first(name: str) -> str:
    """Returns "2012 Audi A5 Coupe" of "Audi A5 Coupe 2012"."""
    return re.sub(r"^(.*) (\d{4})$", r"\2 \1", readable(name))


def split_camel_case(name: str) -> str:
    """Returns "Apply Eye Makeup" of "ApplyEyeMakeup"."""
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", readable(name))


def first_synonym(name: str) -> str:
    """Returns "tench" of "tench, Tinca tinca"."""
    return readable(name.split(",")[0])


CALTECH_WORDS: dict[str, str | None] = {
    "airplanes": "airplane",
    "faces": "face",
    "leopards": "leopard",
    "motorbikes": "motorbike",
    "faceseasy": None,
    "backgroundgoogle": None,
}
EUROSAT_WORDS: dict[str, str | None] = {
    "annualcrop": "Annual Crop Land",
    "forest": "Forest",
    "herbaceousvegetation": "Herbaceous Vegetation Land",
    "highway": "Highway or Road",
    "industrial": "Industrial Buildings",
    "pasture": "Pasture Land",
    "permanentcrop": "Permanent Crop Land",
    "residential": "Residential Buildings",
    "river": "River",
    "sealake": "Sea or Lake",
}
# The 100 variants of Maji et al., 2013, in the order of its variants.txt, which is ASCII's.
_VARIANTS = (
    "707-320|727-200|737-200|737-300|737-400|737-500|737-600|737-700|737-800|737-900|747-100|747-200|747-300|"
    "747-400|757-200|757-300|767-200|767-300|767-400|777-200|777-300|A300B4|A310|A318|A319|A320|A321|A330-200|"
    "A330-300|A340-200|A340-300|A340-500|A340-600|A380|ATR-42|ATR-72|An-12|BAE 146-200|BAE 146-300|BAE-125|"
    "Beechcraft 1900|Boeing 717|C-130|C-47|CRJ-200|CRJ-700|CRJ-900|Cessna 172|Cessna 208|Cessna 525|Cessna 560|"
    "Challenger 600|DC-10|DC-3|DC-6|DC-8|DC-9-30|DH-82|DHC-1|DHC-6|DHC-8-100|DHC-8-300|DR-400|Dornier 328|E-170|"
    "E-190|E-195|EMB-120|ERJ 135|ERJ 145|Embraer Legacy 600|Eurofighter Typhoon|F-16A/B|F/A-18|Falcon 2000|"
    "Falcon 900|Fokker 100|Fokker 50|Fokker 70|Global Express|Gulfstream IV|Gulfstream V|Hawk T1|Il-76|L-1011|"
    "MD-11|MD-80|MD-87|MD-90|Metroliner|Model B200|PA-28|SR-20|Saab 2000|Saab 340|Spitfire|Tornado|Tu-134|Tu-154|"
    "Yak-42"
)
AIRCRAFT = tuple(_VARIANTS.split("|"))

IMAGE_TASKS: dict[str, ImageTask] = {
    "caltech101": ImageTask(
        "objects, 100 classes (one split: 30 % of each class are the test)",
        "flwrlabs/caltech101",
        rename=from_words(CALTECH_WORDS),
    ),
    "oxford_pets": ImageTask(
        "breeds of cats and dogs, 37 classes",
        "timm/oxford-iiit-pet",
        ("a photo of a {}, a type of pet.",),
        columns=Columns(label="label"),
        rename=lower_case,
    ),
    # Not confirmed: that labels carry their names. The copy also has corrupted test splits, which are downloaded.
    "stanford_cars": ImageTask("models of cars, 196 classes", "tanganke/stanford_cars", rename=year_first),
    # 10 training and 10 validation images per class: 16 shots and 4 to validate need both. Not confirmed: the name
    # of the validation split.
    "oxford_flowers": ImageTask(
        "flowers, 102 classes",
        "dpdl-benchmark/oxford_flowers102",
        ("a photo of a {}, a type of flower.",),
        Splits("train+validation", None, "test"),
    ),
    "food101": ImageTask(
        "dishes, 101 classes",
        "ethz/food101",
        ("a photo of {}, a type of food.",),
        Splits("train", None, "validation"),
    ),
    # Not confirmed: the order of its labels, taken to be that of variants.txt.
    "fgvc_aircraft": ImageTask(
        "variants of aircraft, 100 classes",
        "clip-benchmark/wds_fgvc_aircraft",
        ("a photo of a {}, a type of aircraft.",),
        Splits("train", None, "test"),
        columns=Columns(label="cls"),
        class_names=AIRCRAFT,
    ),
    # Not confirmed: that labels carry their names.
    "sun397": ImageTask("scenes, 397 classes", "tanganke/sun397"),
    # Not confirmed: that labels carry their names.
    "dtd": ImageTask("textures, 47 classes", "tanganke/dtd", ("{} texture.",)),
    "svhn": ImageTask(
        "house numbers, 10 classes",
        "ufldl-stanford/svhn",
        ("This is a photo of a {}",),
        Splits("train", None, "test"),
        config="cropped_digits",
        class_names=tuple("0123456789"),
    ),
    "eurosat": ImageTask(
        "land use seen from a satellite, 10 classes",
        "timm/eurosat-rgb",
        ("a centered satellite photo of {}.",),
        rename=from_words(EUROSAT_WORDS),
    ),
    "resisc45": ImageTask("scenes seen from the air, 45 classes", "timm/resisc45", ("This is a photo of a {}",)),
    # Not confirmed: whether labels count from 3 or from 0; there are 8 of them in either case.
    "clevr": ImageTask(
        "how many objects a rendered scene has, 8 classes",
        "dpdl-benchmark/clevr",
        ("This is a photo of {} objects",),
        columns=Columns(label="label_count"),
        class_names=tuple(str(count) for count in range(3, 11)),
    ),
    # Every frame of every video is downloaded; as in CoOp, the middle frame of each is used. Not confirmed: that these
    # two columns and the label name a video.
    "ucf101": ImageTask(
        "actions, the middle frames of videos, 101 classes",
        "flwrlabs/ucf101",
        ("a photo of a person doing {}.",),
        columns=Columns(label="label", clip=("video_id", "clip_id")),
        rename=split_camel_case,
    ),
    # Its test labels are not public. The hub asks for a login and the terms; CoOp's class names are CLIP's.
    "imagenet": ImageTask(
        "objects, 1,000 classes",
        "ILSVRC/imagenet-1k",
        splits=Splits("train", None, "validation"),
        rename=first_synonym,
    ),
}
