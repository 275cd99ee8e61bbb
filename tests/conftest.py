"""What holds for every test: one thread for tensor work, here and in the servers that tests start.

Knows nothing of any part of the project.
Read by pytest before anything imports torch.
"""

import os
from pathlib import Path

# Tiny models: more threads only wait for each other, at a hundred times the cost when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton's own functions are compiled or interpreted from the moment they are imported: it must be known before.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
