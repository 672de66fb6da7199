"""Running the scripts as the command line would."""

import sys

import jax
import pytest


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a script's main function as the command line would, and gives back what it printed."""

    def main(script, *options: str, out: bool = True) -> str:
        extra = ["--out", str(tmp_path / "out.md")] if out else []
        jax.devices()  # this process has its own by now
        monkeypatch.setenv("XLA_FLAGS", "")  # other processes need not pretend to be several devices
        monkeypatch.setattr(sys, "argv", [script.__name__, *options, *extra])
        script.main()
        printed = capsys.readouterr().out
        if out:
            assert (tmp_path / "out.md").read_text() in printed
        return printed

    return main


def cells(printed: str, first: str) -> list[str]:
    """The cells of the line of a table that begins with `first`."""
    return next(
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith(f"| {first}")
    )
