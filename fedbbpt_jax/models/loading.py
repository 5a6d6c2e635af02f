"""Pre-trained networks by hub id or folder: structure, weights, and what turns text and pixels into their inputs.

Transformers is imported where it is used: with torch beside it that takes longer than all other imports together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from PIL.Image import Image
from tokenizers import AddedToken

from fedbbpt_jax.errors import CheckpointError
from fedbbpt_jax.models.bert import BERT_DIALECT, BertEncoder
from fedbbpt_jax.models.checkpoint import CONFIG_ERRORS, find_checkpoint, read_config, read_model, unreadable
from fedbbpt_jax.models.clip import CLIP, CLIP_DIALECT
from fedbbpt_jax.models.roberta import ROBERTA_DIALECT, ROBERTA_UNTIED_DIALECT, RobertaForMaskedLM
from fedbbpt_jax.models.vit_mae import VIT_DIALECT, ViTEncoder


class PixelFormat(NamedTuple):
    """What images a network was trained on.

    Attributes:
      size: H = W, pixels.
      mean: of its training images, in [0, 1], float32 `[3]`.
      std: likewise.
    """

    size: int
    mean: np.ndarray
    std: np.ndarray


class PretrainedCLIP(NamedTuple):
    """A CLIP, its tokenizer, its pixels, and the transform of a picture of any size to uint8 `[H, W, 3]`."""

    graphdef: nnx.GraphDef
    params: dict[str, Any]
    tokenizer: Any
    pixels: PixelFormat
    transform: Callable[[Image], np.ndarray]


class PretrainedViT(NamedTuple):
    """A vision transformer and its pixels."""

    graphdef: nnx.GraphDef
    params: dict[str, Any]
    pixels: PixelFormat


class PretrainedText(NamedTuple):
    """A network of texts and its tokenizer."""

    graphdef: nnx.GraphDef
    params: dict[str, Any]
    tokenizer: Any

    @property
    def fills_masks(self) -> bool:
        """Whether it is a masked language model, and not an encoder of sentences."""
        return "lm_head" in self.params

    @property
    def num_positions(self) -> int:
        """The most tokens that it takes, those of a prompt included."""
        network = self.params.get("roberta", self.params)
        num_rows = len(network["embeddings"]["position_embeddings"]["embedding"])
        return num_rows - self.tokenizer.pad_token_id - 1 if self.fills_masks else num_rows  # RoBERTa's begin late


def load_clip(source: str | Path, revision: str | None = None) -> PretrainedCLIP:
    """Returns a CLIP, its weights in float32.

    Args:
      source: a folder in the Hugging Face layout, or a hub id such as "openai/clip-vit-base-patch16".
      revision: branch, tag or commit of the hub.

    Raises:
      CheckpointError: nothing is found, a file is missing or unreadable, it is another kind of model, or tensors are
        missing, unexpected or of another shape (all of them are listed).
    """
    from transformers import CLIPConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = find_checkpoint(source, revision)
    config = read_config(folder, {"clip": CLIPConfig})
    tokenizer, size = _tokenizer(folder), config.vision_config.image_size
    mean, std = _mean_and_std(folder)
    try:
        processor: Any = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except CONFIG_ERRORS as error:
        raise unreadable(folder, error) from error

    def transform(image: Image) -> np.ndarray:
        pixels = processor(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np")
        return pixels["pixel_values"][0].transpose(1, 2, 0)

    graphdef, params = read_model(folder, CLIP, config, CLIP_DIALECT)
    return PretrainedCLIP(graphdef, params, tokenizer, PixelFormat(size, mean, std), transform)


def load_vit(source: str | Path, revision: str | None = None) -> PretrainedViT:
    """Returns the encoder of a ViT-MAE, ViT or DINO checkpoint; arguments and errors as for `load_clip`."""
    from transformers import ViTConfig, ViTMAEConfig

    folder = find_checkpoint(source, revision)
    config = read_config(folder, {"vit_mae": ViTMAEConfig, "vit": ViTConfig})
    pixels = PixelFormat(config.image_size, *_mean_and_std(folder))
    return PretrainedViT(*read_model(folder, ViTEncoder, config, VIT_DIALECT), pixels)


def load_roberta(source: str | Path, revision: str | None = None) -> PretrainedText:
    """Returns a RoBERTa with its masked-language-model head; arguments and errors as for `load_clip`."""
    from transformers import RobertaConfig

    folder = find_checkpoint(source, revision)
    config = read_config(folder, {"roberta": RobertaConfig})
    dialect = ROBERTA_DIALECT if config.tie_word_embeddings else ROBERTA_UNTIED_DIALECT
    tokenizer = _tokenizer(folder)
    if tokenizer.mask_token is None:
        raise CheckpointError(f"the tokenizer in {folder} has no mask token")
    # As in the published tokenizer.json: the mask takes the space before it. Vocabulary and merges do not say so.
    mask = AddedToken(str(tokenizer.mask_token), lstrip=True, special=True)
    tokenizer.add_special_tokens({"mask_token": mask})
    return PretrainedText(*read_model(folder, RobertaForMaskedLM, config, dialect), tokenizer)


def load_bert(source: str | Path, revision: str | None = None) -> PretrainedText:
    """Returns a BERT that embeds sentences, such as all-MiniLM-L6-v2; arguments and errors as for `load_clip`."""
    from transformers import BertConfig

    folder = find_checkpoint(source, revision)
    config = read_config(folder, {"bert": BertConfig})
    tokenizer = _tokenizer(folder)
    return PretrainedText(*read_model(folder, BertEncoder, config, BERT_DIALECT), tokenizer)


def load_text_model(source: str | Path, revision: str | None = None) -> PretrainedText:
    """Returns what `load_roberta` or `load_bert` does, by what the checkpoint says it is; errors as for `load_clip`."""
    from transformers import BertConfig, RobertaConfig

    folder = find_checkpoint(source, revision)
    config = read_config(folder, {"roberta": RobertaConfig, "bert": BertConfig})
    return load_roberta(folder) if config.model_type == "roberta" else load_bert(folder)


def tokenize(tokenizer, texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 ids and a bool mask, both `[B, T]`, padded to the longest text.

    Args:
      tokenizer: of transformers.
      texts: B texts.
      max_length: longer texts lose their end; none is cut if left out.
    """
    encoded = tokenizer(
        list(texts), padding=True, truncation=max_length is not None, max_length=max_length, return_tensors="np"
    )
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(bool)


def _tokenizer(folder: Path) -> Any:
    """Returns the tokenizer stored in `folder`, as one file or as vocabulary and merges."""
    from transformers import AutoTokenizer

    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
    if not any(all((folder / name).is_file() for name in layout) for layout in layouts):
        raise CheckpointError(f"{folder} holds no tokenizer.json, vocab.json with merges.txt, or vocab.txt")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except CONFIG_ERRORS as error:
        raise unreadable(folder, error) from error


def _mean_and_std(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no preprocessor_config.json")
    try:
        stored = json.loads(file.read_text())
        mean, std = (np.asarray(stored[name], np.float32) for name in ("image_mean", "image_std"))
    except CONFIG_ERRORS as error:
        raise unreadable(folder, error) from error
    if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
        raise CheckpointError(f"{file} must give image_mean and image_std of three channels")
    return mean, std
