"""Static figures for a paper: one file a panel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marginflow.cli import main
from marginflow.errors import InputError, SpecificationError
from marginflow.report import write_panels
from marginflow.report._panel_files import file_name
from marginflow.runs import Run

MAGIC = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}


@pytest.mark.parametrize("form", MAGIC)
def test_one_file_a_panel(adversarial: Run, tmp_path: Path, form: str) -> None:
    paths = write_panels([adversarial], tmp_path / "new", form)
    assert [path.name for path in paths] == [
        f"normalised-margin.{form}",
        f"adversarial-accuracy.{form}",
        f"clean-accuracy.{form}",
        f"layer-norms.{form}",
        f"loss.{form}",
    ]
    first = paths[0].read_bytes()
    assert first.startswith(MAGIC[form])
    assert write_panels([adversarial], tmp_path / "again", form)[0].read_bytes() == first
    if form == "svg":  # 4.5 inches of 72 points
        assert re.search(rb'<svg[^>]* width="324pt"', first)


def test_refusals(adversarial: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match="did you mean 'pdf'"):
        write_panels([adversarial], tmp_path, "pdff")
    with pytest.raises(InputError, match="at least one run"):
        write_panels([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_files() -> None:
    titles = {
        "γ̂_m near zero": "margin-near-zero",
        "Norm product ρ": "norm-product",
        "Angle of W and ∇L": "angle-of-w-and-gradient",
        "Margin and loss against ln t": "margin-and-loss-against-ln-t",
    }
    assert {title: file_name(title) for title in titles} == titles


def test_the_commands(
    flow_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow, descent = str(flow_folder / "flow"), str(flow_folder / "descent")
    page = tmp_path / "page.html"
    assert main(["report", flow, "--out", str(page), "--format", "svg"]) == 0
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 8
    assert "8 figures lie in" in capsys.readouterr().out
    out = str(tmp_path / "both")
    assert main(["compare", flow, descent, "--format", "png", "--out", out]) == 0
    assert (tmp_path / "both" / "normalised-margin.png").is_file()
    for wrong in (["--out", f"{out}.pdf"], []):
        assert main(["compare", flow, descent, "--format", "pdf", *wrong]) == 2
        assert "--out: expected a folder" in capsys.readouterr().err
    assert main(["report", flow, "--out", str(tmp_path / "n.html"), "--format", "jpg"]) == 2
    assert not (tmp_path / "n.html").exists()
