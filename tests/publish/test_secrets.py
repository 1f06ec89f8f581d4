"""An ensemble and a selection, in Python and from a configuration file, with secrets in whatever takes them.

Every file, upload and printed or logged line is searched for each.
"""

import json
import textwrap
from pathlib import Path

import pytest
import yaml

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub

PLACES = ("hub", "loading", "proxy", "rows", "run_name", "text_field", "space", "pushing")
PLACES += ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


def secret(place):
    return f"planted-{place}-0123456789"


def arguments():
    """Arguments with a secret in each."""
    return {
        "hub_token": f"hf_{secret('hub')}",
        "model_init_kwargs": {
            "token": secret("loading"),
            "proxies": {"https": f"http://user:{secret('proxy')}@proxy:3128"},
        },
        "dataset_kwargs": {"storage_options": {"key": secret("rows")}, "headers": {"Authorization": secret("rows")}},
        "run_name": f"https://user:{secret('run_name')}@tracker/run",
        "dataset_text_field": f"https://user:{secret('text_field')}@host/?sig={secret('text_field')}",
        "trackio_space_id": f"https://user:{secret('space')}@host/space",
    }


FLOW = """
import copy, json, logging, shutil, sys
from pathlib import Path

sys.path.insert(0, TESTS)
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import transformers
transformers.logging.set_verbosity_info()
from helpers import toy
from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.cli.main import main
from hf_ensemble.errors import HfEnsembleError
from transformers import TrainerCallback

SETTINGS = dict(
    use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=1, max_steps=2,
    projection_dim=64, gradient_checkpointing=False, logging_steps=1,
)

class Keep(TrainerCallback):
    # Checkpoints are deleted when their training is done; a killed run leaves them.
    def on_save(self, args, state, control, **kwargs):
        shutil.copytree(args.output_dir, Path("kept") / Path(args.output_dir).name, dirs_exist_ok=True)

planted = json.loads(PLANTED)
rows = dict(train_dataset=toy.sft_tasks(6, 4), peft_config=toy.lora(), callbacks=[Keep()])
args = EnsembleSFTConfig(
    output_dir="e", hub_model_id="hub-user/e", num_groups=2, affinity_subsets=5, **SETTINGS, **copy.deepcopy(planted)
)
trainer = EnsembleSFTTrainer(model=BASE, args=args, **rows)
trainer.train()
trainer.push_to_hub(token=PUSHING)
args = SelectionSFTConfig(output_dir="s", hub_model_id="hub-user/s", **SETTINGS, **copy.deepcopy(planted))
trainer = SelectionSFTTrainer(model=BASE, args=args, target="sums", **rows)
trainer.train()
trainer.save_model("s/saved")
trainer.push_to_hub()
args = SelectionSFTConfig(output_dir="s", learning_rate=1e-4, **SETTINGS, **copy.deepcopy(planted))
try:
    SelectionSFTTrainer(model=BASE, args=args, target="sums", **rows).train()
except HfEnsembleError as error:
    print(error)
assert main(["run", "--config", CONFIG]) == 0
assert main(["run", "--config", CONFIG, "--hub_tokn", PUSHING]) == 1
assert main(["run", "--config", CONFIG, "--learning_rate", "0.1"]) == 1
"""


@pytest.mark.slow
def test_no_secret_in_any_file_upload_or_line(tmp_path):
    base = toy.save_model(toy.llama(), tmp_path / "base")
    for name, splits in toy.sft_tasks(6, 4).items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, rows in splits.items():
            (tmp_path / "data" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **arguments(),
        "data": str(tmp_path / "data"),
        "model_name_or_path": base,
        "output_dir": "c",
        "lora_target_modules": ["q_proj", "v_proj"],
        **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "save_strategy": "no"},
        **{"projection_dim": 32, "num_groups": 2, "affinity_subsets": 5, "gradient_checkpointing": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    values = {
        "TESTS": str(Path(__file__).parents[1]),
        "BASE": base,
        "CONFIG": str(tmp_path / "run.yaml"),
        "PLANTED": json.dumps(arguments()),
        "PUSHING": secret("pushing"),
    }
    constants = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    environment = {name: secret(name) for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    with local_hub(tmp_path / "hub") as endpoint:
        done = run_against_hub(constants + textwrap.dedent(FLOW), endpoint, tmp_path / "home", environment)
    files = [path for folder in ("home", "hub") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "run.json", "manifest.json", "README.md", "adapter_config.json"} <= names
    assert len(list((tmp_path / "home" / "kept").rglob("training_args.bin"))) >= 4
    printed = {"standard output": done.stdout.encode(), "standard error": done.stderr.encode()}
    found = {
        (str(name), place)
        for name, content in [*printed.items(), *((path, path.read_bytes()) for path in files)]
        for place in PLACES
        if secret(place).encode() in content
    }
    assert not found
    assert "Unknown arguments: --hub_tokn" in done.stderr and "learning_rate: found" in done.stderr
