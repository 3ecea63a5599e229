"""A checkpoint that is whole, but of which one part is that of another training, continues none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_runs import check, quiet, signed
from safetensors.torch import load_file, save_file

Copy = Callable[..., Path]


def resumed(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """What resuming the run says, its last checkpoint changed and signed again; empty if it goes on."""
    path = sorted(run.glob("checkpoints/*.safetensors"))[-1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    signed(path.with_suffix(".json"), path)
    ended = quiet("train", "--resume", "--quiet", "--epochs", "42", "--out", run)
    check(ended)
    return ended.err if ended.code else ""


def test_what_is_not_changed_goes_on(copied: Copy) -> None:
    assert resumed(copied("run"), lambda tensors: None) == ""


@pytest.mark.parametrize("kind", [torch.int64, "shape", "gone"])
def test_any_tensor_of_another_kind_is_refused(
    valid: Path, copied: Copy, kind: torch.dtype | str
) -> None:
    names = set(load_file(sorted(valid.glob("train/checkpoints/*.safetensors"))[-1]))
    assert {name.split(".")[0] for name in names} == {"callback", "clock", "model", "random"}
    for place, name in enumerate(sorted(names)):

        def change(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            if kind == "gone":
                del tensors[name]
            elif kind == "shape":
                tensors[name] = torch.cat([tensors[name].flatten()] * 2)
            else:
                assert isinstance(kind, torch.dtype)
                tensors[name] = tensors[name].to(kind)

        said = resumed(copied(f"run-{place}"), change)
        assert said.startswith("error: "), (name, said)
