"""SIGKILL at random moments: trainings, flows, margin maximisation, sweeps, and the commands that read runs.

After each kill every file of the run is looked at: none may be half-written. A copy of the run, as it was
at the kill, is resumed to its end and compared with the run that was left alone: weights, measurements and
run.json bit by bit. The run itself is resumed too, and killed again, until it ends; some replace an older one
(--force). Part of the kills come from inside, at a call that changes files (before it, in the middle of a
write, behind it); a part hit a new process `python -m marginflow`; the others come at any moment.

A command that reads a run (report, verify, certify, measure) must leave the run as it was, and results of its
own that are whole, old or new; carried out again it gives the very bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _common
import _faults
import torch

DIGITS = ("--data", "digits:3,8", "--threads", "1")
SEPARABLE = ("--data", "separable:n=40,d=10,margin=0.22", "--threads", "1")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PGD = "pgd-linf:eps=0.1,steps=2,step=0.06,random=true"


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that makes a run.

    Attributes:
        words: of the command, without --out.
        share: how many of 200 kills it gets.
        resumable: whether a killed one goes on with --resume, or begins anew with --force.
    """

    words: tuple[str, ...]
    share: int
    resumable: bool = True

    def asked(self, out: Path, *more: str) -> list[str]:
        """The words of the command line."""
        quiet = [] if self.words[0] == "demo" else ["--quiet"]
        return [*self.words, "--out", str(out), *quiet, *more]

    def again(self, out: Path) -> list[str]:
        """The words that go on after a kill, as its user would choose them."""
        if self.words[0] == "sweep":
            begun = (out / "sweep.json").exists()
        else:
            begun = any((run / "run.json").exists() for run in _faults.run_folders(out))
        if not begun:
            return self.asked(out)
        return self.asked(out, "--resume" if self.resumable else "--force")


