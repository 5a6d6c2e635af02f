"""Experiments: their description, their run, their records and figures."""
