"""The errors that the project raises."""

from torch import Tensor


class ArgumentError(ValueError):
    """An argument has a value that it must not have. The message names the argument, what it must be and what it got.

    The command line shows the message alone, without a traceback.
    """


class CaptureError(RuntimeError):
    """A training step cannot be recorded as a CUDA graph. The message says why.

    With :class:`~lightning_ssesam.SharpnessAwareMixin`, it is the cause of a ``MisconfigurationException``.
    """


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is infinite or not a number.

    Args:
        message: The text of the error.
        loss: The mean loss of the step, a detached scalar.
    """

    def __init__(self, message: str, loss: Tensor) -> None:
        super().__init__(message)
        self.loss = loss


class WorkersLostError(RuntimeError):
    """Processes that train for a comparison were ended from outside, or the cluster that they belong to is gone.

    The runs that are finished are kept. The same command goes on with the others.
    """
