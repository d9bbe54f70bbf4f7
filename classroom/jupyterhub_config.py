"""JupyterHub for one machine and many learners. README.md beside this file says how to set it up.

The hub serves the hand-out, unpacked where learners can read and not write, with an environment of its own. Each
learner gets a copy of the notebooks at home; models and data are there once for all.
"""

import os
from pathlib import Path

c = get_config()  # noqa: F821, given by JupyterHub

COURSE = Path(os.environ.get("LORA_COURSE", "/opt/lora-course"))

# Runs as the learner. `cp -n` never writes over a notebook that somebody has worked in.
START = f"""
mkdir -p "$HOME/lora-course"
cp -Rn '{COURSE}/notebooks' '{COURSE}/images' '{COURSE}/docs' "$HOME/lora-course/"
exec '{COURSE}/.venv/bin/jupyter-labhub' "$@"
"""
c.Spawner.cmd = ["/bin/sh", "-c", START, "jupyter-labhub"]
c.Spawner.notebook_dir = "~/lora-course"
c.Spawner.default_url = "/lab/tree/notebooks/01_load_lora_adapter.ipynb"
c.Spawner.environment = {
    "COURSE_RUNS": "~/lora-course/runs",  # a record of passed exercises and results for each learner
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # many small jobs side by side are faster with a thread each
}
# When a whole class logs in at once, a start takes its time.
c.Spawner.start_timeout = c.Spawner.http_timeout = 180

# A notebook that nobody uses gives its memory back after an hour, a server after two.
c.Spawner.args = ["--MappingKernelManager.cull_idle_timeout=3600", "--ServerApp.shutdown_no_activity_timeout=7200"]

# Learners are the members of this group of the machine.
c.LocalAuthenticator.allowed_groups = {"learners"}
