"""The checks of adapter_checks, as the course calls them, on what the course ships."""

from adapter_checks import merging
from course_utils import data, paths, validation
from course_utils.tasks import TASKS


def test_the_shipped_model(tmp_path):
    base, adapter = paths.models_dir() / "base", paths.models_dir() / "adapters" / "mood"
    folder = merging.merge_by_shards(base, adapter, tmp_path / "out", dtype="bfloat16")
    report = validation.check_merged_folder(
        base,
        adapter,
        folder,
        rows=data.load_task("mood", "test").select(range(32)),
        score=TASKS["mood"].metric,
    )
    assert report.codes == [] and report.scores["merged"] > 0.9, report


def test_every_4_bit_model_of_the_course_is_kept_from_repacking():
    """Whoever loads in 4 bits in a lesson or a sweep calls the helper."""
    root = paths.project_root()
    for path in [*(root / "lessons").glob("*.py"), *(root / "experiments").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "load_in_4bit=True" not in text or "stop_repacking(" in text, path.name
