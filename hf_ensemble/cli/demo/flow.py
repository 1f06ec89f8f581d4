"""`hf-ensemble demo`: the whole flow on a small generated world."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from rich.text import Text
from transformers import AutoTokenizer

from ..._records import Record
from ...ensemble import PeftEnsembleModel
from ...runs import Results
from ...select import Selection
from ...tasks import TaskSet
from ...train import EnsembleSFTConfig, EnsembleSFTTrainer, collect_results, measure_fidelity
from ..arguments import DemoArguments
from ..parsing import parse
from ..tables import console, fidelity_table, grouping_table, results_tables, selection_table
from .tiny_model import build_tokenizer, train_base_model
from .world import CORRUPTED, FAMILIES, TARGET, World, build_world

_STORY = (
    "Ten small datasets about storybook animals. Two families share their prompts ('pick size : fox bear =') but were "
    "annotated by opposite guidelines, one wants the larger animal and one the smaller; a third family asks for facts; "
    "one dataset has random answers. Which help {target}, and which belong together?"
)


@dataclass(frozen=True)
class DemoResults(Record):
    """What the demo shows.

    Args:
        results (`Results`): of the ensemble run.
        target (`str`): the task that auxiliary tasks were selected for.
        corrupted (`str`): the task with random answers.
        selected (`list[str]`): the tasks selected for the target.
        mean_relative_error (`float`): of predicted losses of subsets, against fine-tuning them.
        reload_difference (`float`): largest difference between the logits of the trained and the reloaded ensemble.
    """

    format = "hf_ensemble.demo"

    results: Results
    target: str
    corrupted: str
    selected: list[str]
    mean_relative_error: float
    reload_difference: float


def main(argv: Sequence[str]) -> DemoResults:
    """Run the demo."""
    (arguments,), _ = parse([DemoArguments], argv, command="demo")
    out = console()
    # The model is too small for a second thread to pay, and on a busy machine it costs.
    torch.set_num_threads(1)
    folder = Path(arguments.output_dir)
    world = build_world(arguments.seed)
    out.print(_STORY.format(target=TARGET), style="italic")
    base = base_model(world, folder / f"base-{arguments.seed}", arguments.seed)
    tasks = TaskSet.from_datasets(world.tasks())
    trainer = demo_trainer(base, tasks, folder / "run", arguments.seed)
    trainer.train()
    results = collect_results(trainer)
    selection = select_for_target(trainer)
    report = measure_fidelity(trainer, subsets=fidelity_subsets(arguments.fidelity_subsets))
    reloaded, difference = reload_and_compare(trainer, tasks)
    outcome = DemoResults(results, TARGET, CORRUPTED, selection.tasks, report.mean_relative_error, difference)
    summary = folder / "demo.json"
    outcome.save(summary)
    out.print(selection_table(selection, expected=_what_it_is()))
    out.print(grouping_table(trainer.grouping, trainer.ensemble))
    for table in results_tables(results):
        out.print(table)
    out.print(results.verdict, style="bold")
    out.print(fidelity_table(report))
    ensemble = trainer.run_directory.ensemble
    paths = f"Ensemble: {ensemble}\nModel card: {ensemble / 'README.md'}\nResults: {summary}"
    out.print(paths, soft_wrap=True)
    out.print(f"Reloaded ensemble: logits differ by at most {difference:.1e}. It answers:")
    for prompt, task, answer in generations(reloaded, tasks, base):
        out.print(Text.assemble(f"  {prompt} ", (answer, "bold"), f"   (as {task})"))
    return outcome


def base_model(world: World, folder: Path, seed: int) -> str:
    """Folder of the base model, trained from scratch where it does not exist yet."""
    if not folder.exists():
        train_base_model(world, build_tokenizer(world), folder, seed=seed)
    return str(folder)


def demo_trainer(base: str, tasks: TaskSet, output_dir: Path, seed: int) -> EnsembleSFTTrainer:
    """An ensemble trainer with settings that suit a model of this size."""
    args = EnsembleSFTConfig(
        output_dir=str(output_dir),
        # Families that contradict each other, which a partition shows best.
        grouping_method="direct",
        group_initialization="fresh",
        learning_rate=2e-3,
        num_train_epochs=4,
        max_length=32,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        save_strategy="no",
        logging_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        seed=seed,
        overwrite_run=True,
    )
    peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return EnsembleSFTTrainer(model=base, args=args, train_dataset=tasks, peft_config=peft_config)


def select_for_target(trainer: EnsembleSFTTrainer) -> Selection:
    """What helps the target, from the gradients that the run has captured."""
    selection = trainer.selector().select(TARGET)
    trainer.run_directory.write(selection)
    return selection


def fidelity_subsets(count: int) -> list[list[str]]:
    """Subsets that ask what the demo is about: the target alone, with its family, with the other family, with noise."""
    others = [task for task in FAMILIES["larger"] if task != TARGET]
    subsets = [[TARGET], [TARGET, *others], [TARGET, *FAMILIES["smaller"]], [TARGET, CORRUPTED], FAMILIES["facts"]]
    return subsets[:count]


def reload_and_compare(trainer: EnsembleSFTTrainer, tasks: TaskSet) -> tuple[PeftEnsembleModel, float]:
    """The ensemble as loaded from disk, and the largest difference of its logits from the trained one's."""
    reloaded = PeftEnsembleModel.from_pretrained(trainer.run_directory.ensemble)
    rows = [trainer.eval_dataset[task][0] for task in tasks]
    batch = trainer.data_collator([{key: row[key] for key in ("input_ids", "labels", "task")} for row in rows])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        here, there = (model(**inputs, task=batch["task"]).logits for model in (trainer.ensemble, reloaded))
    return reloaded, float((here - there).abs().max())


def generations(ensemble: PeftEnsembleModel, tasks: TaskSet, base: str) -> list[tuple[str, str, str]]:
    """Prompt, task and greedy answer for the first test row of one task per family, in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    names = [members[0] for members in FAMILIES.values()]
    # The same question under both guidelines shows that the task decides.
    prompts = [tasks[names[0]].splits["test"][0]["prompt"]] * 2
    prompts += [tasks[name].splits["test"][0]["prompt"] for name in names[2:]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    generated = ensemble.generate(**batch, task=names, max_new_tokens=4, do_sample=False)
    answers = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(prompt, name, answer.strip()) for prompt, name, answer in zip(prompts, names, answers)]


def _what_it_is() -> dict[str, str]:
    kinds = {task: f"family {family!r}" for family, members in FAMILIES.items() for task in members}
    return {**kinds, CORRUPTED: "random answers"}
