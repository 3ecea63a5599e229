"""The command line, in process: what it prints, its exit codes, what it leaves on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import marginflow as mf
from marginflow.cli import main
from marginflow.cli._tables import print_prose

SMALL = [
    "--data",
    "digits:3,8",
    "--model",
    "mlp:8",
    "--epochs",
    "3",
    "--batch-size",
    "32",
    "--quiet",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, attack in (("fgsm", "fgsm:eps=0.1"), ("standard", "none")):
        code = main(
            [
                "train",
                *SMALL,
                "--attack",
                attack,
                "--measure-with",
                "fgsm:eps=0.1",
                "--out",
                str(root / name),
            ]
        )
        assert code == 0
    return root


def everything(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_train_prints_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--attack", "fgsm:eps=0.1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "3 epochs in" in out
    assert "γ̂_m" in out
    assert f"next: marginflow report {tmp_path / 'run'}" in out


def test_train_names_a_new_run_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert main(["train", *SMALL, "--attack", "fgsm:eps=0.1"]) == 0
        assert (tmp_path / "runs" / f"digits-3-8-fgsm-00{number}" / "run.json").exists()
    capsys.readouterr()


def test_train_reads_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.toml"
    config.write_text(
        'data = "digits:3,8"\nmodel = "mlp:8"\nbatch-size = 32\nepochs = 2\nlr = 0.5\n'
    )
    out = str(tmp_path / "run")
    assert main(["train", "--config", str(config), "--epochs", "1", "--quiet", "--out", out]) == 0
    recorded = mf.load_run(out).config
    assert (recorded["lr"], recorded["batch_size"], recorded["epochs"]) == (0.5, 32, 1)
    capsys.readouterr()

    for content, message in [
        ("epoch = 3", "did you mean 'epochs'"),
        ('epochs = "3"', "wrong type"),
        ("epochs = true", "wrong type"),
        ("epochs =", "no TOML"),
    ]:
        config.write_text(content)
        assert main(["train", *SMALL, "--config", str(config)]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", *SMALL, "--config", str(tmp_path / "none.toml")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_resume_needs_only_the_directory(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", *SMALL, "--attack", "fgsm:eps=0.1", "--out", out]) == 0
    assert main(["train", "--resume", "--out", out, "--epochs", "5", "--quiet"]) == 0
    assert mf.load_run(out).final["epoch"] == 5
    assert main(["train", "--resume", "--out", out, "--lr", "0.7"]) == 2
    assert "other settings (lr: 0.1 there, 0.7 now)" in capsys.readouterr().err


def test_examples_are_left_out_where_asked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", *SMALL, "--shrink", "--out", out]) == 0
    assert mf.load_run(out).config["shrink"] is True
    assert main(["train", "--resume", "--out", out, "--epochs", "5", "--quiet"]) == 0
    assert mf.load_run(out).final["left_out_examples"] == 0
    config = tmp_path / "config.toml"
    config.write_text("shrink = true")
    out = str(tmp_path / "configured")
    assert main(["train", *SMALL, "--config", str(config), "--out", out]) == 0
    assert mf.load_run(out).config["shrink"] is True
    config.write_text("shrink = 1")
    assert main(["train", *SMALL, "--config", str(config), "--out", out]) == 2
    assert "shrink: got 1 of the wrong type" in capsys.readouterr().err


def test_measure_agrees_with_the_recorded_measurement(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", str(runs / "fgsm"), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    final = mf.load_run(runs / "fgsm").final
    for key in ("normalized_margin", "margin", "smoothed_margin", "norm_product", "log_loss"):
        assert result[key] == pytest.approx(final[key], rel=1e-5), key
    assert result["accuracy"] == final["adversarial_accuracy"]

    command = ["measure", str(runs / "fgsm"), "--attack", "none", "--attack", "fgm:eps=0.3"]
    assert main([*command, "--split", "test"]) == 0
    text = capsys.readouterr().out
    assert "fgm:eps=0.3" in text
    assert "test, n = 71" in text


def test_compare_and_report(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(runs / "fgsm"), str(runs / "standard")]
    for name in ("figure.svg", "figure.png", "figure.pdf", "figure.html"):
        assert main(["compare", *pair, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    assert main(["report", *pair, "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "page.html") in out
    assert main(["report", str(runs / "fgsm")]) == 0
    assert (runs / "fgsm" / "report.html").exists()
    assert main(["compare", pair[0]]) == 2
    assert main(["compare", *pair, "--out", str(tmp_path / "figure.docx")]) == 2
    assert not (tmp_path / "figure.docx").exists()


def test_output_fits_eighty_columns(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pair = [str(runs / "fgsm"), str(runs / "standard")]
    assert main(["compare", *pair]) == 0
    table = capsys.readouterr().out.splitlines()[-8:]
    assert max(map(len, table)) <= 80
    assert main(["measure", pair[0], "--attack", "none", "--attack", "fgm:eps=0.3"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


BAD = [
    (["train", "--data", "digit:3,8", "--model", "mlp:8"], "did you mean 'digits'"),
    (["train", "--data", "digits:3,8", "--model", "mpl:8"], "did you mean 'mlp'"),
    (["train", *SMALL, "--attack", "fgsn:eps=0.1"], "did you mean 'fgsm'"),
    (["train", *SMALL, "--loss", "logistic-loss"], "did you mean 'logistic'"),
    (["train", *SMALL, "--attack", "fgsm:eps=-0.1"], "at least 0, got -0.1"),
    (["train", *SMALL, "--attack", "fgsm:eps=nan"], "finite"),
    (["train", *SMALL, "--attack", "fgsm:eps=16"], "16/255"),
    (["train", *SMALL, "--attack", "fgsm:eps=1/0"], "fraction"),
    (["train", *SMALL, "--attack", "fgsm"], "expected eps="),
    (["train", *SMALL, "--attack", "fgsm:0.1"], "write eps=0.1"),
    (["train", *SMALL, "--attack", "fgsm:eps=0.1,bounds=0.2..0.8"], "in the bounds"),
    (["train", *SMALL, "--attack", "pgd-linf:eps=0.1,steps=0"], "steps"),
    (["train", *SMALL, "--attack", "pgd-l3:eps=0.1"], "pgd-l2"),
    (["train", "--data", "digits:3,8,1", "--model", "mlp:8", "--loss", "logistic"], "binary"),
    (["train", "--data", "digits:3,11", "--model", "mlp:8"], "11"),
    (["train", "--data", "digits:3,8", "--model", "mlp:0"], "at least 1"),
    (["train", "--data", "separable:n=9,d=3", "--model", "cnn"], "(channels, height, width)"),
    (["train", *SMALL, "--batch-size", "0"], "batch_size"),
    (["train", *SMALL, "--batch-size", "many"], "--batch-size"),
    (["train", *SMALL, "--lr", "0"], "lr"),
    (["train", *SMALL, "--device", "cuda:99"], "device"),
    (["train", *SMALL, "--threads", "0"], "--threads"),
    (["train", *SMALL, "--resume"], "--resume needs --out"),
    (["train", "--model", "mlp:8"], "--data is missing"),
    (["train", "--data", "digits:3,8"], "--model is missing"),
    (["train", "--data", "mnist:3,8", "--model", "mlp:8", "--data-dir", "/nonexistent"], "data-dir"),
    (["train", "--data", "npz:/nonexistent.npz", "--model", "mlp:8"], "nonexistent"),
    (["measure", "nowhere"], "no run in"),
    (["report", "nowhere"], "no run in"),
    (["compare", "nowhere", "elsewhere"], "no run in"),
    (["trian"], "train"),
    (["train", "--epoch", "3"], "--epoch"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(b[0][-2:]) for b in BAD])
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ")
    assert message in streams.err
    assert "Traceback" not in streams.err
    assert not list(tmp_path.iterdir()), "nothing may be written"


def test_bad_data_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "nan.npz"
    np.savez(bad, x=np.array([[1.0], [np.nan]]), y=np.array([1, -1]))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{"a": 1}], dtype=object), y=np.array([1]))
    wrong = tmp_path / "mnist"
    wrong.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (wrong / f"{name}-ubyte").write_bytes(b"\0\0\0\0")
    before = everything(tmp_path)
    for data, message in [
        (f"npz:{bad}", "NaN"),
        (f"npz:{pickled}", "pickle"),
        ("mnist:3,8", "expected an IDX file"),
    ]:
        out = str(tmp_path / "run")
        arguments = ["train", "--data", data, "--model", "mlp:4", "--data-dir", str(tmp_path)]
        assert main([*arguments, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_an_existing_run_is_kept(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(runs)
    assert main(["train", *SMALL, "--out", str(runs / "fgsm")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert everything(runs) == before


def test_a_checkpoint_of_another_model_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(runs / "fgsm", mixed)
    config = json.loads((mixed / "run.json").read_text())
    config["model"]["widths"][1] = config["model_spec"] = 9
    config["model_spec"] = "mlp:9"
    (mixed / "run.json").write_text(json.dumps(config))
    assert main(["measure", str(mixed)]) == 2
    assert "another model" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(mixed)]) == 2
    assert "another model" in capsys.readouterr().err


def test_divergence_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *SMALL, "--loss", "exponential", "--lr", "1e6", "--epochs", "30"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "diverged at step" in error
    assert "last good checkpoint" in error


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run"])
def test_a_read_only_place(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--out", place]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "flow",
        "maximize",
        "sweep",
        "measure",
        "export",
        "verify",
        "report",
        "compare",
        "demo",
    ],
)
def test_help_shows_a_whole_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: marginflow {command}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\w…", text), "nothing is cut off"


def test_a_sentence_breaks_between_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "γ̂_m = 0.17 under the exact ℓ2 adversary, " * 10
    print_prose(text)
    assert capsys.readouterr().out == f"{text}\n", "piped, it is one line"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_prose(text)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines) == text.strip()


def test_the_front_door_is_light() -> None:
    """Version, misuse and every help load neither numbers nor drawing; rich is for help alone."""
    code = (
        "import sys\n"
        "from marginflow.cli import main\n"
        "from marginflow.cli._app import app\n"
        "codes = [main(words) for words in (['--version'], ['train'], ['tarin'])]\n"
        "rich = 'rich' in sys.modules\n"
        "names = [command.callback.__name__ for command in app.registered_commands]\n"
        "codes += [main([*words, '--help']) for words in ([], *([name] for name in names))]\n"
        "heavy = {'cvxpy', 'jinja2', 'matplotlib', 'numpy', 'pooch', 'scipy', 'sklearn', 'torch'}\n"
        "print('train' in names, codes[:3], set(codes[3:]), rich, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True [0, 2, 2] {0} False set()"
    assert (
        f"marginflow {mf.__version__}"
        in subprocess.run(
            [sys.executable, "-m", "marginflow", "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_a_missing_package_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["train", *SMALL]) == 2
    assert "needs the package 'scikit-learn': pip install scikit-learn" in capsys.readouterr().err


def test_an_epoch_on_the_real_mnist(
    mnist_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference from a plain loop, seed-dependent: after an epoch ρ is 36 … 85, accuracy 0.5 … 0.8."""
    arguments = ["train", "--data", "mnist:3,8", "--model", "mlp:1024,64", "--epochs", "1",
                 "--attack", "fgsm:eps=16/255", "--loss", "logistic", "--lr", "0.1",
                 "--batch-size", "80", "--data-dir", str(mnist_dir), "--quiet"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    run = mf.load_run(tmp_path / "run")
    assert run.config["examples"] == 11_982
    assert run.final["step"] == 150
    assert 30 < run.final["norm_product"] < 95
    assert 0.4 < run.final["adversarial_accuracy"] < run.final["clean_accuracy"]
    assert run.final["test_clean_accuracy"] > 0.7
