"""Checks on LoRA adapters, models, training data and merges, for work with transformers and PEFT.

Each check returns a Report that says what is wrong and what to do; none of them raises on bad input, none loads a
pickle, and none leaves the model other than it found it.

    check_adapter_folder   is this folder a whole, safe adapter, and does it fit this base?
    check_adapters         which adapters does this model hold, and are they in effect?
    check_changes_output   does the adapter change the output at all?
    compare_models         do two models, or two routes, give the same output?
    check_sft_data         is each row for fine-tuning whole: an answer, with its end, within max_length?
    check_preference_data  is each pair for DPO or a reward model two whole replies to one prompt, and no rule too easy?
    check_supervision      which tokens carry loss: the answer and its end, and not the prompt?
    check_lora_config      will a LoraConfig do what it says on this model?
    check_quantization_config  can this model be loaded in 4 or 8 bits here, as this BitsAndBytesConfig says?
    check_quantised        are the weights of a 4-bit or 8-bit model still what they were when it was loaded?
    check_training         is a trainer set up to train the adapter, and after a few steps: did it?
    check_preference_run   is a trainer for DPO, a reward model, GRPO or RLOO set up right, and after some steps: does it learn?
    check_merged_folder    is the merged model in a folder the base with the trained adapter?

Beside them the modules counting and memory compute what an adapter costs from configurations alone, merging merges folder
to folder, and the command adapter-checks runs what needs nothing but files.
"""

from adapter_checks.adapter_folder import check_adapter_folder
from adapter_checks.comparison import Comparison, check_changes_output, compare_models
from adapter_checks.errors import InputError
from adapter_checks.loaded_model import check_adapters
from adapter_checks.lora_config import check_lora_config
from adapter_checks.merged_folder import check_merged_folder
from adapter_checks.merged_report import MergedReport
from adapter_checks.preference_data import check_preference_data
from adapter_checks.preference_run import check_preference_run
from adapter_checks.quantised import check_quantised, check_quantization_config
from adapter_checks.report import Finding, Report
from adapter_checks.training import check_training
from adapter_checks.training_data import check_sft_data, check_supervision

__version__ = "0.2.0"

__all__ = [
    "Comparison",
    "Finding",
    "InputError",
    "MergedReport",
    "Report",
    "check_adapter_folder",
    "check_adapters",
    "check_changes_output",
    "check_lora_config",
    "check_merged_folder",
    "check_preference_data",
    "check_preference_run",
    "check_quantised",
    "check_quantization_config",
    "check_sft_data",
    "check_supervision",
    "check_training",
    "compare_models",
]
