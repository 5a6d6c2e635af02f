"""The real vocabularies and texts below FEDBBPT_DATA; tests that need them are skipped where they are not there."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer


def real_folder(*parts: str) -> Path:
    folder = Path(os.environ.get("FEDBBPT_DATA", ""), *parts)
    if not os.environ.get("FEDBBPT_DATA") or not folder.is_dir():
        pytest.skip(f"FEDBBPT_DATA names no folder with {'/'.join(parts)}")
    return folder


def real_tokenizer(kind: str):
    return _tokenizer(kind, real_folder("tokenizers", kind))


@functools.cache
def _tokenizer(kind: str, source: Path):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt", "vocab.txt"):
            if (source / name).is_file():
                shutil.copyfile(source / name, Path(folder, name))
        Path(folder, "config.json").write_text(f'{{"model_type": "{kind}"}}')
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # As load_roberta does: the mask takes the space before it.
    tokenizer.add_special_tokens({"mask_token": AddedToken(tokenizer.mask_token, lstrip=True, special=True)})
    return tokenizer
