"""Commands called as a user calls them."""

from typer.testing import CliRunner

from lizard_models.cli.main import app


def few_steps(stage1: int, stage2: int) -> list[str]:
    """Options of `linearize` for a run of seconds on a CPU, without scores of keys to be fitted."""
    steps = ["--stage1-steps", str(stage1), "--stage2-steps", str(stage2)]
    return ["--preset", "plain", *steps, "--seq-len", "64", "--batch-size", "2", "--device", "cpu"]


def call(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def error(*arguments: str, code: int = 2) -> str:
    """The one line a failing command writes."""
    lines = call(*arguments, code=code).stderr.strip().splitlines()
    return lines[-1]
