"""What the commands over a saved ensemble share."""

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..ensemble import PeftEnsembleModel
from ..ensemble.saving.loading import local_folder
from ..models.inputs import is_encoder_decoder
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
        arguments.ensemble, revision=arguments.revision, base_model=arguments.base_model, **arguments.loading()
    )
    return ensemble.to(torch.accelerator.current_accelerator() or "cpu")


def tokenizer_of(arguments: SavedArguments, ensemble: PeftEnsembleModel, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, the one beside the ensemble, or that of the base model that was loaded."""
    base, folder = ensemble.base_model_reference, local_folder(str(arguments.ensemble), arguments.revision, None)
    if name:
        source, revision = name, None
    elif (folder / "tokenizer_config.json").is_file():
        # Of a repository, `folder` lacks what is not JSON, such as chat templates.
        source, revision = str(arguments.ensemble), arguments.revision
    elif arguments.base_model:
        source, revision = arguments.base_model, None
    else:
        source, revision = base.name_or_path, base.revision
    # Answers go on from a prompt's last token, unless a decoder of their own begins anew.
    side = "left" if ensemble.can_generate() and not is_encoder_decoder(ensemble) else "right"
    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=revision, padding_side=side, trust_remote_code=arguments.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
