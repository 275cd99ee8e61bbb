"""What holds for every test: one thread for tensor work, here and in the servers that tests start.

Knows nothing of any part of the project.
Read by pytest before anything imports torch.
"""

import os

# Tiny models: more threads only wait for each other, at a hundred times the cost when the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
