"""Errors that a user of the library or of the command line can meet and act on."""


class FedBBPTError(Exception):
    """Base of the project's own errors; the command line prints its message as one line."""


class CheckpointError(FedBBPTError):
    """A folder does not hold the weights that a network needs, or they cannot be read."""


class TaskError(FedBBPTError):
    """A task is unknown, or its data cannot give what was asked for."""


class OutputError(FedBBPTError):
    """A folder cannot take the results of a run: it holds another run or cannot be written."""


class ProcessError(FedBBPTError):
    """The processes of one run do not find each other, or do not agree."""


class DeviceMemoryError(FedBBPTError):
    """A device has too little memory for what was asked of it at once."""
