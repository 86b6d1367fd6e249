"""``python -m linearize`` is the command ``linearize``."""

from .cli import app

app(prog_name="linearize")
