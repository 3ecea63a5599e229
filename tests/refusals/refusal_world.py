"""The folder in which every refusal is tried: runs of each kind, good files and bad ones.

root/work     the working folder;  root/home     HOME;  root/tmp     TMPDIR
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import marginflow as mf

DATA = "separable:n=8,d=3,margin=0.3"
LONG = "x" * 300


class Own(torch.nn.Module):
    """A network that no string builds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def build(root: Path) -> None:
    """Make the folder; called once, with ``root/work`` as the working folder."""
    for name in ("home", "tmp"):
        (root / name).mkdir()
    data = mf.load(DATA)
    mf.train("deep-linear:2", data, attack="fgm:eps=0.1", epochs=2, out="train", dtype="float32")
    mf.train("mlp:4", data, epochs=1, measure=False, out="unmeasured")
    mf.train_seeds("mlp:2", data, seeds=2, epochs=1, out="seeds")
    mf.gradient_flow("deep-linear:2", data, log_time=1.0, out="flow")
    mf.maximize("mlp:4", data, epochs=1, out="maximize", dtype="float32")
    mf.train(Own(), data, epochs=1, out="own")
    with mf.Monitor(Own(), data, out="monitor") as monitor:
        monitor.measure(0)
    shutil.copytree("train", "with blanks/a run é 😀")
    Path("sweep/trials").mkdir(parents=True)
    Path("sweep/sweep.json").write_text('{"format": 1}')
    _files(data)


def _files(data: mf.Dataset) -> None:
    x, y = data.x.numpy(), data.y.numpy()
    np.savez("good.npz", x=x, y=y)
    np.savez("with blanks/good data.npz", x=x, y=y)
    np.savez("shapes.npz", x=x, y=y[:5])
    np.savez("noy.npz", x=x)
    np.savez("nan.npz", x=np.where(x > 0, np.nan, x), y=y)
    np.savez("labels.npz", x=x, y=y * 3)
    np.savez("regression.npz", x=x, y=x[:, 0])
    np.savez("none.npz", x=x[:0], y=y[:0])
    np.savez("pickled.npz", x=np.array([{}], dtype=object), y=y)
    np.savez("complex.npz", x=x * 1j, y=y)
    np.savez("words.npz", x=np.array([["a", "b"]]), y=y[:1])
    np.savez("flat.npz", x=x[:, 0], y=y)
    np.savez("onehot.npz", x=x, y=np.eye(2)[(y + 1) // 2])
    np.save("deltas.npy", np.zeros((2, 3)))
    np.save("whole.npy", np.zeros((2, 3), dtype=int))
    save_file({"linear1.weight": torch.zeros(1, 3)}, "other.safetensors")
    torch.save(mf.models.mlp(3, 4, 1, seed=0).state_dict(), "with blanks/my weights.pt")
    Path("objects.pt").write_bytes(pickle.dumps({"a": print}))
    Path("text.txt").write_text("hello\n")
    for name in ("empty.npz", "empty.pt", "empty.safetensors", "empty.toml", "empty.npy"):
        Path(name).write_bytes(b"")
    for name in ("text.npz", "text.pt", "text.safetensors", "text.npy"):
        Path(name).write_text("hello\n")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/yours.txt").write_text("mine\n")
    os.mkfifo("pipe")
    os.mkfifo("pipe.npz")
    os.mkfifo("pipe.pt")
    Path("link").symlink_to("empty")
    for name, text in PLANS.items():
        Path(f"{name}.toml").write_text(text)
    Path("latin.toml").write_bytes(b'data = "\xe9"\n')
    Path("ownmodels.py").write_text(OWN_MODELS)


_GRID = f'[options]\ndata = "{DATA}"\nmodel = "mlp:2"\nepochs = 1\n'
PLANS = {
    "plan": _GRID + "[grid]\nlr = [0.1, 0.2]\n",
    "nogrid": _GRID,
    "emptygrid": _GRID + "[grid]\nlr = []\n",
    "wrongname": _GRID + "[grid]\nlearning-rate = [0.1]\n",
    "wrongtable": _GRID + "[gird]\nlr = [0.1]\n",
    "wrongvalue": _GRID + '[grid]\nlr = ["quick"]\n',
    "twice": _GRID + "[grid]\nlr = [0.1, 0.1]\n",
    "wrongjob": '[sweep]\njob = "walk"\n' + _GRID + "[grid]\nlr = [0.1]\n",
    "scalar": "options = 3\n",
    "wrongtype": 'epochs = "3"\n',
    "boolean": "epochs = true\n",
    "unknown": "epoch = 3\n",
    "broken": "epochs =\n",
}
OWN_MODELS = """
import torch
from torch import nn

def nothing(): return None
def raises(): raise ValueError("out of order")
def wants(x): return x
value = 3
def wide(): return nn.Linear(5, 1, bias=False)
def three(): return nn.Linear(3, 3, bias=False)
"""


def listing(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below ``root``: mode, size and the time of its last change."""
    found = {}
    stack = [str(root)]
    while stack:
        folder = stack.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                state = entry.stat(follow_symlinks=False)
                size = 0 if entry.is_dir(follow_symlinks=False) else state.st_size
                found[entry.path] = (state.st_mode, size, state.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
    return found
