"""Trials as tasks of Ray, on this machine or on the machines of a cluster."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from marginflow._checks import optional
from marginflow.errors import InputError
from marginflow.sweeps._executor import Executor

_GRACE = 60.0  # seconds for a step and its checkpoint, before a trial is killed
_REPLY = 10.0  # seconds for a cluster to answer
_CARRIED = ("MARGINFLOW_DATA", "MARGINFLOW_ENGINE")
"""Variables that the processes of other machines are given too."""


class RayExecutor(Executor):
    """One task of Ray a trial; Ray decides where and when, by the resources that each needs.

    Ray that runs in this process already is used, and left as it is. Otherwise the cluster at
    ``address`` (or ``RAY_ADDRESS``) is joined, and without an address Ray is started on this machine,
    without its dashboard and without telling anybody of its use.

    Args:
        jobs: trials at a time; None leaves it to Ray.
        cpus: processor cores of a trial.
        gpus: graphics processors of a trial; a part of one is possible.
        address: of a cluster, ``auto`` for the one that this machine belongs to.
        cores: of this machine, that a Ray started here may use.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: no cluster at the address, or none that could ever run a trial.
    """

    name = "ray"

    def __init__(
        self, jobs: int | None, cpus: float, gpus: float, address: str | None, cores: int
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = ray = optional("ray", "ray", "a sweep on Ray", "ray")
        self._own = not ray.is_initialized()
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        if self._own:
            _check_reachable(where)
            settings: dict[str, Any] = {"num_cpus": cores} if where == "local" else {}
            carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
            try:
                ray.init(
                    address=where,
                    include_dashboard=False if where == "local" else None,
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"env_vars": carried} if carried else None,
                    **settings,
                )
            except (
                ConnectionError,
                ValueError,
                RuntimeError,
                ray.exceptions.RayError,
            ) as error:
                raise InputError(
                    f"address: cannot join the Ray cluster at {where!r}: {error}"
                ) from None
        there = ray.cluster_resources()
        for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
            if where == "local" and wanted > there.get(kind, 0):
                self.close()
                raise InputError(
                    f"resources: a trial needs {wanted:g} {kind}, this machine has "
                    f"{there.get(kind, 0):g}; ask for less, or give the address of a cluster"
                )
        self._jobs = jobs
        self._attempt = ray.remote(_attempt).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self._running: dict[Any, str] = {}

    def has_room(self) -> bool:
        """Whether fewer than ``jobs`` trials are with Ray."""
        return self._jobs is None or len(self._running) < self._jobs

    def start(self, task: Mapping[str, Any]) -> None:
        """Hand the task to Ray."""
        self._running[self._attempt.remote(dict(task))] = str(task["name"])

    def wait(self) -> list[tuple[str, dict[str, Any]]]:
        """Wait for one outcome at least."""
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        return [(self._running.pop(ref), self._outcome(ref)) for ref in done]

    def stop(self) -> None:
        """Cancel every task, which interrupts it like Ctrl-C, and wait for it a minute."""
        for ref in self._running:
            self._ray.cancel(ref)
        if self._running:
            waiting = list(self._running)
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE)

    def close(self) -> None:
        """Leave Ray, and end it where it was started here."""
        if self._own:
            with contextlib.suppress(Exception):  # nothing is left that it could spoil
                self._ray.shutdown()

    def _outcome(self, ref: Any) -> dict[str, Any]:
        try:
            return dict(self._ray.get(ref))
        except self._ray.exceptions.RayTaskError as error:
            last = str(error).strip().splitlines()[-1]
            return {"error": f"the trial could not begin: {last}", "trace": str(error)}
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return {"error": f"the process of the trial died ({type(error).__name__}: {first})"}


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would try it for minutes.

    Raises:
        InputError: nobody listens there, or no address.
    """
    if address in ("local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise InputError(f"address: expected auto or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REPLY).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"address: cannot join the Ray cluster at {address!r}: {error}; start it there with ray "
            "start --head"
        ) from None


def _attempt(task: dict[str, Any]) -> dict[str, Any]:
    """What a process of Ray does; torch is loaded there."""
    from marginflow.sweeps._trial import attempt

    return attempt(task)