def jobs(folder: Path, *, short: bool) -> dict[str, Job]:
    """What is killed. The sizes make each last a second or two."""
    few = 4 if short else 1

    def train(*words: str, epochs: int, data: tuple[str, ...] = DIGITS) -> tuple[str, ...]:
        return ("train", *data, *words, "--epochs", str(epochs // few))

    wide = ("--model", "mlp:64", "--batch-size", "32")
    plan = folder / "sweep.toml"
    plan.write_text(
        '[sweep]\nname = "faults"\n[options]\ndata = "digits:3,8"\nattack = "fgsm:eps=0.02"\n'
        f'loss = "exponential"\nbatch-size = 32\nepochs = {100 // few}\nmodel = "mlp:32"\nlr = 0.05\n'
        "[grid]\nseed = [0, 1, 2, 3]\n"
    )
    flow = ("flow", *SEPARABLE, "--attack", "exact-linear:p=2,eps=0.05")
    fgsm = ("--attack", "fgsm:eps=0.1")
    found = {
        "train, standard": Job(train(*wide, epochs=300), 20),
        "train, FGSM, float64": Job(train(*wide, *fgsm, "--dtype", "float64", epochs=200), 20),
        "train, PGD, random starts, momentum": Job(
            train(*wide, "--attack", PGD, "--momentum", "0.5", epochs=200), 24
        ),
        "train, FGSM, shrinking": Job(train(*wide, *fgsm, "--shrink", epochs=250), 16),
        "train, trajectory kept, float64": Job(
            train(
                "--model", "deep-linear:8", "--attack", "exact-linear:p=2,eps=0.05", "--lr", "0.5",
                "--dtype", "float64", "--keep-weights", epochs=2000, data=SEPARABLE,
            ),
            16,
        ),
        "train, rate follows the loss": Job(
            train(
                "--model", "mlp:32", *fgsm, "--loss", "exponential", "--lr", "loss-based:a=0.1", epochs=300
            ),
            8,
        ),
        "train, three seeds side by side": Job(
            train("--model", "mlp:20", "--batch-size", "32", *fgsm, "--seeds", "3", epochs=150), 16
        ),
        "flow, stiff": Job((*flow, "--model", "deep-linear:8", "--log-time", "1e4"), 16),
        "flow, steps (FGSM, ReLU)": Job(
            ("flow", *SEPARABLE, "--attack", "fgsm:eps=0.02", "--model", "mlp:8", "--log-time", "8"), 8
        ),
        "maximize, spheres": Job(
            ("maximize", *DIGITS, "--model", "mlp:32", *fgsm, "--epochs", str(80 // few)), 16
        ),
        "maximize, relative": Job(
            (
                "maximize", *DIGITS, "--model", "mlp:32", *fgsm, "--method", "relative",
                "--epochs", str(150 // few),
            ),
            8,
        ),
        "maximize, dual (begins anew)": Job(
            ("maximize", *SEPARABLE, "--model", "deep-linear", "--method", "dual", "--epochs", "100"),
            4,
            resumable=False,
        ),
        "sweep, two processes": Job(
            ("sweep", str(plan), "--executor", "processes", "--jobs", "2"), 8
        ),
    }  # fmt: skip
    return found


READING = {
    "report": (("report", "RUN", "--format", "svg"), 4),
    "verify": (("verify", "RUN"), 4),
    "certify": (("certify", "RUN"), 4),
    "measure --certified": (("measure", "RUN", "--certified", "auto"), 4),
}
"""Commands that leave results in a run, and how many of 200 kills each gets."""

_IMPORTED = (
    "marginflow.workflow", "marginflow.report", "marginflow.theorems.audit", "marginflow.kkt",
    "marginflow.certified", "marginflow.sweeps", "marginflow.cli._train", "marginflow.cli._flow",
    "marginflow.cli._verify", "scipy.integrate", "scipy.optimize", "scipy.linalg", "scipy.sparse",
    "sklearn.datasets", "rich.table", "rich.console", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "jinja2",
)  # fmt: skip


class Killing:
    """The kills of all jobs, in one folder.

    Args:
        folder: for the runs; removed as they are done with.
        rng: every choice is its.
        processes: the share of kills that hit a new process.
    """

    def __init__(self, folder: Path, rng: random.Random, processes: float) -> None:
        self.folder = folder
        self.rng = rng
        self.processes = processes
        self.failures: list[str] = []
        self.log = folder / "log.txt"

    def job(self, name: str, job: Job, kills: int) -> _faults.Row:
        """Kill ``job`` so often, and judge it after each."""
        row = _faults.Row(name)
        whole, cut, copy = (self.folder / n for n in ("whole", "cut", "copy"))
        _remove(whole)
        row.seconds = _faults.carry_out(job.asked(whole), self.log)
        _remove(cut)
        calls = _faults.counted(job.asked(cut), self.log, self.folder / "calls")
        self._compare(row, whole, cut, "left alone twice", chain=True)
        force = False
        while row.kills < kills:
            if not force:
                _remove(cut)
            words = job.asked(cut, "--force") if force else job.asked(cut)
            force, replacing = False, force
            while row.kills < kills:
                code = self._killed(words, row, calls)
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    self._fail(f"{name}: exit code {code} of {' '.join(words)}\n{self._said()}")
                    _remove(cut)
                    break
                row.replaced += replacing
                replacing = False
                self._settle(cut)
                row.fell(_faults.stage(cut))
                self._examine(row, cut)
                _remove(copy)
                if cut.exists():
                    shutil.copytree(cut, copy, symlinks=True)
                where = f"{name}, kill {row.kills}"
                if self._to_the_end(job.again(copy), where):
                    self._compare(row, whole, copy, where)
                words = job.again(cut)
            else:
                break
            self._compare(row, whole, cut, f"{name}, resumed until it ended", chain=True)
            force = self.rng.random() < 0.5
        if cut.exists() and self._to_the_end(job.again(cut), name):
            self._compare(row, whole, cut, f"{name}, resumed until it ended", chain=True)
        return row

    def reading(self, name: str, words: Sequence[str], kills: int) -> _faults.Row:
        """Kill a command that leaves its results in a run."""
        row = _faults.Row(name)
        source, whole, cut = (self.folder / n for n in ("read", "whole", "cut"))
        if not source.exists():
            trained = (
                "train", *SEPARABLE, "--model", "deep-linear:4", "--attack", "exact-linear:p=2,eps=0.05",
                "--lr", "0.5", "--epochs", "200", "--dtype", "float64", "--quiet", "--out", str(source),
            )  # fmt: skip
            _faults.carry_out(trained, self.log)
        _remove(whole)
        shutil.copytree(source, whole)
        _remove(cut)
        shutil.copytree(source, cut)

        def of(run: Path) -> list[str]:
            return [str(run) if word == "RUN" else word for word in words]

        # Pages tell the run's name: what is compared must have the same.
        row.seconds = _faults.carry_out(of(cut), self.log)
        calls = _faults.counted(of(cut), self.log, self.folder / "calls")
        _remove(whole)
        cut.rename(whole)
        while row.kills < kills:
            _remove(cut)
            shutil.copytree(source, cut)
            if self.rng.random() < 0.5:
                _faults.carry_out(of(cut), self.log)  # an older result is there
            code = self._killed(of(cut), row, calls)
            if code == 0:
                continue
            if code != -signal.SIGKILL:
                self._fail(f"{name}: exit code {code}\n{self._said()}")
                break
            row.fell(_faults.stage(cut))
            self._examine(row, cut)
            if self._to_the_end(of(cut), f"{name}, kill {row.kills}"):
                self._compare(row, whole, cut, f"{name}, kill {row.kills}", every=True)
        return row

    def _killed(self, words: Sequence[str], row: _faults.Row, calls: int) -> int:
        """Begin the command and kill it; its exit code, which is 0 where it ended before."""
        chance = self.rng.random()
        if chance < self.processes:
            child = _faults.start_process(words, self.log)
            # A process needs two seconds to begin; it lives about as long as a forked child beyond.
            code = _faults.ended(child, within=2.0 + self.rng.random() * row.seconds)
            if code is None:
                code = _kill(child)
                row.processes += 1
            return code
        if chance < self.processes + 0.45:
            at = 1 + self.rng.randrange(calls)
            if self.rng.random() < 0.3:
                at = 1 + at % 24  # while the directory is made or replaced
            fault = _faults.Fault(at, _faults.kill_here(self.rng))
            code = _faults.ended(_faults.start(words, self.log, fault=fault))
            self.rng.random()  # the child has a copy of the state: go on from another
            row.in_writes += code == -signal.SIGKILL
            return 1 if code is None else code
        child = _faults.start(words, self.log)
        code = _faults.ended(child, within=self.rng.random() * row.seconds)
        return _kill(child) if code is None else code

    def _settle(self, folder: Path) -> None:
        """Wait until the workers that a killed sweep had are gone: they end by themselves."""
        from marginflow.runs import lock_folder

        end = time.monotonic() + 30
        for path in list(folder.rglob(".lock")):
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    lock = lock_folder(path.parent)
                    if lock is not None:
                        lock.close()
                        break
                time.sleep(0.01)
            else:
                self._fail(f"{path}: still locked after 30 s")

    def _to_the_end(self, words: Sequence[str], where: str) -> bool:
        try:
            _faults.carry_out(words, self.log)
        except RuntimeError as error:
            self._fail(f"{where}: cannot be continued: {error}")
            return False
        return True

    def _examine(self, row: _faults.Row, folder: Path) -> None:
        found = _faults.damage(folder)
        row.half += len(found)
        for line in found:
            self._fail(f"{row.name}, kill {row.kills}: {line}")

    def _compare(
        self, row: _faults.Row, whole: Path, other: Path, where: str,
        *, chain: bool = False, every: bool = False,
    ) -> None:  # fmt: skip
        found = _faults.differences(whole, other)
        if every:
            files = [
                sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file())
                for f in (whole, other)
            ]
            found += [f"{a}" for a in set(files[0]) ^ set(files[1])]
            both = set(files[0]) & set(files[1])
            found += [f"{a}" for a in both if (whole / a).read_bytes() != (other / a).read_bytes()]
        for line in found:
            self._fail(f"{where}: differs: {line}")
        if chain:
            row.resumes += not found
        else:
            row.same += not found

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def _fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED {what}", flush=True)


def _kill(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return _faults.ended(child) or 0


def _remove(folder: Path) -> None:
    """Remove a folder in which a worker may still be writing its last file."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def shares(weights: Sequence[int], kills: int) -> list[int]:
    """``kills`` divided as ``weights`` are, at least one each."""
    total, taken, found = sum(weights), 0, []
    for place in range(len(weights)):
        upto = round(kills * sum(weights[: place + 1]) / total)
        found.append(max(1, upto - taken))
        taken = upto
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short", action="store_true", help="24 kills, smaller jobs, no new processes"
    )
    parser.add_argument("--kills", type=int, help="of all jobs together (200; with --short 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="jobs whose name holds one of these"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the runs, which are removed; by default a temporary one",
    )
    asked = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in _THREADS):
        # A process that has threads cannot be forked, and libraries make theirs when they are loaded.
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(_THREADS, "1")
        )
    kills = asked.kills or (24 if asked.short else 200)
    torch.set_num_threads(1)
    for name in _IMPORTED:
        importlib.import_module(name)
    with contextlib.ExitStack() as closing:
        if asked.out is None:
            folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = asked.out.absolute()
            folder.mkdir(parents=True, exist_ok=True)
        return _all(folder, asked, kills)


def _all(folder: Path, asked: argparse.Namespace, kills: int) -> int:
    killing = Killing(folder, random.Random(asked.seed), 0.0 if asked.short else 0.1)
    work: list[tuple[str, int, Callable[[int], _faults.Row]]] = []
    for name, job in jobs(folder, short=asked.short).items():
        work.append((name, job.share, lambda n, a=name, b=job: killing.job(a, b, n)))
    for name, (words, share) in READING.items():
        work.append((name, share, lambda n, a=name, b=words: killing.reading(a, b, n)))
    work = [each for each in work if any(part in each[0] for part in asked.only)]
    if asked.short and asked.only == [""]:
        work = [
            each for each in work if "sweep" not in each[0]
        ]  # its processes need seconds to begin
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores"
    )
    print(
        _common.versions(["marginflow", "torch", "safetensors"], 1), f"seed {asked.seed}", sep="; "
    )
    print(
        "\n| job | s | kills | before run.json | before a checkpoint | later | in a write | new process "
        "| replacing | resumed, same bits | ended after kills, same bits | half-written |"
    )
    print("| -- |" + " --: |" * 11, flush=True)
    began = time.monotonic()
    total = _faults.Row("**all**")
    for (_, _, judge), count in zip(work, shares([each[1] for each in work], kills), strict=True):
        row = judge(count)
        _print(row)
        for field in dataclasses.fields(row):
            if field.name != "name":
                setattr(total, field.name, getattr(total, field.name) + getattr(row, field.name))
    total.seconds = time.monotonic() - began
    _print(total)
    bad = total.same < total.kills or total.half > 0 or bool(killing.failures)
    print(
        f"\n{total.kills} kills in {total.seconds:.0f} s: {total.same} resumed to the same bits, "
        f"{total.half} half-written files, {len(killing.failures)} failures"
    )
    return 1 if bad else 0


def _print(row: _faults.Row) -> None:
    print(
        f"| {row.name} | {row.seconds:.1f} | {row.kills} | {row.before_run} | {row.before_checkpoint} "
        f"| {row.later} | {row.in_writes} | {row.processes} | {row.replaced} | {row.same} | {row.resumes} "
        f"| {row.half} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
