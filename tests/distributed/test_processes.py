"""Several processes give the numbers of one, whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantities
import torch
from torch import Tensor
from torchrun import torchrun

SCRIPT = Path(quantities.__file__)
DIVIDED = ("gradients", "margins", "certificates", "trainings", "in_float32", "monitored")
Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def alone() -> Results:
    return {part: quantities.PARTS[part]() for part in [*DIVIDED, "in_shards"]}


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    file = tmp_path_factory.mktemp("results") / "results.pt"
    shards = [] if request.param == 3 else ["in_shards"]
    done = torchrun(request.param, SCRIPT, file, ",".join([*DIVIDED, *shards, "refusals"]))
    assert done.returncode == 0, done.stderr
    results: Results = torch.load(file, weights_only=True)
    return results


@pytest.mark.parametrize("part", DIVIDED)
def test_the_numbers_are_those_of_one_process(alone: Results, several: Results, part: str) -> None:
    assert alone[part].keys() == several[part].keys()
    # Rounding, which steps and solvers multiply.
    tolerance = {"trainings": 1e-10, "certificates": 1e-8, "in_float32": 1e-5}.get(part, 1e-12)
    for name, expected in alone[part].items():
        found = several[part][name]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)


def test_attacked_margins_are_those_of_one_process_to_the_bit(
    alone: Results, several: Results
) -> None:
    """Each example's margin is computed by one process; a product with fewer columns may round otherwise."""
    same = [torch.equal(v, several["margins"][k]) for k, v in alone["margins"].items()]
    assert sum(same) > len(same) // 2


def test_what_cannot_be_divided_is_refused(several: Results) -> None:
    said = "\n".join(several["refusals"])
    assert "does not depend on the rest of its batch" in said
    assert "the gradient flow works in one process" in said
    assert "training several seeds works in one process" in said
    assert (
        "the job: expected the same in all processes, got {'seed': 0} in process 0 and {'seed': 1} in"
    ) in said
    assert "cannot write" in said
    assert "expected a power of two that the number of processes divides, got 9" in said
    assert "expected values in the bounds [0, 1], got [0.1, 7]" in said
    assert len(several["refusals"]) == 7


def test_shards_give_the_same_bits_on_any_number_of_processes(
    alone: Results, several: Results
) -> None:
    if "in_shards" not in several:
        pytest.skip("three processes do not divide four shards")
    assert len(alone["in_shards"]) == 4
    for name, expected in alone["in_shards"].items():
        assert torch.equal(several["in_shards"][name], expected), name
