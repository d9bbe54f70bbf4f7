"""At which learning rate is each way to tune a prompt, and each of its relatives, best? The search that `prompts` trains by.

Nine methods on four tasks, three or four rates each, a factor of about three apart, at one seed and scored on the validation split alone.
Virtual tokens are 20, and start at the words of a description of the task where the method takes one; 60 steps of batch 32, as in
`prompts`. Rows of like length share a batch, which leaves fewer pads to compute, and is the same for all methods.
"""

import peft

from course_utils import data, paths
from experiments import harness, training
from experiments.throughput import ModelLossTrainer

STEPS, VIRTUAL_TOKENS, SCORED = 60, 20, 100
TASKS = ("reading", "sailor", "extract", "mood")
DESCRIPTIONS = {
    "reading": "Read the passage and answer the question with the name, the place, the colour or the thing only, or say: not said",
    "sailor": "Say the sentence again as a sailor would: Ahoy! He be on yon deck with the mop, aye.",
    "extract": 'Give who did it, what it was and where as JSON: {"who": "Ann", "what": "mop", "where": "on the deck"}',
    "mood": "Read what the guest says and answer with one word: happy if the guest is happy, unhappy if the guest is unhappy",
}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
RATES = {
    "prompt": (0.03, 0.1, 0.3, 1.0),
    "p_tuning": (3e-3, 0.01, 0.03, 0.1),
    "prefix": (0.03, 0.1, 0.3, 1.0),
    "prefix_projected": (1e-3, 3e-3, 0.01),
    "ia3": (0.03, 0.1, 0.3),
    "norms": (0.01, 0.03, 0.1),
    "vera": (0.03, 0.1, 0.3, 1.0),
    "lora_1": (5e-3, 0.015, 0.05),
    "lora_8": (1.5e-3, 5e-3, 0.015),
}
RUNS = [
    {"seed": 0, "task": task, "method": method, "learning_rate": rate}
    for task in TASKS
    for method, rates in RATES.items()
    for rate in rates
]


def config(method, task, tokens=VIRTUAL_TOKENS, start="TEXT"):
    """PEFT's configuration of a method; tokens and start are for those that have virtual tokens."""
    common = {"task_type": "CAUSAL_LM"}
    if method == "prompt":
        if start == "TEXT":
            common |= {"prompt_tuning_init_text": DESCRIPTIONS[task], "tokenizer_name_or_path": str(paths.base_model())}
        return peft.PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init=start, **common)
    return {
        "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=tokens, encoder_hidden_size=256, **common),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=tokens, **common),
        "prefix_projected": lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=tokens, prefix_projection=True, encoder_hidden_size=256, **common
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **common
        ),
        "norms": lambda: peft.LNTuningConfig(target_modules=NORMS, **common),
        "vera": lambda: peft.VeraConfig(r=64, target_modules=["q_proj", "v_proj"], **common),
        "lora_1": lambda: peft.LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"], **common),
        "lora_8": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **common),
    }[method]()


def make_trainer(task, method, learning_rate, seed, **options):
    """(trainer, its StepClock), with the model's own loss, which takes less time on a CPU than TRL's and is the same."""
    return training.make_trainer(
        data.load_task(task, "train"),
        learning_rate,
        seed,
        lora=config(method, task, **options),
        trainer_class=ModelLossTrainer,
        max_steps=STEPS,
        logging_steps=10,
        train_sampling_strategy="group_by_length",
    )


def measure(seed, task, method, learning_rate):
    """Train once; the score on validation rows, and the losses on the way."""
    trainer, _ = make_trainer(task, method, learning_rate, seed)
    trainer.train()
    rows = data.load_task(task, "validation").select(range(SCORED))
    score = training.score(trainer.model, trainer.processing_class, task, rows)["score"]
    return {"validation": score, **training.loss_curve(trainer)}


def best_rate(task, method):
    """The rate with the best score on this task; of equal ones that with the lowest last loss.

    Raises InputError if the search is not complete.
    """
    rows = harness.complete("prompts_rate", RUNS)
    found = [row for row in rows if (row["task"], row["method"]) == (task, method)]
    return max(found, key=lambda row: (row["validation"], -row[f"loss_{STEPS}"]))["learning_rate"]
