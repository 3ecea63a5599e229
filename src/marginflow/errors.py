"""The errors that marginflow raises.

Source: marginflow.

MarginflowError
├── InputError                     what the caller gave is wrong (also a ValueError)
│   ├── SpecificationError         an unknown name or a malformed specification string
│   ├── DataError                  data, labels or data files
│   ├── ModelError                 a model that cannot be used as asked
│   │   └── NotHomogeneousError    a network that is not multi-homogeneous
│   └── RunError                   a run directory: taken, damaged, of another model
├── StorageError                   the disk is full, read-only or otherwise refuses (also an OSError)
├── MissingDependencyError         an optional package is not installed (also an ImportError)
├── DivergedError                  training met NaN or infinity (also an ArithmeticError)
├── OutOfMemoryError               the memory does not hold what was asked for (also a MemoryError)
└── ProcessLostError               a process of a data-parallel job is gone (also a ConnectionError)
"""

from __future__ import annotations

from typing import Any


class MarginflowError(Exception):
    """Base of every error that marginflow raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are built again from their args alone, which the subclasses' own arguments
        # are not: one raised in another process would break the pool that brings it here.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[MarginflowError], args: tuple[Any, ...], state: dict[str, Any]
) -> MarginflowError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class InputError(MarginflowError, ValueError):
    """The caller's input is wrong; the message says what was expected and what to do."""


class SpecificationError(InputError):
    """A specification string (``mlp:1024,64``) is malformed or names something unknown."""


class DataError(InputError):
    """Data, labels or a data file cannot be used."""


class ModelError(InputError):
    """The model cannot be used as asked."""


class NotHomogeneousError(ModelError):
    """The network is not multi-homogeneous.

    Args:
        message: what was found, and what to do.

    Attributes:
        offender: name of the parameter or module that breaks homogeneity.
    """

    def __init__(self, message: str, offender: str) -> None:
        super().__init__(message)
        self.offender = offender


class RunError(InputError):
    """A run directory is taken, damaged or belongs to something else."""


class StorageError(MarginflowError, OSError):
    """The file system refused to store a file."""


class MissingDependencyError(MarginflowError, ImportError):
    """An optional package is missing; the message gives the exact install command.

    Args:
        purpose: what needs the package.
        extra: the extra of marginflow that brings it, if one does.
        command: the install command, if it is not pip with the extra or the package.

    Attributes:
        package: the package that is missing.
    """

    def __init__(
        self, package: str, purpose: str, extra: str | None = None, command: str | None = None
    ) -> None:
        target = f"'marginflow[{extra}]'" if extra else package
        how = command or f"pip install {target}"
        super().__init__(f"{purpose} needs the package {package!r}: {how}")
        self.package = package


class DivergedError(MarginflowError, ArithmeticError):
    """Training met NaN or infinity.

    Args:
        message: what was met, and what to do.

    Attributes:
        step: the step (one mini-batch update) at which it was noticed.
        epoch: the epoch of that step, counted from 1.
    """

    def __init__(self, message: str, step: int, epoch: int) -> None:
        super().__init__(message)
        self.step = step
        self.epoch = epoch


class OutOfMemoryError(MarginflowError, MemoryError):
    """The memory, of the machine or of the GPU, does not hold what was asked for.

    Args:
        message: what was done, and the batch size to try.
        batch_size: the batch size to try, if a smaller one helps.
        asked: the bytes that were refused, if they are known.

    Attributes:
        batch_size: the batch size to try, or None.
        asked: the bytes that were refused, or None.
    """

    def __init__(
        self, message: str, batch_size: int | None = None, asked: int | None = None
    ) -> None:
        super().__init__(message)
        self.batch_size = batch_size
        self.asked = asked


class ProcessLostError(MarginflowError, ConnectionError):
    """A process of a data-parallel job is gone, or does not answer."""
