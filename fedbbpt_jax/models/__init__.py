"""Frozen networks in Flax, one readable file each, and their checkpoints."""
