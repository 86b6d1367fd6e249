"""The command line: each verb parses its words, calls the library, prints; heavy imports live inside verbs.

Results go to stdout, progress and logs to stderr; ``--json`` ends stdout with one JSON object. A user's
mistake is one line and exit code 2, an interruption is 130.
"""

# Imported in the order in which --help lists the verbs.
from . import make, plan, lists, measure, use, state, tools  # noqa: F401, I001
from .app import app
from .lists import FAMILIES

__all__ = ["FAMILIES", "app"]
