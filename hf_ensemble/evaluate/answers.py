"""Answers that a model generates, and their scores."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .._processes import run_on_all, run_on_main
from ..errors import TaskError
from ..models.batches import HalvingOnFullMemory, length_sorted_batches
from ..models.inputs import is_encoder_decoder
from ..models.precision import autocast
from ..models.sharding import is_sharded
from ..models.usage import UsageCounter
from ..models.virtual_tokens import num_virtual_tokens
from ..models.wrappers import evaluation_mode
from ..tasks import EXAMPLE_ID, IGNORE_INDEX, TaskCollator, pop_meta
from .answer_metric import AnswerMetric

# From prompts, their attention mask, the task of each row and settings to prompts with what was generated.
Generate = Callable[[torch.Tensor, torch.Tensor, list[str], GenerationConfig], torch.Tensor]

# What a batch of token ids consists of; anything else, such as pictures, would be missing from the prompts.
_INPUTS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "decoder_input_ids")
# Greedy decoding; settings of sampling at the values that mean none, so that the model's own are not taken.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
_GREEDY |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "use_cache": True, "max_length": None}


@dataclass(frozen=True)
class Question:
    """A row to be answered.

    Args:
        task (`str`): its task.
        prompt (`list[int]`): tokens before the answer.
        reference (`str`): the right answer.
    """

    task: str
    prompt: list[int]
    reference: str


@dataclass(frozen=True)
class AnswerFigures:
    """How well a task was answered.

    Args:
        figures (`dict[str, float]`): by name.
        rows (`dict[str, np.ndarray]`): value of each row, `(n,)`, of the figures that are means over rows.
    """

    figures: dict[str, float]
    rows: dict[str, np.ndarray]


class AnswerEvaluator:
    """Generates the answers of token tables and scores them.

    A row's prompt is what stands before its last stretch of answer tokens, its reference that stretch as text. Decoding
    is greedy and ends at the end-of-sequence token of the model or of the tokenizer; other settings (repetition
    penalties, suppressed tokens) are those of the model's own generation configuration. Prompts are padded on the left,
    or where else nothing counts it. Under a distributed launcher the processes share the rows, and each gets the scores
    of all. Modes and random state are left as they were.

    Args:
        model (`nn.Module`): what is put into evaluation mode and tells the device.
        tokenizer (`PreTrainedTokenizerBase`): decodes.
        data_collator (`TaskCollator`): from rows to a batch with labels.
        metrics (`dict[str, AnswerMetric]`): by task; other tasks are not answered.
        batch_size (`int`): rows that are answered at once; fewer where memory runs out.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"no"`, `"bf16"` or `"fp16"`, as in training.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        data_collator: TaskCollator,
        metrics: Mapping[str, AnswerMetric],
        batch_size: int,
        mixed_precision: str = "no",
        disable_tqdm: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.data_collator = data_collator
        self.metrics = dict(metrics)
        self.batch_size = batch_size
        self.mixed_precision = mixed_precision
        self.disable_tqdm = disable_tqdm

    def check(self, tables: Mapping[str, Dataset]) -> None:
        """Make sure that the rows of each task that has a metric can be answered and scored.

        Raises:
            `TaskError`: for rows without a prompt, and for right answers in which no final answer is found.
            `ConfigurationError`: for a metric that does not return numbers by name.
        """
        for task, metric in self.metrics.items():
            questions = self.questions(task, tables[task])
            names = tables[task][EXAMPLE_ID]
            metric.check(task, {name: question.reference for name, question in zip(names, questions)})

    def score_tasks(
        self, generate: Generate, tables: Mapping[str, Dataset], description: str = "Answering"
    ) -> dict[str, AnswerFigures]:
        """Figures of the generated answers, by task; tasks without a metric are left out.

        Args:
            generate (`Callable`): from prompts, attention mask, tasks and generation settings to token ids.
            tables (`dict[str, Dataset]`): token table of each task.
            description (`str`, *optional*, defaults to `"Answering"`): label of the progress bar.

        Raises:
            `TaskError`: for rows without a prompt.
        """
        found = {}
        answered = {task: rows for task, rows in tables.items() if task in self.metrics}
        total = sum(map(len, answered.values()))
        hidden = self.disable_tqdm or not total or not PartialState().is_local_main_process
        with tqdm(total=total, desc=description, unit="answer", leave=False, disable=hidden) as bar:
            for task, rows in answered.items():
                questions = self.questions(task, rows)
                texts = self.answers(generate, questions, self.metrics[task].max_new_tokens, bar)
                references = [question.reference for question in questions]
                # Packages of metrics keep files of their own, which processes must not share.
                found[task] = run_on_main(
                    lambda metric=self.metrics[task], texts=texts, references=references: AnswerFigures(
                        metric.score(texts, references), metric.score_rows(texts, references)
                    )
                )
        return found

    def answers(
        self, generate: Generate, questions: list[Question], max_new_tokens: int, bar: tqdm | None = None
    ) -> list[str]:
        """The generated text of each question, in their order; arguments as for [`score_tasks`]."""

        def answer() -> dict[int, str]:
            return self._own_answers(generate, questions, max_new_tokens, bar)

        parts = [answer()] if is_sharded(self.model) else run_on_all(answer)
        found = {position: text for part in parts for position, text in part.items()}
        return [found[position] for position in range(len(questions))]

    def questions(self, task: str, rows: Dataset) -> list[Question]:
        """The rows as prompts with their right answers.

        Raises:
            `TaskError`: for rows that are answers from their first token on, and for inputs besides tokens.
        """
        return [self._question(task, row) for row in rows]

    def _question(self, task: str, row: Mapping[str, Any]) -> Question:
        batch = dict(self.data_collator([{key: value for key, value in row.items() if value is not None}]))
        pop_meta(batch)
        where = f"Task {task!r}, example {row.get(EXAMPLE_ID)!r}"
        others = sorted(key for key, value in batch.items() if key not in _INPUTS and value is not None)
        if others:
            raise TaskError(
                f"{where}: answers are generated from tokens alone, found {others} in the batch. Leave this task out "
                "of answer_metrics."
            )
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        answer = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
        if is_encoder_decoder(self.model):
            return Question(task, _unpadded(ids, batch), self._text([labels[position] for position in answer]))
        # The last stretch: a chat may hold several answers.
        start = answer[-1] if answer else 0
        while start > 0 and labels[start - 1] != IGNORE_INDEX:
            start -= 1
        prompt = _unpadded(ids, batch)[: start - _padding_before(batch)]
        if not prompt or not answer:
            raise TaskError(
                f"{where}: expected a prompt before the answer, found every token to be an answer, as in language "
                "modelling. Pass prompts and completions (chats with assistant_only_loss=True), or leave this task "
                "out of answer_metrics."
            )
        return Question(task, prompt, self._text(labels[start : answer[-1] + 1]))

    def _own_answers(
        self, generate: Generate, questions: list[Question], max_new_tokens: int, bar: tqdm | None
    ) -> dict[int, str]:
        """Texts of the questions that fall to this process, by position."""
        state = PartialState()
        # Answers end after different numbers of tokens: processes that run a model together generate the same ones.
        first, every = (0, 1) if is_sharded(self.model) else (state.process_index, state.num_processes)
        own = list(range(first, len(questions), every))
        device, encoder_decoder = next(self.model.parameters()).device, is_encoder_decoder(self.model)
        settings = self._settings(max_new_tokens)
        found: dict[int, str] = {}

        def answer(positions: list[int]) -> None:
            prompts = [torch.tensor(questions[position].prompt) for position in positions]
            # What is generated goes on from the prompt's last token, unless a decoder of its own begins anew.
            side = "right" if encoder_decoder else "left"
            ids = pad_sequence(prompts, batch_first=True, padding_value=settings.pad_token_id, padding_side=side)
            ones = [torch.ones_like(prompt) for prompt in prompts]
            mask = pad_sequence(ones, batch_first=True, padding_side=side)
            tasks = [questions[position].task for position in positions]
            with usage.generation(ids, mask) as lengths, autocast(device, self.mixed_precision):
                output = generate(ids.to(device), mask.to(device), tasks, settings)
                # A decoder's first token is its start token.
                new = output[:, 1 if encoder_decoder else ids.shape[1] :]
                lengths.append(new.shape[1])
            found.update((position, self._text(tokens)) for position, tokens in zip(positions, new.tolist()))

        run = HalvingOnFullMemory(answer, self.model)
        with UsageCounter() as usage, torch.random.fork_rng(), torch.no_grad(), evaluation_mode(self.model):
            for batch in self._batches([len(questions[position].prompt) for position in own]):
                run([own[index] for index in batch])
                if bar is not None:
                    bar.update(len(batch) * every)
        return found

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not getattr(base, "_is_stateful", False) and not num_virtual_tokens(self.model):
            return length_sorted_batches(lengths, self.batch_size)
        # States and positions behind virtual tokens count padding: prompts of equal length need none.
        batches = []
        for length in sorted(set(lengths)):
            same = [index for index, own in enumerate(lengths) if own == length]
            batches += [same[start : start + self.batch_size] for start in range(0, len(same), self.batch_size)]
        return batches

    def _settings(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy decoding with the model's own generation settings otherwise."""
        settings = copy.deepcopy(getattr(self.model, "generation_config", None)) or GenerationConfig()
        ends = end_tokens(self.model, self.tokenizer)
        settings.update(**_GREEDY, max_new_tokens=max_new_tokens, eos_token_id=ends or None)
        pad = self.tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
        settings.pad_token_id = pad if pad is not None else (ends or [0])[0]
        return settings

    def _text(self, tokens: list[int]) -> str:
        return answer_text(tokens, end_tokens(self.model, self.tokenizer), self.tokenizer)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence tokens of the model's generation configuration and of the tokenizer."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in known if token is not None))


def answer_text(tokens: Sequence[int], ends: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before the first of the end tokens."""
    first = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:first], skip_special_tokens=True).strip()


def _unpadded(ids: list[int], batch: Mapping[str, Any]) -> list[int]:
    mask = batch.get("attention_mask")
    return ids if mask is None else [token for token, real in zip(ids, mask[0].tolist()) if real]


def _padding_before(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return 0 if mask is None else next(position for position, real in enumerate(mask[0].tolist()) if real)
