"""Which class of transformers a model was loaded with: the names of its layers, and so those of an adapter's tensors, depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# In this order: encoders like BERT may also serve as decoders, and transformers lists them under both.
_GENERAL = ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


def model_classes(
    config: PreTrainedConfig, task_type: str | None = None, adapted: str | None = None
) -> list[type[PreTrainedModel]]:
    """The classes that a model with this configuration may have, likeliest first.

    task_type  an adapter's
    adapted    name of the class that the adapter was made on, where PEFT wrote it down (auto_mapping): without a task type

    First the class that PEFT wrote down, then that of the task, the one that the configuration names, and those with the
    heads of language models. The list is empty for a configuration that no model of transformers is made from.
    """
    import transformers

    found: list[Any] = [getattr(transformers, str(adapted), None)]
    if task_type in _OF_TASK:
        found.append(_of_auto_class(_OF_TASK[task_type], config))
    found += [getattr(transformers, str(name), None) for name in config.architectures or ()]
    found += [_of_auto_class(name, config) for name in _GENERAL]
    return [kind for kind in dict.fromkeys(found) if _takes(kind, config)]


def _of_auto_class(name: str, config: PreTrainedConfig) -> Any:
    import transformers

    mapping = getattr(transformers, name)._model_mapping
    kind = mapping[type(config)] if type(config) in mapping else None
    return kind[0] if isinstance(kind, (tuple, list)) else kind


def _takes(kind: Any, config: PreTrainedConfig) -> bool:
    import transformers

    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return False
    return isinstance(config, getattr(kind, "config_class", None) or ())
