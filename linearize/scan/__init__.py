"""What is lost when one layer alone is changed: every candidate in every layer, no training by default.

One copy of the teacher serves: the layer that is measured runs a mixer, all others their own softmax, and what lies
below it is computed once. The folder:

    scan.jsonl    the settings, then a line for each layer (or kv head) and candidate; a second call goes on from it
    scan.json     everything, with the selectors and what to make of it in words
    scan.html     the same as a page: layers by candidates

Measured for each: KL to the teacher and next-token loss on training text, recall of prompts that only the scan asks
(generation, which forced arg-max decides, and the likelihood of the answers), and the layer's relative output error.
"""

from .measure import Row, ScanResult, read, scan

__all__ = ["Row", "ScanResult", "read", "scan"]
