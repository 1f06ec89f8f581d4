"""What the commands over a saved ensemble share."""

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..ensemble import PeftEnsembleModel
from ..ensemble.saving.files import local_folder
from .arguments import needed
from .saved_arguments import SavedArguments


def loaded_ensemble(arguments: SavedArguments, command: str) -> PeftEnsembleModel:
    """The ensemble, on an accelerator where there is one.

    Raises:
        `ConfigurationError`: where none is named.
        `EnsembleLoadError`: for a folder or repository that holds none.
    """
    needed(command, ensemble=arguments.ensemble)
    ensemble = PeftEnsembleModel.from_pretrained(
        arguments.ensemble, revision=arguments.revision, base_model=arguments.base_model
    )
    return ensemble.to(torch.accelerator.current_accelerator() or "cpu")


def tokenizer_of(arguments: SavedArguments, ensemble: PeftEnsembleModel, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, the one beside the ensemble, or the base model's."""
    folder = local_folder(arguments.ensemble, arguments.revision, None)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else ensemble.base_model_reference.name_or_path
    # Answers follow the prompts directly.
    return AutoTokenizer.from_pretrained(name or own, padding_side="left" if ensemble.can_generate() else "right")
