"""Errors that a user of the library or of the command line can meet and act on."""


class FedBBPTError(Exception):
    """Base of the project's own errors; the command line prints its message as one line."""


class CheckpointError(FedBBPTError):
    """A folder does not hold the weights that a network needs, or they cannot be read."""


class CorruptCheckpointError(CheckpointError):
    """What a run had saved was changed since, or is of another run."""


class TaskError(FedBBPTError):
    """A task is unknown, or its data cannot give what was asked for."""


class OutputError(FedBBPTError):
    """A folder cannot take the results of a run: it holds another run or cannot be written."""


class ProcessError(FedBBPTError):
    """The processes of one run do not find each other, or do not agree."""


class ServeError(FedBBPTError):
    """A model cannot be served: packages are missing, or the address is taken."""


class DeviceMemoryError(FedBBPTError):
    """A device has too little memory for what was asked of it at once."""


class ResponseFormatError(FedBBPTError):
    """What came over the wire is not what the protocol says: too short, of another shape, or no numbers."""


class QueryFailedError(FedBBPTError):
    """A served model cannot be asked: it refuses, is not there, or is not the one that is needed."""


class BudgetExceededError(FedBBPTError):
    """The budget does not pay for the next query; it was not sent."""


class ModelDriftError(FedBBPTError):
    """A served model has changed during a run: its answers cannot be compared any more."""


class JournalError(FedBBPTError):
    """A journal of queries is damaged, or is of another run."""


class QuotaError(FedBBPTError):
    """The account at a served model has no money left; asking again costs time and brings nothing."""
