"""Command lines that are refused: category → (id, words, what the message must say)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

_SMALL = "--data separable:n=8,d=3 --model mlp:2 --epochs 1 --quiet"

_FLOW = "flow --data separable:n=8,d=3 --model deep-linear --log-time 1 --quiet --out new"


@dataclass(frozen=True)
class Line:
    """One command line."""

    id: str
    words: str | list[str]
    says: str

    @property
    def arguments(self) -> list[str]:
        """The words; ``train+``, ``maximize+`` and ``flow+`` stand for a good command."""
        words = shlex.split(self.words) if isinstance(self.words, str) else self.words
        good = {
            "train+": ["train", *shlex.split(_SMALL), "--out", "new"],
            "maximize+": ["maximize", *shlex.split(_SMALL), "--out", "new"],
            "flow+": shlex.split(_FLOW),
        }
        return [*good[words[0]], *words[1:]] if words and words[0] in good else list(words)


def lines_of(*rows: tuple[str, str | list[str], str]) -> list[Line]:
    return [Line(*row) for row in rows]


LINES: dict[str, list[Line]] = {
    "rerun": lines_of(
        ("rerun-nothing", "rerun nowhere", "no run in 'nowhere'"),
        ("rerun-a-file", "rerun text.txt", "text.txt"),
        ("rerun-a-sweep", "rerun sweep", "is a sweep|no run in"),
        ("rerun-monitor", "rerun monitor", "one's own|give"),
        (
            "rerun-within-text",
            "rerun train --within little",
            "--within: expected a number, got 'little'",
        ),
        ("rerun-within-negative", "rerun train --within -1", "--within: expected.*at least 0"),
        ("rerun-within-nan", "rerun train --within nan", "--within: expected a finite number"),
        ("rerun-epochs-negative", "rerun train --epochs -1", "epochs: expected.*at least 0"),
        ("rerun-epochs-of-a-flow", "rerun flow --epochs 3", "a gradient flow has none"),
        (
            "rerun-from-of-a-training",
            "rerun train --from flow",
            "did not begin with another one",
        ),
        (
            "rerun-out-is-the-run",
            "rerun train --out ./train --force",
            "another directory than that",
        ),
        ("rerun-out-is-taken", "rerun train --out flow", "already holds a run"),
        ("rerun-other-data", "rerun train --data digits:3,8", "are not those that the run"),
        ("rerun-model-nowhere", "rerun train --model no.module:f", "cannot import 'no.module'"),
    ),
    "commands and options": lines_of(
        ("no-such-command", "trian", "No such command 'trian'.*[Dd]id you mean.*'?train"),
        ("no-such-option", "train+ --epoch 3", "No such option.*--epoch.*--epochs"),
        ("option-of-another-command", "train+ --log-time 3", "No such option: --log-time"),
        ("option-of-report", "measure train --format svg", "No such option.*--format"),
        ("short-option", "train+ -x", "No such option: -x"),
        ("option-without-value", ["train", "--data"], "'--data' requires an argument"),
        ("flag-with-value", "train+ --force=yes", "--force.*does not take a value"),
        ("positional-for-train", "train+ extra", "unexpected extra argument.*extra"),
        ("two-runs-for-measure", "measure train flow", "unexpected extra argument.*flow"),
        ("two-runs-for-verify", "verify train flow", "unexpected extra argument.*flow"),
        ("two-files-for-sweep", "sweep plan.toml twice.toml", "unexpected extra argument.*twice"),
        ("verify-of-nothing", "verify", "Missing argument 'run'"),
        ("report-of-nothing", "report", "Missing argument 'runs'"),
        ("reproduce-of-nothing", "reproduce", "Missing argument 'figures'"),
        ("sweep-of-nothing", "sweep", "Missing argument 'file'"),
        (
            "train-without-data",
            "train --model mlp:2",
            "--data is missing; for example --data digits:3,8",
        ),
        ("train-without-model", "train --data digits:3,8", "--model is missing; for example"),
        ("maximize-without-data", "maximize --model mlp:2", "--data is missing; for example"),
        ("flow-without-model", "flow --data digits:3,8", "--model is missing; for example"),
        ("seed-and-seeds", "train+ --seed 1 --seeds 2", "--seed and --seeds exclude each other"),
        (
            "resume-and-force",
            "train --resume --force --out train",
            "resume and force exclude each other",
        ),
        ("compare-of-one", "compare train", "at least two run directories, got one"),
        ("export-of-no-kind", "export train", "expected one of --csv FILE and --parquet FILE"),
        (
            "export-both",
            "export train --csv a --parquet b",
            "expected one of --csv FILE and --parquet",
        ),
        ("parquet-to-stdout", "export train --parquet -", "--parquet: expected a file, got -"),
    ),
    "numbers": lines_of(
        ("epochs-minus-one", "train+ --epochs -1", "epochs: expected a whole number of at least"),
        ("epochs-fraction", "train+ --epochs 1.5", "--epochs: expected a whole number, got '1.5'"),
        ("epochs-hex", "train+ --epochs 0x10", "--epochs: expected a whole number, got '0x10'"),
        ("epochs-word", "train+ --epochs many", "--epochs: expected a whole number, got 'many'"),
        ("epochs-empty", ["train+", "--epochs", ""], "--epochs: expected a whole number, got ''"),
        ("epochs-huge", "train+ --epochs 1" + 30 * "0", "epochs: expected .* at most"),
        ("epochs-full-width", ["train+", "--epochs", "１２"], "whole number"),
        ("lr-zero", "train+ --lr 0", "lr: expected a number above 0, got"),
        ("lr-negative", "train+ --lr -0.1", "lr: expected a number above 0, got"),
        ("lr-minus-zero", "train+ --lr -0", "lr: expected a number above 0, got"),
        ("lr-nan", "train+ --lr nan", "lr.*expected a finite number, got nan"),
        ("lr-inf", "train+ --lr inf", "lr: expected a finite number, got inf"),
        ("lr-overflow", "train+ --lr 1e400", "lr: expected a finite number, got inf"),
        ("lr-word", "train+ --lr fast", "unknown lr 'fast' .valid: lemma2, loss-based"),
        ("lr-empty", ["train+", "--lr", ""], "expected .* got ''"),
        ("lr-hex", "train+ --lr 0x10", "expected|unknown"),
        ("momentum-one", "train+ --momentum 1", "momentum: expected a number below 1, got 1"),
        ("momentum-negative", "train+ --momentum -0.1", "momentum: expected"),
        ("momentum-nan", "train+ --momentum nan", "momentum: expected a finite number, got nan"),
        (
            "batch-zero",
            "train+ --batch-size 0",
            "batch_size: expected a whole number of at least 1, got 0",
        ),
        (
            "batch-negative",
            "train+ --batch-size -5",
            "batch_size: expected a whole number of at least 1",
        ),
        (
            "seed-negative",
            "train+ --seed -1",
            "seed: expected a whole number of at least 0, got -1",
        ),
        ("seed-huge", "train+ --seed 99999999999999999999999999", "seed: expected"),
        (
            "seeds-word",
            "train+ --seeds some",
            "--seeds: expected a number such as 8, or seeds as 0,3,5",
        ),
        ("seeds-zero", "train+ --seeds 0", "seeds: expected"),
        ("seeds-twice", "train+ --seeds 1,1", "seeds"),
        ("seeds-negative", "train+ --seeds 0,-1", "seed.*expected a whole number of at least 0"),
        ("shards-three", "train+ --shards 3", "shards: expected a power of two"),
        ("shards-zero", "train+ --shards 0", "shards: expected a whole number of at least 1"),
        ("threads-zero", "train+ --threads 0", "--threads: expected a whole number of at least 1"),
        ("threads-huge", "train+ --threads 99999999999999999999", "--threads: expected"),
        ("log-time-nan", "flow+ --log-time nan", "log_time: expected a finite number, got nan"),
        ("log-time-inf", "flow+ --log-time inf", "log_time: expected a finite number, got inf"),
        ("log-norm-nan", "flow+ --log-norm nan", "log_norm: expected a finite number, got nan"),
        ("patience-inf", "flow+ --patience inf", "patience: expected a finite number, got inf"),
        ("loss-below-zero", "flow+ --loss-below 0", "loss_below: expected a number above 0"),
        ("rtol-zero", "flow+ --rtol 0", "rtol: expected a number above 0"),
        ("rtol-large", "flow+ --rtol 10", "rtol: expected"),
        (
            "evaluations-zero",
            "flow+ --max-evaluations 0",
            "max_evaluations: expected a whole number of at least 1",
        ),
        (
            "maximize-epochs-zero",
            "maximize+ --epochs 0",
            "epochs: expected a whole number of at least 1, got 0",
        ),
        (
            "maximize-batch-zero",
            "maximize+ --batch-size 0",
            "batch_size: expected a whole number of at least 1",
        ),
        (
            "measure-batch-zero",
            "measure train --batch-size 0",
            "batch_size: expected a whole number of at least 1",
        ),
        ("measure-seed", "measure train --seed -1", "seed: expected a whole number of at least 0"),
        (
            "certify-memory",
            "certify train --memory 0",
            "--memory: expected a whole number of at least 1",
        ),
        (
            "certify-tau-zero",
            "certify train --tau -1",
            "tau: expected a number of at least|tau: expected",
        ),
        ("certify-tau-nan", "certify train --tau nan", "tau: expected"),
        (
            "certify-support",
            "certify train --max-support 0",
            "max_support: expected a whole number of at least 1",
        ),
        (
            "certify-batch",
            "certify train --batch-size -1",
            "batch_size: expected a whole number of at least 1",
        ),
        (
            "reproduce-seeds",
            "reproduce fig1 --seeds 0",
            "--seeds: expected a whole number of at least 1",
        ),
        (
            "reproduce-seed",
            "reproduce fig1 --seed -1",
            "--seed: expected a whole number of at least 0",
        ),
        (
            "reproduce-jobs",
            "reproduce fig1 --jobs 0",
            "--jobs: expected a whole number of at least 1",
        ),
        (
            "reproduce-threads",
            "reproduce fig1 --threads 0",
            "--threads: expected a whole number of at least 1",
        ),
        ("demo-seed", "demo --seed -1", "seed: expected a whole number of at least 0"),
        (
            "sweep-jobs",
            "sweep plan.toml --jobs 0 --out new",
            "jobs: expected a whole number of at least 1",
        ),
    ),
    "specifications of data": lines_of(
        (
            "data-unknown",
            "train+ --data digit:3,8",
            "unknown data set 'digit'; did you mean 'digits'",
        ),
        ("data-empty", ["train+", "--data", ""], "data set: expected a specification such as"),
        ("data-blank", ["train+", "--data", "  "], "data set: expected a specification such as"),
        ("data-digit-ten", "train+ --data digits:3,12", "digit.*12"),
        ("data-digit-once", "train+ --data digits:3", "expected"),
        ("data-digit-twice", "train+ --data digits:3,3", "expected|twice"),
        ("data-digit-word", "train+ --data digits:three,8", "three"),
        ("data-n-zero", "train+ --data digits:3,8,n=0", "n.*at least 1"),
        (
            "data-n-large",
            "train+ --data digits:3,8,n=99999",
            "expected n of at most 286, the number of training examples",
        ),
        ("data-option", "train+ --data separable:n=8,m=3", "unknown option of 'separable' 'm'"),
        ("data-order", "train+ --data digits:n=3,8", "'8' stands after an option; put it first"),
        ("data-twice", "train+ --data separable:n=8,n=9", "'n' is given twice"),
        ("data-margin", "train+ --data separable:margin=-1", "margin: expected a number above 0"),
        ("data-d-one", "train+ --data separable:d=1", "d: expected a whole number of at least 2"),
        ("data-n-fraction", "train+ --data separable:n=1.5", "expected a whole number, got '1.5'"),
        ("data-n-hex", "train+ --data separable:n=0x10", "expected a whole number, got '0x10'"),
        (
            "data-n-underscore",
            "train+ --data separable:n=1_000",
            "expected a whole number, got '1_000'",
        ),
        (
            "data-n-full-width",
            "train+ --data separable:n=１２",
            "expected a whole number, got '１２'",
        ),
        (
            "data-supports",
            "train+ --data separable:n=8,d=3,supports=9",
            "supports: expected 2 to 3 support points",
        ),
        (
            "data-margin-inf",
            "train+ --data separable:margin=inf",
            "expected a finite number, got 'inf'",
        ),
        (
            "data-margin-fraction",
            "train+ --data separable:margin=1/0",
            "expected a number or a fraction",
        ),
        (
            "data-n-int64",
            "train+ --data separable:n=99999999999999999999999",
            "n.*at most|expected",
        ),
        ("data-right-to-left", ["train+", "--data", "ספרות:3,8"], "unknown data set 'ספרות'"),
        (
            "data-combining",
            ["train+", "--data", "digits\u0301:3,8"],
            "unknown data set.*did you mean 'digits'",
        ),
        ("data-emoji", ["train+", "--data", "🎲"], "unknown data set '🎲'"),
        (
            "mnist-nowhere",
            "train+ --data mnist:3,8 --data-dir empty",
            "MNIST: expected .*missing: .*Put the files",
        ),
        (
            "mnist-no-folder",
            "train+ --data mnist:3,8 --data-dir nowhere",
            "MNIST: expected .*Put the files",
        ),
        (
            "mnist-a-file",
            "train+ --data mnist:3,8 --data-dir text.txt",
            "MNIST: expected .*Put the files",
        ),
    ),
    "specifications of models": lines_of(
        ("model-unknown", "train+ --model mpl:2", "unknown model 'mpl'; did you mean 'mlp'"),
        ("model-empty", ["train+", "--model", ""], "model: expected a specification such as"),
        ("model-width-zero", "train+ --model mlp:0", "expected .*at least 1.*0"),
        ("model-width-negative", "train+ --model mlp:-4", "expected .*at least 1"),
        ("model-width-word", "train+ --model mlp:wide", "expected a whole number, got 'wide'"),
        ("model-width-fraction", "train+ --model mlp:1.5", "expected a whole number, got '1.5'"),
        ("model-empty-part", "train+ --model mlp:4,,4", "empty part"),
        ("model-huge", "train+ --model mlp:99999999999", "memory|at most"),
        ("model-int64", "train+ --model mlp:99999999999999999999999", "at most|expected"),
        ("model-activation", "train+ --model mlp:4,activation=gelu", "unknown activation 'gelu'"),
        ("model-activation-typo", "train+ --model mlp:4,activation=rellu", "did you mean 'relu'"),
        ("model-option", "train+ --model mlp:4,depth=3", "unknown option of 'mlp' 'depth'"),
        (
            "model-no-depth",
            "train+ --model diagonal-linear:depth=0",
            "depth: expected a whole number of at least",
        ),
        ("model-structured-arg", "train+ --model conv-linear:3", "expected conv-linear:depth=L"),
        ("model-cnn-on-vectors", "train+ --model cnn", "cnn.*expected|shape"),
        (
            "model-cnn-one-channel",
            "train+ --data digits:3,8 --model cnn:32",
            "expected two numbers of channels",
        ),
        (
            "model-of-ten-classes",
            "train+ --data digits --model diagonal-linear",
            "data of two classes",
        ),
        (
            "model-function",
            "measure train --model nosuchmodule:f",
            "--model: cannot import 'nosuchmodule'",
        ),
        ("model-no-function", "measure train --model ownmodels:absent", "has no function 'absent'"),
        ("model-not-callable", "measure train --model ownmodels:value", "has no function 'value'"),
        (
            "model-returns-none",
            "measure train --model ownmodels:nothing",
            "expected .* to return a torch.nn.Module, got NoneType",
        ),
        (
            "model-raises",
            "measure train --model ownmodels:raises",
            "ownmodels:raises failed: ValueError: out of order",
        ),
        (
            "model-wants-arguments",
            "measure train --model ownmodels:wants",
            "ownmodels:wants failed: TypeError",
        ),
        (
            "model-other-shape",
            "measure train --model ownmodels:wide",
            "the checkpoint is of another model",
        ),
        (
            "model-path",
            "measure train --model ./ownmodels.py:wide",
            "--model: expected package.module:function",
        ),
    ),
    "specifications of attacks": lines_of(
        (
            "attack-unknown",
            "train+ --attack pgd:eps=1",
            "unknown attack 'pgd'; did you mean 'pgd-l",
        ),
        ("attack-empty", ["train+", "--attack", ""], "attack: expected a specification"),
        ("attack-no-eps", "train+ --attack fgsm", "expected eps=…, as in fgsm:eps=16/255"),
        ("attack-bare-eps", "train+ --attack fgsm:0.1", "'0.1' has no name; write eps=0.1"),
        ("attack-negative", "train+ --attack fgsm:eps=-1", "eps: expected a number of at least 0"),
        ("attack-nan", "train+ --attack fgsm:eps=nan", "expected a finite number, got 'nan'"),
        ("attack-inf", "train+ --attack fgsm:eps=inf", "expected a finite number, got 'inf'"),
        (
            "attack-by-zero",
            "train+ --attack fgsm:eps=1/0",
            "expected a number or a fraction like 16/255",
        ),
        (
            "attack-percent",
            "train+ --attack fgsm:eps=10%",
            "expected a number or a fraction like 16/255",
        ),
        ("attack-comma", "train+ --attack fgsm:eps=0,1", "'1' stands after an option"),
        (
            "attack-pixels",
            "train+ --data digits:3,8 --attack fgsm:eps=16",
            "is it in units of 1/255",
        ),
        (
            "attack-steps-zero",
            "train+ --attack pgd-linf:eps=1,steps=0",
            "steps: expected a whole number of at least 1",
        ),
        (
            "attack-steps-fraction",
            "train+ --attack pgd-linf:eps=1,steps=1.5",
            "expected a whole number, got '1.5'",
        ),
        (
            "attack-step-negative",
            "train+ --attack pgd-linf:eps=1,steps=2,step=-1",
            "step.*expected a number",
        ),
        (
            "attack-random",
            "train+ --attack pgd-linf:eps=1,steps=2,random=maybe",
            "expected true or false, got 'maybe'",
        ),
        ("attack-bounds", "train+ --attack fgsm:eps=1,bounds=1", "expected an interval like 0..1"),
        ("attack-bounds-reversed", "train+ --attack fgsm:eps=1,bounds=1..0", "bounds: expected"),
        ("attack-objective", "train+ --attack fgsm:eps=1,objective=los", "did you mean 'loss'"),
        (
            "attack-option",
            "train+ --attack fgsm:eps=1,esp=2",
            "unknown option of 'fgsm' 'esp'; did you mean 'eps'",
        ),
        ("attack-p-below-one", "train+ --attack exact-linear:p=0.5,eps=1", "p: expected"),
        (
            "attack-p-missing",
            "train+ --attack exact-linear:eps=1",
            "expected p=…, as in exact-linear:p=2,eps=0.05",
        ),
        ("attack-exact-on-relu", "train+ --attack exact-linear:p=2,eps=0.1", "linear"),
        (
            "attack-deltas-missing",
            "train+ --attack finite-set:no.npy",
            "finite-set: cannot read perturbations from 'no.npy'",
        ),
        ("attack-deltas-folder", "train+ --attack finite-set:empty", "finite-set: .*'empty'"),
        (
            "attack-deltas-empty",
            "train+ --attack finite-set:empty.npy",
            "finite-set: .*'empty.npy'",
        ),
        (
            "attack-deltas-whole",
            "train+ --attack finite-set:whole.npy",
            "expected one .npy array of floats",
        ),
        (
            "attack-deltas-npz",
            "train+ --attack finite-set:good.npz",
            "expected one .npy array of floats",
        ),
        (
            "attack-deltas-shape",
            "train+ --data digits:3,8 --attack finite-set:deltas.npy",
            "finite.*shape|shape",
        ),
        ("attack-full-width", "train+ --attack fgsm:eps=０．１", "expected a number or a fraction"),
        ("attack-underscore", "train+ --attack fgsm:eps=1_0", "expected a number or a fraction"),
        ("measure-with", "train+ --measure-with fgms:eps=1", "did you mean 'fgm"),
        (
            "measure-attack",
            "measure train --attack none --attack nonsense",
            "unknown attack 'nonsense'",
        ),
        ("certify-attack", "certify train --attack nonsense", "unknown attack 'nonsense'"),
        ("verify-attack", "verify train --attack nonsense", "unknown attack 'nonsense'"),
        (
            "library-attack",
            "train+ --attack foolbox:eps=1",
            "expected the name of one attack first",
        ),
        (
            "autoattack-eps",
            "train+ --attack autoattack-linf",
            "expected eps=…, as in autoattack-linf:eps=8/255",
        ),
    ),
    "losses, rates, methods, engines": lines_of(
        (
            "loss-unknown",
            "train+ --loss logistics",
            "unknown loss 'logistics'; did you mean 'logistic'",
        ),
        ("loss-empty", ["train+", "--loss", ""], "loss"),
        (
            "loss-of-two-classes",
            "train+ --loss cross-entropy",
            "cross-entropy.*(expected|labels)|labels|outputs",
        ),
        ("loss-of-ten-classes", "train+ --data digits --loss logistic", "logistic|labels"),
        (
            "rate-unknown",
            "train+ --lr lema2",
            "unknown lr 'lema2'; did you mean 'lemma2'",
        ),
        ("rate-option", "train+ --lr loss-based:b=1", "unknown option of 'loss-based' 'b'"),
        ("rate-zero", "train+ --lr loss-based:a=0", "a: expected a number above 0"),
        (
            "derivative",
            "train+ --derivative totl",
            "unknown derivative 'totl'; did you mean 'total'",
        ),
        ("engine", "train+ --engine fussed", "unknown engine 'fussed'; did you mean 'fused'"),
        (
            "engine-fused-cnn",
            "train+ --data digits:3,8,n=9 --model cnn:8,8,hidden=8 --engine fused",
            "fused",
        ),
        ("precision", "train+ --perturbation-precision fp16", "unknown .*'fp16'"),
        (
            "method-unknown",
            "maximize+ --method sphere",
            "unknown method 'sphere'; did you mean 'spheres'",
        ),
        ("method-option", "maximize+ --method spheres:angel=1..2", "did you mean 'angle'"),
        ("method-interval", "maximize+ --method spheres:angle=1", "expected an interval like 0..1"),
        ("method-negative", "maximize+ --method spheres:tau=-1..2", "tau: expected"),
        ("method-norm", "maximize+ --method steepest:norm=l7", "unknown"),
        (
            "method-dual-on-relu",
            "maximize+ --method dual",
            "expected a deep linear network .*method='spheres' takes any",
        ),
        ("flow-method", "flow+ --method stif", "unknown method 'stif'; did you mean 'stiff'"),
        ("flow-loss", "flow+ --loss hinge", "unknown loss 'hinge'"),
        ("flow-attack", "flow+ --attack fgm", "expected eps=…"),
        ("certified-unknown", "measure train --certified crwon", "did you mean 'crown'"),
        ("certify-derivative", "certify train --derivative half", "unknown derivative 'half'"),
        ("certify-loss", "certify train --loss cross-entropy", "unknown loss|expected"),
        ("split", "measure train --split tests", "unknown split 'tests'; did you mean 'test'"),
        ("split-missing", "measure train --split test", "has no test split"),
        ("certify-split", "certify train --split test", "has no test split"),
        ("executor", "sweep plan.toml --executor rays --out new", "did you mean 'ray'"),
        ("figure-unknown", "reproduce fig8", "unknown figure 'fig8'; did you mean 'fig"),
        ("figure-scale", "reproduce fig1 --scale mnst", "did you mean 'mnist'"),
    ),
    "dtypes and devices": lines_of(
        ("dtype-half", "train+ --dtype float16", "unknown dtype 'float16'.*float32"),
        ("dtype-number", "train+ --dtype 32", "unknown dtype '32'"),
        ("dtype-maximize", "maximize+ --dtype int8", "unknown dtype 'int8'"),
        ("dtype-measure", "measure train --dtype double", "unknown dtype 'double'"),
        ("device-unknown", "train+ --device gpu", "device: .*'gpu'.*cpu"),
        (
            "device-cuda",
            "train+ --device cuda:99",
            "device: expected cpu, or cuda where there is one, got 'cuda:99'",
        ),
        ("device-meta", "train+ --device meta", "device: .*'meta'"),
        ("device-index", "train+ --device cpu:-7", "device: .*'cpu:-7'"),
        ("device-empty", ["train+", "--device", ""], "device: .*''"),
    ),
}
