"""What an instructor runs.

python -m classroom stage [01]               lessons to assignments, and the hand-out
python -m classroom grade FOLDER_OR_ZIP      submissions to scores.csv and report.md
python -m classroom report                   both anew, after grading by hand
python -m classroom feedback                 a page for each submission
"""

import argparse
import sys
import zipfile

MISSING = "is not installed in this Python: `make classroom` installs requirements-instructor.txt into .venv."


def parser():
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m classroom", description=__doc__.split("\n")[0])
    made.add_argument("--course", help="the class's folder (default: classroom/staging)")
    commands = made.add_subparsers(dest="command", required=True)
    stage = commands.add_parser("stage", help="lessons to assignments, and the hand-out")
    stage.add_argument("only", nargs="?", default="", help="the beginning of a lesson's name, such as 01")
    grade = commands.add_parser("grade", help="submissions to scores.csv and report.md")
    grade.add_argument("source", help="a folder or a zip of submissions")
    grade.add_argument("--only", default="", help="the beginning of a lesson's name, such as 01")
    grade.add_argument("--learner", default="", help="one learner, by the name in scores.csv")
    grade.add_argument("--names", help="regular expression with a group (?P<learner>...), searched in each file's path")
    grade.add_argument("--jobs", type=int, help="submissions at a time (default: one a core, as memory allows)")
    grade.add_argument("--cell-seconds", type=int, default=240, help="limit for one cell (default: 240)")
    grade.add_argument("--seconds", type=int, default=1800, help="limit for one submission (default: 1800)")
    grade.add_argument("--memory-gb", type=float, default=4.0, help="limit for one submission (default: 4)")
    commands.add_parser("report", help="scores.csv and report.md anew, after grading by hand")
    commands.add_parser("feedback", help="a page for each submission, in feedback/")
    return made


def main(arguments=None):
    """Do what the command line asks for. Returns an exit status or a sentence for stderr."""
    chosen = parser().parse_args(arguments)
    if chosen.command == "grade" and not chosen.source:
        return "Say where the submissions are: make grade SUBMISSIONS=folder-or-zip."
    try:
        from adapter_checks.errors import InputError
        from classroom import report
        from classroom.course import DEFAULT_ROOT, Course
        from classroom.grade import grade
        from classroom.stage import stage
        from classroom.watch import Limits
        from tools.editions import BuildError
    except ModuleNotFoundError as error:
        return f"{error.name.partition('.')[0]} {MISSING}"
    course = Course(chosen.course or DEFAULT_ROOT)
    try:
        if chosen.command == "stage":
            print(f"Hand out {stage(course, only=chosen.only)}")
        elif chosen.command == "grade":
            limits = Limits(chosen.cell_seconds, chosen.seconds, chosen.memory_gb)
            _, complaints = grade(course, chosen.source, limits, chosen.jobs, chosen.only, chosen.learner, chosen.names)
            print(report.write(course, chosen.source, complaints))
            print(f"Scores: {course.root / 'scores.csv'}")
        elif chosen.command == "report":
            print(report.write(course))
        else:
            pages, complaints = report.feedback(course)
            print(f"{pages} pages in {course.root / 'feedback'}")
            return complaints or 0
    except (InputError, BuildError, OSError, zipfile.BadZipFile) as error:
        return str(error)
    except KeyboardInterrupt:
        return "Stopped. What was not done is marked so; run the same command again."
    return 0


if __name__ == "__main__":
    sys.exit(main())
