"""Answers to queries: frozen models behind a wall."""
