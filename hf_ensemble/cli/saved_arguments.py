"""Flags of the commands that work on what a run has saved."""

from dataclasses import dataclass, field
from typing import Any

from transformers import BitsAndBytesConfig

from .._settings import check_at_least, check_bitsandbytes, check_one_of
from ..ensemble.forward.routing import ROUTINGS
from ..ensemble.merging.merge import METHODS
from .arguments import dtype_named


@dataclass
class SavedArguments:
    """Which saved ensemble a command works on."""

    ensemble: str | None = field(default=None, metadata={"help": "Folder or Hub id of the ensemble."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    base_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the base model, where it is not where the ensemble says."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the base model's repository comes with."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Precision of the base model, such as bfloat16; its checkpoint's by default."}
    )

    def __post_init__(self):
        dtype_named(self.dtype)

    def loading(self) -> dict[str, Any]:
        """Arguments of the base model's `from_pretrained`."""
        dtype = {} if self.dtype is None else {"dtype": dtype_named(self.dtype)}
        return {"trust_remote_code": self.trust_remote_code, **dtype}


@dataclass
class GenerateArguments(SavedArguments):
    """What `hf-ensemble generate` takes."""

    task: str | None = field(default=None, metadata={"help": "The task of the prompts."})
    prompts: list[str] | None = field(
        default=None, metadata={"help": "The prompts, or texts to classify; lines of stdin by default."}
    )
    file: str | None = field(
        default=None,
        metadata={"help": "File of rows (JSON, JSONL, CSV, TSV, Parquet) with prompt, messages or text, or also task."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; the ensemble's own by default."})
    chat: bool = field(default=False, metadata={"help": "Put each prompt into the tokenizer's chat template."})
    routing: str | None = field(
        default=None, metadata={"help": "Weights for prompts without a task: 'default', 'prompt' or 'hidden_states'."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum number of new tokens."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the base model, as in training (QLoRA)."})

    def __post_init__(self):
        super().__post_init__()
        if self.load_in_4bit:
            check_bitsandbytes()
        if self.routing is not None:
            check_one_of("routing", self.routing, ROUTINGS)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("batch_size", self.batch_size, 1)

    def loading(self) -> dict[str, Any]:
        """With 4 bits as trl quantizes the base of a training."""
        found = super().loading()
        if self.load_in_4bit:
            dtype = found.get("dtype", "auto")
            types = {} if dtype == "auto" else {"bnb_4bit_compute_dtype": dtype}
            found["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **types)
        return found


@dataclass
class MergeArguments(SavedArguments):
    """What `hf-ensemble merge` takes."""

    task: str | None = field(default=None, metadata={"help": "Task whose weights to use."})
    output_dir: str = field(default="merged", metadata={"help": "Where the adapter goes."})
    rank: int | None = field(default=None, metadata={"help": "Largest rank; exact by default."})
    method: str = field(
        default="sum",
        metadata={
            "help": "How adapters are merged: sum, lines, ties, dare_linear, dare_ties, breadcrumbs, pcb, tsv or knots."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least("rank", self.rank, 1, optional=True)
        check_one_of("method", self.method, METHODS)


@dataclass
class ExportArguments(SavedArguments):
    """What `hf-ensemble export` takes."""

    output_dir: str = field(default="served", metadata={"help": "Where the adapters go, a folder for each task."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks to serve; all by default."})
    rank: int | None = field(default=None, metadata={"help": "Largest rank of an adapter; exact by default."})
    num_shards: int = field(default=1, metadata={"help": "GPUs that LoRAX shards the base model over."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("rank", self.rank, 1, optional=True)
        check_at_least("num_shards", self.num_shards, 1)


@dataclass
class ReportArguments:
    """What `hf-ensemble report` takes."""

    run: str | None = field(default=None, metadata={"help": "The output_dir of a finished run; also without --run."})
    output: str | None = field(default=None, metadata={"help": "The file; report.html in the run by default."})


@dataclass
class StatusArguments:
    """What `hf-ensemble status` takes."""

    run: str | None = field(default=None, metadata={"help": "The output_dir of a run; also without --run."})


@dataclass
class PushArguments:
    """What `hf-ensemble push` takes."""

    run: str | None = field(default=None, metadata={"help": "The output_dir of the run."})
    repo_id: str | None = field(default=None, metadata={"help": "Repository on the Hub, such as user/my-ensemble."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    commit_message: str = field(default="Upload ensemble", metadata={"help": "Message of the commit."})
