"""An epoch of the same training in one process and in several (torchrun), and how far the margins come apart.

The jobs are started one after the other as a user starts them, in rounds; each trains some epochs and then
takes the adversarial margins of all its examples. Times are of whole epochs, without starting and measuring.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _common
import torch

import marginflow as mf
from marginflow.training import Callback, Trainer

JOBS = {
    "3-vs-8, 784-1024-64-1": ("mnist:3,8", "mlp:1024,64"),
    "ten digits, 784-1024-64-10": ("mnist", "mlp:1024,64"),
    "ten digits, the paper's CNN": ("mnist", "cnn"),
}
SHORT = {
    "digits, 64-256-32-1": ("digits:3,8", "mlp:256,32"),
    "digits, CNN": ("digits:n=400", "cnn:8,16,hidden=64,kernel=3"),
}
ATTACKS = {"fgsm": "fgsm:eps=16/255", "pgd": "pgd-linf:eps=16/255,steps=5,step=6/255"}


class _Clock(Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self.since = time.perf_counter()

    def on_epoch(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now


def work(asked: argparse.Namespace) -> None:
    """One job, in each of its processes; the first writes what came out."""
    torch.set_num_threads(asked.threads)
    data, model = asked.job
    clock = _Clock()
    with mf.distributed.join() as team:
        run = mf.train(
            model, data, attack=ATTACKS[asked.attack], lr=asked.lr, batch_size=80, epochs=asked.epochs,
            measure=False, shards=asked.shards, callbacks=[clock],
        )  # fmt: skip
        held = run.load_data()
        network = run.load_model()
        began = time.perf_counter()
        found = mf.adversarial_margins(
            network, held.x, held.y, mf.attacks.build(ATTACKS[asked.attack])
        )
        result = {
            "seconds": clock.seconds,
            "measuring": time.perf_counter() - began,
            "accuracy": found.accuracy,
            "min": found.min,
            "normalized_min": found.normalized_min,
        }
        if team is None or team.rank == 0:
            torch.save({**result, "values": found.values}, asked.result)


def started(
    processes: int, job: tuple[str, str], asked: argparse.Namespace, shards: int
) -> dict[str, object]:
    """Start the job and wait for its result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.pt"
        own = [
            __file__, "--worker", "--job", *job, "--result", str(file), "--epochs", str(asked.epochs),
            "--attack", asked.attack, "--threads", str(asked.threads), "--lr", str(asked.lr),
        ]  # fmt: skip
        if shards:
            own += ["--shards", str(shards)]
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command = [sys.executable, *(launcher if processes > 1 else []), *own]
        threads = {"OMP_NUM_THREADS": str(asked.threads)}
        done = subprocess.run(
            command, env=os.environ | threads, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        found: dict[str, object] = torch.load(file, weights_only=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="small jobs, one round")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 2],
        help="how many; the first is compared with",
    )
    parser.add_argument("--shards", type=int, default=0, help="see mf.train; 0: none")
    parser.add_argument("--epochs", type=int, default=1, help="of each job")
    parser.add_argument("--rounds", type=int, default=1, help="turns of all jobs")
    parser.add_argument("--attack", choices=ATTACKS, default="fgsm")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--only", default="", help="jobs whose name holds this")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        asked.shards = asked.shards or None
        work(asked)
        return
    jobs = SHORT if asked.short else JOBS
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(_common.versions(["torch"], asked.threads))
    print(
        f"\n{asked.attack}, batches of 80, {asked.epochs} epoch(s), lr {asked.lr:g}, seed 0, "
        f"{asked.threads} thread(s) a process"
    )
    print(
        "\n| job | processes | s an epoch | ratio | measuring, s | min m | γ̂_m | margins differ by |"
    )
    print("| -- | --: | --: | --: | --: | --: | --: | --: |")
    for name, job in jobs.items():
        if asked.only not in name:
            continue
        found: dict[int, list[dict[str, object]]] = {n: [] for n in asked.processes}
        for _ in range(asked.rounds):
            for processes in asked.processes:
                found[processes].append(started(processes, job, asked, asked.shards))
        first = found[asked.processes[0]]
        for processes, results in found.items():
            seconds = statistics.median(s for r in results for s in r["seconds"])  # type: ignore[attr-defined]
            base = statistics.median(s for r in first for s in r["seconds"])  # type: ignore[attr-defined]
            last, one = results[-1], first[-1]
            apart = float((last["values"] - one["values"]).abs().max())  # type: ignore[operator]
            print(
                f"| {name} | {processes} | {seconds:.2f} | {seconds / base:.2f} | {last['measuring']:.2f} | "
                f"{last['min']:.6g} | {last['normalized_min']:.6g} | {apart:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
