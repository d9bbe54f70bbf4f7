"""Hand out, collect, grade and report with nbgrader. `classroom/README.md` is the instructor's guide."""
