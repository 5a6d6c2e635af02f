"""The client's optimizers: ask, tell."""
