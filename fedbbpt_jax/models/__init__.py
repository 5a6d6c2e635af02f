"""Frozen networks in Flax, one readable file each, and their checkpoints."""

import os

# Only tokenisers, configurations and image processors of transformers are used; its advice to install PyTorch would
# greet every user of a package that needs none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
