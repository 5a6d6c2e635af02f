"""Small tables of texts that say which ones they are, and a tokenizer of whole words."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [*(f"w{i}" for i in range(40)), "It", "was", "good", "bad", ".", "?", ",", "News", ":", "entailment", "[MASK]"]


@functools.cache
def word_tokenizer():
    """Words and punctuation marks are tokens; `<s>` and `</s>` stand around a text, as in RoBERTa."""
    vocabulary = {token: place for place, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[.?,:]"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def phrases(split: str, counts: dict[str, int]) -> dict[str, list[str]]:
    """A table: the text of each row names its split, class and place in it; classes take turns."""
    rows = sorted((i, label) for label, count in counts.items() for i in range(count))
    return {"text": [f"{split} {label} {i}" for i, label in rows], "label": [label for _, label in rows]}


def write_table(path: Path, columns: dict[str, list]) -> Path:
    """Writes the columns as what the file's name says, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(zip(*columns.values(), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [tuple(columns), *rows]), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return path


def write_splits(folder: Path, counts: dict[str, dict[str, int]], suffix: str = ".csv") -> Path:
    """Writes `folder/SPLIT.csv` of `phrases` and returns the folder."""
    for split, classes in counts.items():
        write_table(folder / f"{split}{suffix}", phrases(split, classes))
    return folder
