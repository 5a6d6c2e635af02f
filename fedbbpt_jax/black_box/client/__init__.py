"""How a served model is asked: messages, retries, the checks of what comes back."""
