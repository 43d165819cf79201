"""Commands called as a user calls them."""

from typer.testing import CliRunner

from lizard_models.cli.main import app


def call(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def error(*arguments: str, code: int = 2) -> str:
    """The one line a failing command writes."""
    lines = call(*arguments, code=code).stderr.strip().splitlines()
    return lines[-1]
