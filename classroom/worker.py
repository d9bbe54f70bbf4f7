"""Grade one submission with nbgrader, in a process of its own that `classroom.grade` watches.

python -m classroom.worker '{"root": ..., "lesson": ..., "learner": ..., "cell_seconds": ..., "blocked": {},
                             "trace": ..., "result": ...}'
"""

import json
import sys
from pathlib import Path

from nbgrader.converters import Autograde
from nbgrader.utils import capture_log

from classroom.course import Course


def main(job):
    """Run nbgrader's Autograde and write {"success", "log", "error"} as JSON to the file `job["result"]`."""
    course = Course(job["root"])
    config = course.config()
    config.Execute.timeout = job["cell_seconds"]
    config.ExecuteTraced.trace = job["trace"]
    config.ExecuteTraced.blocked = job["blocked"]
    autograde = Autograde(coursedir=course.directory(job["lesson"], job["learner"]), config=config)
    autograde.force = True
    Path(job["result"]).write_text(json.dumps(capture_log(autograde)), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
