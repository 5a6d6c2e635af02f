"""Prompt generators: parameters to prompts."""
