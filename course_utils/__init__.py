"""Helpers that the lessons import: they draw, measure and check, and never hide the library call being taught.

Nothing heavy is imported here or at the top of a submodule, but for `progress`.
"""

import os

# Lessons work without a network and ask nothing of it. Unless told not to, TRL reports each trainer that is made,
# and datasets each use of its JSON loader, to servers of their own. Read when those libraries are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

# Torch's threads wait for each other after every operation, and by default each wait burns a core. Where another program
# wants that core, all come to a standstill: a training step took 1.0 s so and 0.5 s with threads that sleep while they
# wait, on two cores with other work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
