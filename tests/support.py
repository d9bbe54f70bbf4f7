"""What several test files call."""


def set_constants(monkeypatch, sizes):
    """Set {module: {constant: value}} for the test."""
    for module, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
