"""Tasks, and how their examples are split among clients."""
