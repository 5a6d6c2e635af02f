"""Answers to queries: frozen models behind a wall, and served ones over the wire, each query paid once."""
