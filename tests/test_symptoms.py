"""The page of symptoms names findings that there are, each with a test that plants it."""

import re
from pathlib import Path

import pytest

from course_utils import paths

ROOT = paths.project_root()
PAGE = (ROOT / "docs" / "symptoms.md").read_text(encoding="utf-8")
STAGES = [
    "Configure", "Prepare the data", "Prepare pairs for DPO or a reward model", "Train", "Train on preferences (DPO, reward models, GRPO)", "Train on several devices", "Save", "Load and switch", "Generate and serve", "In 4 and 8 bits",
    "Start from the base's weights (OLoRA, PiSSA)", "Merge and combine", "Pictures and encoders",
]  # fmt: skip
# What stands among the findings in the column of checks, and is none.
OTHERS = {
    "check_adapters", "check_merged_folder", "check_supervision", "get_delta_weight", "get_model_state_dict", "position_ids", "ref_model",
    "resize_token_embeddings", "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip


def rows():
    """(symptom, cause, check) of each line of the tables."""
    lines = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| Symptom"))
    ]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines]
    assert all(len(row) == 3 for row in cells), [row[0] for row in cells if len(row) != 3]
    return [tuple(cell.strip() for cell in row) for row in cells]


def text_of(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


def test_the_groups_follow_the_work():
    assert re.findall("^## (.+)$", PAGE, re.M) == STAGES
    assert all(map(all, rows())), "no cell is empty"
    symptoms = [symptom for symptom, _, _ in rows()]
    assert len(symptoms) == len(set(symptoms))


@pytest.mark.parametrize("part", ["src/adapter_checks", "tests"])
def test_each_finding_is_made_and_tested(part):
    named = {code for _, _, check in rows() for code in re.findall(r"`([a-z][a-z0-9_]*)`", check)} - OTHERS
    written = text_of(ROOT / "adapter_checks" / part)
    assert len(named) > 100 and sorted(code for code in named if f'"{code}"' not in written) == []
