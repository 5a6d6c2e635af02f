"""A frozen model behind HTTP: it answers queries, and gives nothing else away."""
