"""Random checkpoints in which every part matters, from transformers on torch or without it, and tools to compare.

Not a conftest: pytest knows those by one module name, and other tests import the one of the folder above.

The tolerance: the two frameworks sum in another order. The largest differences measured on these networks are 1.3e-5
on scores of up to 20, and `PARITY` leaves room for other machines. A mistake must be off by more than `DETECTED`. The
smallest one looked for, a tanh for an erf, is off by 5e-4: large weights take activations out of their linear part
(at the usual initialisation it is off by 1e-5 only). Norms and biases leave their neutral values, so that a swapped or
dropped one shows.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from fedbbpt_jax.pretrained import MINI_CLIP

PARITY, DETECTED = 5e-5, 2.5e-4
RANDOM = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 2}
RANDOM |= {"initializer_range": 0.4}
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MERGES = (("Ġ", "g"), ("o", "o"), ("Ġg", "oo"), ("Ġgoo", "d"), ("Ġ", "b"), ("a", "d"), ("Ġb", "ad"))
BPE_VOCABULARY = (*SPECIALS, *"abcdefghijklmnopqrstuvwxyz", "Ġ", *map("".join, MERGES), "<mask>")
WORDPIECE_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "##s")


def save_random(model, folder, *, noise=0.3, **save_options):
    """Returns `model` ready to answer, after adding noise to its norms and biases and saving it in `folder`."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **save_options)
    return model.eval()


def torch_models():
    """Returns transformers with its torch models, seeded, or skips where torch is absent."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return pytest.importorskip("transformers")


def random_network(network, config):
    """Returns structure and random parameters of a network, without torch."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(abstract))
    drawn = {path: np.float32(0.4 * rng.normal(size=leaf.shape)) for path, leaf in flat.items()}
    scales = {path: 1 + value for path, value in drawn.items() if path[-1] == "scale"}
    return graphdef, jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(drawn | scales))


def write_clip_files(folder):
    """Copies the shipped tokenizer and pixel format beside the weights in `folder`."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(MINI_CLIP / name, folder)


def write_pixel_format(folder):
    shutil.copy(MINI_CLIP / "preprocessor_config.json", folder)


def write_bpe(folder):
    """Writes a vocabulary of letters and the words " good" and " bad", in the two files of RoBERTa."""
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(BPE_VOCABULARY)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]) + "\n")


def write_wordpiece(folder):
    """Writes a vocabulary of four words in the one file of BERT."""
    (folder / "vocab.txt").write_text("\n".join(WORDPIECE_VOCABULARY) + "\n")


def edit_config(folder, part=None, **changes):
    """Changes the configuration in `folder`, or the part of one tower."""
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def with_config(folder, copy, part=None, **changes):
    """Returns `copy`, a copy of the checkpoint whose configuration says something else."""
    shutil.copytree(folder, copy)
    edit_config(copy, part, **changes)
    return copy


def answer(ask, loaded, *inputs):
    """Returns `ask(network, *inputs)` in exact float32, as numpy arrays.

    Not compiled as a whole: networks of one size share the compiled operations, however they differ otherwise.
    """
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, ask(nnx.merge(loaded.graphdef, loaded.params), *inputs))


def compiled(ask, loaded, *inputs):
    """Returns the same as `answer`, compiled as a whole: quicker for networks of a size of their own."""
    run = jax.jit(lambda params, *inputs: ask(nnx.merge(loaded.graphdef, params), *inputs))
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(loaded.params, *inputs))


def to_torch(*arrays):
    """Returns torch tensors of numpy arrays, integers as int64."""
    torch = pytest.importorskip("torch")
    return tuple(torch.from_numpy(np.array(x, np.float32 if x.dtype.kind == "f" else np.int64)) for x in arrays)


def channels_first(images):
    """Returns `[B, 3, H, W]` of `[B, H, W, 3]`."""
    return np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))


def difference(ours, theirs) -> float:
    """Returns the largest absolute difference of two arrays of one shape."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def padded_texts(num_texts, length, num_words, *, first, last, pad, lowest, seed=0):
    """Returns ids int32 and attended bool, `[B, T]`, of random texts of falling length between two marks."""
    rng = np.random.default_rng(seed)
    ends = np.maximum(length - 2 * np.arange(num_texts), 4)[:, None]
    attended = np.arange(length) < ends
    ids = rng.integers(lowest, num_words, (num_texts, length))
    ids[:, 0] = first
    ids = np.where(np.arange(length) == ends - 1, last, ids)
    return np.where(attended, ids, pad).astype(np.int32), attended
