"""What several test files call."""


def swept(name, column, *keys):
    """{setting: (mean, lowest, highest)} over the seeds of a committed sweep, by which the lessons' prose is held."""
    import importlib

    from course_utils import data, sweeps
    from experiments import harness

    rows, script = data.load_results(name), importlib.import_module(f"experiments.{name}")
    assert not harness.missing(rows, script.RUNS), f"the sweep {name} is not finished: python -m experiments.run {name}"
    return sweeps.over_seeds(rows, column, *keys)


def set_constants(monkeypatch, sizes):
    """Set {module: {constant: value}} for the test."""
    for module, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
