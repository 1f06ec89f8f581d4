"""Model card and upload of a plain training, when it ends."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

from .._card_drafts import is_draft
from .._cards import CARD, CardParts, split_card, update_card_file
from .._files import write_atomically
from .._hub import Repository, push_folder
from .._settings import check_flag
from ..ensemble.saving.card import reporting_failed_card
from ..ensemble.saving.files import save_adapter
from ..ensemble.saving.pushing import card_maker, push_adapter
from ..errors import ConfigurationError
from ..logging import get_logger
from ..models.wrappers import unwrapped
from ..publish import card_metadata
from ..publish.training_card import base_of, training_card, training_metadata
from ..tasks import TaskSet

logger = get_logger(__name__)


class ModelCardCallback(TrainerCallback):
    """Writes the model card of a training when it ends: `README.md` in the trainer's `output_dir`.

    It has code that loads the model and runs as it stands, the latest evaluation by task (with a
    [`TaskMetricsCallback`]), datasets and arguments. A card that is there already keeps what is not between its two
    marks, also where trl's trainers write a draft over it with every checkpoint; the draft is no card of yours. A card
    that cannot be written is reported, and does not stop the training.

    Args:
        tasks (`TaskSet`, *optional*): what is trained on, for sizes, sources and examples.
        metadata (`dict`, *optional*):
            Arguments of `Trainer.create_model_card`: `language`, `license`, `tags`, `dataset_tags`.
        card_examples (`bool`, *optional*, defaults to `True`): whether to show a prompt of the tasks.

    Raises:
        `ConfigurationError`: for arguments of another kind.

    Example:

    ```python
    >>> callback = ModelCardCallback(tasks, {"license": "apache-2.0"})
    >>> trainer = SFTTrainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
    ```
    """

    def __init__(
        self, tasks: TaskSet | None = None, metadata: Mapping[str, Any] | None = None, card_examples: bool = True
    ):
        if tasks is not None and not isinstance(tasks, TaskSet):
            raise ConfigurationError(
                f"Expected tasks to be a TaskSet, found a {type(tasks).__name__}. Make one with TaskSet.from_datasets."
            )
        check_flag("card_examples", card_examples)
        self.tasks = tasks
        self.metadata = card_metadata(metadata or {})
        self.card_examples = card_examples
        self._found: bytes | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        if state.is_world_process_zero:
            with reporting_failed_card(folder):
                card = folder / CARD
                self._found = card.read_bytes() if card.is_file() else None

    def on_save(self, args, state, control, **kwargs):
        # At once, so that a training that is killed leaves the card as it was.
        folder = Path(args.output_dir)
        if state.is_world_process_zero and self._found is not None:
            with reporting_failed_card(folder):
                self._restore(folder / CARD, self._found)

    def _restore(self, path: Path, found: bytes) -> None:
        """Put the card back that was found, byte by byte, where trl has written its draft over it."""
        # A card in another encoding is someone's own, whatever its letters are read as.
        if not path.is_file() or is_draft(split_card(path.read_text(encoding="utf-8", errors="replace"))[1]):
            write_atomically(path, lambda file: file.write(found))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            with reporting_failed_card(folder):
                update_card_file(folder / CARD, *self._card(unwrapped(model), args, state, folder))

    def _card(self, model, args, state, folder: Path, repo_id: str | None = None) -> CardParts:
        parts = training_card(model, args, state, folder, repo_id, self.tasks, self.card_examples)
        return parts._replace(given=self.metadata)


class PushToHubCallback(ModelCardCallback):
    """Uploads the model, its tokenizer and its card when a training ends, in one commit.

    Of a `PeftModel` the active adapter is uploaded. Connections that drop and errors of the Hub are tried again; an
    upload that fails is reported in one line and does not stop the training. The repository's card keeps what is not
    between its two marks. `push_to_hub=True` of a plain trainer overwrites it.

    Args:
        repo_id (`str`): repository; created where it does not exist.
        token (`str`, *optional*): Hub token.
        private (`bool`, *optional*): of a new repository.
        revision (`str`, *optional*):
            Branch to commit to, created where it does not exist; or `refs/pr/N`, a pull request that is open.
        commit_message (`str`, *optional*, defaults to `"End of training"`): of the commit.
        tasks, metadata, card_examples: see [`ModelCardCallback`].

    Raises:
        `ConfigurationError`: for arguments of another kind, and in the trainer's constructor for models that are spread
            over devices (`fsdp`, `deepspeed`).
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "End of training",
        tasks: TaskSet | None = None,
        metadata: Mapping[str, Any] | None = None,
        card_examples: bool = True,
    ):
        super().__init__(tasks, metadata, card_examples)
        if not isinstance(repo_id, str) or not repo_id or "://" in repo_id:
            raise ConfigurationError(
                f"Expected repo_id as a repository's name such as 'user/name', found {repo_id!r:.60}."
            )
        self.repository = Repository(repo_id, token, private, commit_message, revision=revision)

    def on_init_end(self, args, state, control, **kwargs):
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ConfigurationError(
                "PushToHubCallback saves the whole model from one process, and fsdp and deepspeed spread it. Set "
                "push_to_hub=True in the trainer's arguments instead."
            )

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            commit = self._push(unwrapped(model), args, state, processing_class)
            logger.info("Uploaded to %s", commit.commit_url)
        except Exception as error:  # whatever the connection, the Hub or a file raises
            logger.error("The training is complete, but was not uploaded: %s", error)

    def _push(self, model, args: TrainingArguments, state, processing_class):
        repo_id, again = self.repository.repo_id, "trainer.save_model() and upload the folder"
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            if isinstance(model, PeftModel):
                save_adapter(model, model.active_adapters[0], folder / "adapter")
                folder = folder / "adapter"
            else:
                model.save_pretrained(folder)
            if processing_class is not None:
                processing_class.save_pretrained(folder)
            base = base_of(model)
            card = CardParts(training_metadata(model), "# Model")
            with reporting_failed_card(folder):
                card = self._card(model, args, state, folder, repo_id)
            local_card = Path(args.output_dir) / CARD
            if isinstance(model, PeftModel):
                return push_adapter(folder, self.repository, base.name_or_path, card, again, local_card)
            return push_folder(self.repository, folder, (), card_maker(local_card, card), again)
