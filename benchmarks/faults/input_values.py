"""Cases of inputs that are typed: options, fields of a preset, values and forms of recipe files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import yaml

from benchmarks.faults.inputs import ANY, SHORT, Case, InputWorld
from lizard_models.runs.recipe_keys import keys

HOT = "9" * 25  # a temperature, or a seed, like any other
NUMBERS = ("nan", "inf", "-inf", "-1", "1.5", "a", "", "0x10", "9" * 25, "1e400", "٣", "1,2", "--", "null")
WHOLE = (
    "--widen",
    "--stage0-steps",
    "--stage1-steps",
    "--stage2-steps",
    "--batch-size",
    "--seq-len",
    "--micro-batch-size",
    "--seed",
    "--eval-length",
    "--eval-documents",
    "--save-steps",
    "--kept-keys",
    "--log-attention-every",
)
REAL = ("--state-mib", "--softmax-share", "--diverged", "--peak-tflops")
TYPED: list[tuple[str, ...]] = [
    ("--preset", "nope"),
    ("--preset", ""),
    ("--set", ""),
    ("--set", "="),
    ("--set", "a"),
    ("--set", "a=1"),
    ("--set", "attention=1"),
    ("--set", "attention.=1"),
    ("--set", ".window=1"),
    ("--set", "attention.window"),
    ("--set", "attention.window="),
    ("--set", "stage1=5"),
    ("--set", "stage3.x=1"),
    ("--set", "name=5"),
    ("--set", "attention.window.x=1"),
    ("--set", "__class__=1"),
    ("--softmax-layers", "99"),
    ("--softmax-layers", "-1"),
    ("--softmax-layers", "a"),
    ("--softmax-layers", "0,1"),
    ("--softmax-layers", "0,0,0"),
    ("--softmax-share", "2"),
    ("--softmax-share", "-0.5"),
    ("--passkey", "a"),
    ("--passkey", "0"),
    ("--passkey", "1,-5"),
    ("--passkey", "9" * 25),
    ("--device", "tpu"),
    ("--device", ""),
    ("--device", "cuda"),
    ("--device", "cuda:99"),
    ("--dtype", "int8"),
    ("--dtype", ""),
    ("--report-to", "nowhere"),
    ("--report-to", "all"),
    ("--resume",),
    ("--fsdp",),
    ("--from", "nowhere"),
    ("--from", ""),
    ("--eval-data", "nowhere.txt"),
    ("--eval-data", ""),
    ("--nope",),
    ("-x",),
    ("extra",),
    ("--keep-sliding", "x"),
    ("--data",),
    ("--out",),
    ("--widen", "99"),
    ("--text-field", "nope"),
    ("--diverged", "1"),
    ("--diverged", "0"),
    ("--peak-tflops", "0"),
    ("--seq-len", "1"),
    ("--batch-size", "0"),
]
OTHERS: list[tuple[str, ...]] = [
    *[
        ("generate", "MODEL", "a", option, value)
        for option, value in product(
            ("--temperature", "--top-p", "--seed", "-n"), ("nan", "inf", "-1", "a", "9" * 25, "")
        )
    ],
    *[
        ("generate", "MODEL", *more)
        for more in (
            [],
            ["a", "b"],
            ["a", "--positions", "x"],
            ["a", "--chat", "--load-state", "x"],
            ["a", "--prompt-file", "x"],
            ["a", "--save-state", "/dev/null/x", "-n", "1"],
            ["a\0b"],
            ["a", "--device", "tpu"],
            ["a", "--load-state", "nowhere"],
        )
    ],
    *[
        ("eval", "MODEL", *more)
        for more in (
            [],
            ["--lengths", "a"],
            ["--lengths", ","],
            ["--lengths", "0"],
            ["--tasks", ","],
            ["--tasks", "nope"],
            ["--data", "nowhere"],
            ["--data", ""],
            ["--stream", "nowhere"],
            ["--stream", ""],
            ["--trials", "0", "--lengths", "64"],
            ["--eval-length", "1", "--data", "a"],
            ["--teacher", "nowhere", "--data", "a"],
        )
    ],
    *[(name, "nowhere") for name in ("info", "report", "serve", "generate", "eval", "layers")],
    *[
        ("info", "MODEL", *more)
        for more in (["--lengths", "a"], ["--lengths", "-5"], ["--lengths", "9" * 25], ["--preset", "nope"])
    ],
    *[("demo", *more) for more in (["--minutes", "a"], ["--minutes", "nan"], ["--minutes", "-1"], ["--minutes", "0"])],
    ("recipe", "show", "nope"),
    ("recipe", "validate", "nowhere"),
    ("recipe", "validate", "."),
    ("recipe",),
    ("run", "nowhere"),
    ("run", "."),
    ("with", "nope.nope"),
    ("with", ""),
    ("nope",),
    ("convert",),
    ("convert", "nowhere", "--out", "x"),
    ("linearize",),
]


def flags() -> Iterator[Case]:
    """Options with values that mean nothing, or nothing there."""
    for option, value in product((*WHOLE, *REAL), NUMBERS):
        number = value in ("9" * 25, "٣") or (option in REAL and value in ("inf", "1.5"))
        make = lambda f, w, o=option, v=value: w.linearize(f, o, v)  # noqa: E731
        yield Case("options", f"{option} {value}", make, ANY if number else rf"{option.lstrip('-')}|Error")
    for words in TYPED:
        valid = words == ("--softmax-layers", "0,1")  # all layers, so that nothing is trained
        yield Case("options", " ".join(words), lambda f, w, m=words: w.linearize(f, *m), ANY, valid)
    for words in OTHERS:
        make = lambda f, w, m=words: [str(w.model) if word == "MODEL" else word for word in m]  # noqa: E731
        wanted = "Usage" if words == ("recipe",) else ANY  # its help
        valid = words[-1] in (HOT, "b", "a\0b")  # a prompt of two words, or one that no command line can hold
        yield Case("options", " ".join(words)[:90], make, wanted, valid)


SETTINGS = (
    "NaN",
    "Infinity",
    "-1",
    "0",
    "1e400",
    "99999999999999999999",
    '"a"',
    '""',
    "null",
    "true",
    "[]",
    "{}",
    "[1]",
    "2.5",
)


def fields() -> Iterator[Case]:
    """Every field of a preset with values of every kind."""
    names = [name for name, key in keys().items() if key.of_config and name != "name"]
    names = [".".join(keys()[name].target[1:]) for name in names]
    for number, (name, value) in enumerate(product(names, SETTINGS)):
        if number % 5 == 0:  # of 1,500
            leaf = name.rpartition(".")[2].replace("_", "[-_]") + "|" + name.rpartition(".")[2].partition("_")[0]
            make = lambda f, w, n=name, v=value: w.linearize(f, "--set", f"{n}={v}")  # noqa: E731
            yield Case(
                "fields",
                f"{name}={value}",
                make,
                rf"error: .*({leaf}|{SHORT}|--set|window|stage|layers|heads|feature|gate)",
            )


FORMS = {
    "empty": "",
    "a list": "- a\n",
    "a number": "5\n",
    "a text": "abc\n",
    "tabs": "a:\n\tb: 1\n",
    "brackets": "[" * 9000,
    "an alias": "a: &x 1\nb: *x\n",
    "a tag": "a: !!python/object:os.system {}\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "NUL": "a: \0\n",
    "a key twice": "out: a\nout: b\n",
    "a key of keys": "? {a: 1}\n: 2\n",
    "a colon": ":\n",
    "not closed": "a: [1\n",
    "a quote": "a: 'b\n",
    "a section twice": "data: {}\ndata: {}\n",
    "a section that is a number": "data: 5\n",
    "a section that is a list": "stage1: [1]\n",
    "unknown": "nope: 1\nstage9: {a: 1}\n",
    "a merge": "<<: {a: 1}\n",
    "a directive": "%YAML 9.9\n---\na: 1\n",
    "deep": "a: " + "{b: " * 900 + "1" + "}" * 900 + "\n",
    "a date": "out: 2020-01-01\n",
    "a null key": "~: 1\n",
}
BYTES = {
    "UTF-16": "out: a\n".encode("utf-16"),
    "Latin-1": "out: ü\n".encode("latin-1"),
    "bytes": bytes(range(128, 256)),
    "an image": b"\x89PNG\r\n\x1a\n\0",
}
ODD = (
    "~",
    ".nan",
    ".inf",
    "-1",
    "0",
    "1e400",
    "9" * 25,
    "abc",
    '""',
    "true",
    "[]",
    "{}",
    "[1]",
    "[a, 1]",
    "{a: 1}",
    "2.5",
    "'0'",
    "[[]]",
)


def recipes() -> Iterator[Case]:
    """Recipe files of other forms, and every key with values of every kind."""
    for name, text in {**FORMS, **BYTES}.items():
        yield Case("recipes", name, _recipe(text), r"recipe\.yaml|teacher")
    usual = {"teacher": "nowhere", "out": "out", "data": {"sources": ["a.txt"]}}
    for number, (name, value) in enumerate(product(keys(), ODD)):
        if number % 7 == 0:  # of 2,400
            section, _, key = name.rpartition(".")
            text = yaml.safe_dump({k: v for k, v in usual.items() if k not in (section or key,)})
            line = f"{section}: {{{key}: {value}}}\n" if section else f"{key}: {value}\n"
            yield Case("recipes", f"{name}: {value}", _recipe(text + line, "run"), r"error: ")


def _recipe(text: str | bytes, command: str = "validate") -> Callable[[Path, InputWorld], list[str]]:
    def make(folder: Path, world: InputWorld) -> list[str]:
        path = folder / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["run", str(path)] if command == "run" else ["recipe", "validate", str(path)]

    return make
