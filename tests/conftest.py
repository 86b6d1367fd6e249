"""Settings that must stand before any library is imported: no network, and one thread a worker."""

import contextlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run through Triton's interpreter where there is no GPU; it must be chosen before Triton is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # Triton is optional
        sys.path.insert(0, str(Path(__file__).parent))
        from quicker import patch_once_a_launch

        patch_once_a_launch()
