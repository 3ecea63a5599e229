"""Several processes on one job: who computes which examples, and how the parts become one result.

The processes are started by torchrun and run the same program side by side::

    torchrun --nproc-per-node 2 script.py

    with mf.distributed.join():
        run = mf.train("mlp:1024,64", "mnist:3,8", attack="fgsm:eps=16/255", out="runs/fgsm")

Inside the block every process calls the same functions with the same arguments. The examples of each
batch are divided among them; what comes out is the same in all of them, whatever their number, but for
rounding. Files are read and written by the first process alone.

Source: marginflow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from types import FrameType
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # public as torch.distributed's

from marginflow._checks import real
from marginflow.errors import InputError, ProcessLostError

_T = TypeVar("_T")
_P = ParamSpec("_P")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 1.0
"""Seconds that a process waits for the last words of one that is gone."""
_MINUTES = 30.0

_team: ContextVar[Team | None] = ContextVar("team", default=None)


class Team:
    """The processes of one job, seen from one of them.

    Made by :func:`join`.

    Args:
        store: where words are left for the others.

    Attributes:
        rank: the number of this process, 0 … size − 1; 0 is the first, which alone writes.
        size: how many there are.
        local_rank: the number of this process on its machine: of the GPU that it takes.
        agreed: whether some process was asked to stop, as all of them know since the last step.
        lost: whether another process was found to be gone.
    """

    def __init__(self, rank: int, size: int, local_rank: int, store: Store) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.agreed = False
        self.lost = False
        self._store = store
        self._left = False
        self._asked: threading.Event | None = None

    def rows(self, n: int) -> slice:
        """Which of ``n`` examples this process computes; all of them where there are too few to divide.

        Args:
            n: how many examples there are.
        """
        if n < self.size:
            return slice(0, n)
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def counts(self, n: int) -> bool:
        """Whether what this process computed of ``n`` examples enters the sum over processes.

        Args:
            n: how many examples there are.
        """
        return n >= self.size or self.rank == 0

    def gather(self, part: Tensor, n: int) -> Tensor:
        """The values of all ``n`` examples from those of :meth:`rows`, to the bit.

        Args:
            part: values of this process's examples along the first axis, (rows, …).
            n: examples in all.

        Returns:
            (n, …), the same in all processes.

        Raises:
            ProcessLostError: another process is gone.
        """
        if part.dtype == torch.bool:
            return self.gather(part.to(torch.uint8), n).to(torch.bool)
        if n < self.size:
            whole = part.contiguous().clone()
            with self._talking():
                dist.broadcast(whole, 0)
            return whole
        longest = -(-n // self.size)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(found, padded)
        bounds = [n * rank // self.size for rank in range(self.size + 1)]
        return torch.cat(
            [f[: high - low] for f, low, high in zip(found, bounds, bounds[1:], strict=False)]
        )

    def gather_and_ask(self, part: Tensor, n: int) -> Tensor:
        """As :meth:`gather`, with the wish to stop of any process in the same message.

        Args:
            part: values of this process's examples, (rows, D).
            n: examples in all.

        Returns:
            (n, D), the same in all processes.

        Raises:
            ProcessLostError: another process is gone.
        """
        asked = part.new_full((len(part), 1), float(self.asked))
        found = self.gather(torch.cat([part, asked], dim=1), n)
        self.agreed |= bool((found[:, -1] > 0).any())
        return found[:, :-1]

    def collect(self, part: Tensor) -> Tensor:
        """The parts of all processes one after the other, however many rows each has.

        Args:
            part: (rows, …), of one dtype and shape but for the rows.

        Returns:
            (n, …), n the rows of all.

        Raises:
            ProcessLostError: another process is gone.
        """
        lengths = self.each(torch.tensor(len(part), device=part.device)).tolist()
        padded = part.new_zeros((max(lengths), *part.shape[1:]))
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(found, padded)
        return torch.cat([f[:length] for f, length in zip(found, lengths, strict=True)])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes of tensors of one dtype, in one message.

        Args:
            tensors: of the same shapes in all processes.

        Returns:
            new tensors of these shapes.

        Raises:
            ProcessLostError: another process is gone.
        """
        asked = tensors[0].new_tensor([float(self.asked)])
        buffer = torch.cat([asked, *(t.reshape(-1) for t in tensors)])
        with self._talking():
            dist.all_reduce(buffer)
        # Every message of sums carries the wish to stop: all processes see it at the same step.
        self.agreed |= bool(buffer[0] > 0)
        parts = torch.split(buffer[1:], [t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def together(self, function: Callable[[], _T]) -> _T:
        """What ``function`` gives here, unless it raises in some process: then in all of them.

        For work on one's own rows whose errors are caught somewhere, so that nobody waits for the others.

        Args:
            function: without arguments.

        Raises:
            ProcessLostError: another process is gone.
        """
        result, own = None, None
        try:
            result = function()
        except Exception as error:
            own = error
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, None if own is None else _portable(own))
        errors = [error for error in found if error is not None]
        if errors:
            raise own or errors[0]
        return cast(_T, result)

    def each(self, value: Tensor) -> Tensor:
        """The values of every process, in the order of their ranks.

        Args:
            value: (k,) or a scalar; of the same shape in all processes.

        Returns:
            (N, k) or (N,) of N processes, the same in all of them.

        Raises:
            ProcessLostError: another process is gone.
        """
        found = [torch.empty_like(value) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(found, value.contiguous())
        return torch.stack(found)

    def first(self, function: Callable[[], _T]) -> _T:
        """What ``function`` gives or raises in the first process, which alone calls it.

        Args:
            function: without arguments; what it gives must be picklable.

        Raises:
            ProcessLostError: another process is gone.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                with apart():
                    answer[0] = function()
            except Exception as error:
                answer[1] = _portable(error)
        with self._talking():
            dist.broadcast_object_list(answer, 0, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1]
        result: _T = answer[0]
        return result

    def take_over(self, tensors: Sequence[Tensor]) -> None:
        """Give ``tensors`` the values that they have in the first process, in place.

        Args:
            tensors: alike in number and shapes in all processes, of any shape.

        Raises:
            ProcessLostError: another process is gone.
        """
        with torch.no_grad(), self._talking():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, what: str, value: object) -> None:
        """Refuse to go on where ``value`` is not the same in all processes.

        Args:
            what: its name, for the message.
            value: picklable, and comparable by ``==``.

        Raises:
            InputError: it differs; every process raises it.
            ProcessLostError: another process is gone.
        """
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, value)
        other = [rank for rank, one in enumerate(found) if one != found[0]]
        if other:
            here, there = found[0], found[other[0]]
            if isinstance(here, dict) and isinstance(there, dict):
                differing = [k for k in here | there if here.get(k) != there.get(k)]
                here, there = ({k: one.get(k) for k in differing} for one in (here, there))
            raise InputError(
                f"{what}: expected the same in all processes, got {here!r} in process 0 and "
                f"{there!r} in process {other[0]}; every process must call the same functions "
                "with the same arguments"
            )

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked is not None and self._asked.is_set()

    @contextlib.contextmanager
    def watched(self, event: threading.Event) -> Iterator[None]:
        """Inside, ``event`` says whether this process was asked to stop, and ends nothing by itself.

        Args:
            event: set by whoever asks.
        """
        self._asked, self.agreed = event, False
        try:
            yield
        finally:
            self._asked = None

    def leave_word(self, error: BaseException) -> None:
        """Let the others know why this process ends; the first word counts.

        Args:
            error: why this process ends.
        """
        if self._left:
            return
        self._left = True
        with contextlib.suppress(Exception):
            self._store.set(f"end/{self.rank}", str(error) or type(error).__name__)

    def said_by_first(self, error: BaseException) -> bool:
        """Whether the first process ends with the same error, so that once is enough to tell it.

        Args:
            error: why this process ends.
        """
        return self._words(0) == str(error)

    def _words(self, rank: int) -> str | None:
        """Why process ``rank`` ends, if it says so within a second."""
        until = time.monotonic() + _PATIENCE
        with contextlib.suppress(Exception):  # the store may be gone as well
            while not self._store.check([f"end/{rank}"]):
                if time.monotonic() > until:
                    return None
                time.sleep(0.02)
            return bytes(self._store.get(f"end/{rank}")).decode()
        return None

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo raises it as it is, nccl a subclass
            self.lost = True
            raise ProcessLostError(self._loss()) from error

    def _loss(self) -> str:
        """Who is gone, as far as can be told."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        said = {rank: words for rank in others if (words := self._words(rank))}
        # Those who only noticed it as well say so, too.
        causes = {r: w for r, w in said.items() if not w.startswith(_LOST)}
        if causes:
            rank, words = next(iter(causes.items()))
            return f"{_LOST}: process {rank} of {self.size} ended with: {words}"
        silent = [str(rank) for rank in others if rank not in said]
        who = f"process {' or '.join(silent)}" if silent else "one of them"
        return (
            f"{_LOST}: {who} of {self.size} is gone without a word (killed, out of memory, or its "
            "machine is unreachable)"
        )


_LOST = "the processes of this job lost each other"


class RowsGenerator(torch.Generator):
    """A source of random numbers that draws for a whole batch, of which one process takes its rows.

    So that an example's draw does not depend on how many processes there are.

    Attributes:
        rows: which examples of the batch are taken.
        count: examples in the batch.
    """

    rows: slice
    count: int

    @classmethod
    def of(cls, generator: torch.Generator, rows: slice, count: int) -> RowsGenerator:
        """A copy of ``generator`` for the ``rows`` of a batch of ``count`` examples.

        Args:
            generator: the source of the whole batch; it is not changed.
            rows: those of this process.
            count: examples in the batch.
        """
        own = cls(device=generator.device)
        own.set_state(generator.get_state())
        own.rows, own.count = rows, count
        return own


def current() -> Team | None:
    """The processes that work together here; None outside of :func:`join`, and for one process."""
    return _team.get()


def first(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have ``function`` called by the first process alone, with its result or error for all; a decorator.

    Args:
        function: its arguments are those of the first process.
    """

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        team = current()
        if team is None:
            return function(*args, **kwargs)
        return team.first(lambda: function(*args, **kwargs))

    return called


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works by itself: where the others are gone."""
    token = _team.set(None)
    try:
        yield
    finally:
        _team.reset(token)


def alone(what: str, instead: str) -> None:
    """Refuse what several processes cannot share.

    Args:
        what: what works in one process only.
        instead: what to do.

    Raises:
        InputError: there are several.
    """
    if current() is not None:
        raise InputError(f"{what} works in one process; {instead}")


def launched() -> bool:
    """Whether this process is one of several that torchrun, or another launcher, has started.

    Raises:
        InputError: a ``WORLD_SIZE`` that is no number.
    """
    return all(os.environ.get(name) for name in _VARIABLES) and _number("WORLD_SIZE") > 1


def restarted() -> bool:
    """Whether torchrun has started the processes again after a failure (``--max-restarts``)."""
    return launched() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextlib.contextmanager
def join(*, timeout: float = 60 * _MINUTES) -> Iterator[Team | None]:
    """Work on one job together with the other processes that torchrun has started.

    Inside, training (``mf.train``, ``mf.maximize``), measuring (``mf.adversarial_margins``,
    ``mf.certified_margins``, ``mf.Monitor``) and ``mf.kkt_certificate`` divide the examples; minima of
    margins, log-sum-exps and gradients are those of all examples. Every process must call the same
    functions with the same arguments, and gets the same results. SIGTERM is treated as
    Ctrl-C: a training ends after the step, with a checkpoint.

    CPU tensors travel by gloo, CUDA tensors by nccl, from the device ``cuda:LOCAL_RANK``.

    Args:
        timeout: seconds after which a process that does not answer counts as gone.

    Returns:
        a context manager that gives the team; None where there is one process only.

    Raises:
        InputError: a process group exists already; wrong variables in the environment.
        ProcessLostError: the others cannot be reached, or one of them is gone.

    Source: marginflow; the environment is that of ``torch.distributed``'s ``env://``.
    """
    seconds = real("timeout", timeout, above=0.0)
    if not launched():
        yield None
        return
    if current() is not None or dist.is_initialized():
        raise InputError("join: expected to be called once, and before any process group is made")
    team = _gathered(timedelta(seconds=seconds))
    token = _team.set(team)
    try:
        with _terminated(team):
            yield team
            with team._talking():
                dist.barrier()
    except BaseException as error:
        team.leave_word(error)
        raise
    finally:
        _team.reset(token)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _gathered(timeout: timedelta) -> Team:
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise InputError(f"RANK: expected a number below WORLD_SIZE = {size}, got {rank}")
    local = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        store: Store = TCPStore(
            os.environ["MASTER_ADDR"],
            _number("MASTER_PORT"),
            size,
            is_master=rank == 0 and not agent,
            timeout=timeout,
        )
        # After a restart by torchrun the store still has what was said before.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"marginflow/{again}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ProcessLostError(
            f"process {rank} of {size} cannot reach the others: {reason}"
        ) from error
    return Team(rank, size, local, store)


@contextlib.contextmanager
def _terminated(team: Team) -> Iterator[None]:
    """SIGTERM, by which torchrun ends those who are left, lets a checkpoint and an error be finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        if not team.lost:
            raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        # While an error is on its way to its reader, SIGTERM must not cut it short.
        if not team.lost:
            signal.signal(signal.SIGTERM, previous)


def _portable(error: Exception) -> Exception:
    """``error``, or its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(f"{name}: expected a number, got {os.environ[name]!r}") from None
