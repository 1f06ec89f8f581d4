"""Named datasets as one table whose rows carry their task and example id into the batch."""

from .answers import IGNORE_INDEX, AnswerScores, other_entropy, restrict_to_labels, score_answers, token_scores
from .columns import EXAMPLE_ID, META_COLUMNS, TASK, TaskCollator, pop_meta
from .encoding import data_collator_for, encode, length_limit
from .folder import load_task_folder
from .labels import LabelSpace
from .rows import RowFormat
from .sampler import TaskWeightedSampler
from .sources.loading import load_tasks
from .sources.source import DatasetSource
from .task import Task
from .task_set import TaskSet

__all__ = [
    "EXAMPLE_ID",
    "IGNORE_INDEX",
    "META_COLUMNS",
    "TASK",
    "AnswerScores",
    "DatasetSource",
    "LabelSpace",
    "RowFormat",
    "Task",
    "TaskCollator",
    "TaskSet",
    "TaskWeightedSampler",
    "data_collator_for",
    "encode",
    "length_limit",
    "load_task_folder",
    "load_tasks",
    "other_entropy",
    "pop_meta",
    "restrict_to_labels",
    "score_answers",
    "token_scores",
]
