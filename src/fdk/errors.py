"""The exceptions fdk raises on purpose. Every message names the tensor, the value and the remedy."""


class FdkError(Exception):
    """Base class of every error that fdk raises on purpose."""


class FormatError(FdkError, ValueError):
    """A format name, a stored tensor or a file does not describe a weight."""


class UnsupportedError(FdkError, RuntimeError):
    """A valid request that the chosen kernel cannot serve; the message says why and what to do."""
