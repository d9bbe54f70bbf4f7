"""Say in one sentence when the Python at hand is too old for the course.

Runs before anything is installed, on whatever Python the machine has, so it is
written to be understood by Python 2.7 as well.
"""

import sys

OLDEST = (3, 11)


def complaint(version, executable):
    """Return a sentence saying what to do if `version` is too old, else None.

    `version` is a tuple such as `sys.version_info`; `executable` is shown to the reader.
    """
    if tuple(version[:2]) >= OLDEST:
        return None
    return (
        "This course needs Python %d.%d or newer, but %s is Python %d.%d. "
        "Install a newer one, or name it: make PYTHON=python3.12 lab" % (OLDEST + (executable,) + tuple(version[:2]))
    )


if __name__ == "__main__":
    sys.exit(complaint(sys.version_info, sys.executable))
