"""What carries out trials: the processes of this machine, or Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Executor(ABC):
    """Carries out tasks, several at a time.

    A task whose process dies is a task that failed: its outcome says so, and the others go on.
    """

    name: str
    """``processes`` or ``ray``."""

    @abstractmethod
    def has_room(self) -> bool:
        """Whether one more task may be started now."""

    @abstractmethod
    def start(self, task: Mapping[str, Any]) -> None:
        """Begin a task; ``task["name"]`` tells its outcome from others."""

    @abstractmethod
    def wait(self) -> list[tuple[str, dict[str, Any]]]:
        """Wait until some tasks have ended; their names and what :func:`attempt` gave."""

    @abstractmethod
    def stop(self) -> None:
        """Let the running tasks write their checkpoints and end."""

    @abstractmethod
    def close(self) -> None:
        """Release everything, at once."""
