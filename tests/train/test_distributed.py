"""Two processes do together what one does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import toy

pytestmark = pytest.mark.slow

CAPTURE = """
import sys
from helpers import toy
from accelerate import PartialState
from hf_ensemble import CaptureConfig, TaskSet, capture_gradients
from hf_ensemble.capture import capture

PartialState(cpu=True)
capture.SHARD_SIZE = 10
config = CaptureConfig(projection_dim=64)
tasks = TaskSet.from_datasets(toy.sft_tasks(train=17))
store = capture_gradients(
    toy.with_lora(toy.llama()), tasks, config, sys.argv[1], processing_class=toy.tokenizer(), disable_tqdm=True
)
assert len(store) == 3 * 23
"""

TRAIN = """
import sys
from helpers import toy
from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer

args = EnsembleSFTConfig(
    output_dir=sys.argv[1], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    save_strategy="no", num_train_epochs=1, num_groups=2, num_subsets=10, projection_dim=64,
    per_device_train_batch_size=2,
)
trainer = EnsembleSFTTrainer(
    model=sys.argv[2], args=args, train_dataset=toy.sft_tasks(train=13, validation=7), peft_config=toy.lora()
)
metrics = trainer.train().metrics
sizes = {name: score["num_examples"] for name, score in trainer.score_adapter(None, trainer.eval_dataset, "").items()}
assert set(sizes.values()) == {7}, sizes
with open(f"{sys.argv[1]}/rank-{args.process_index}.txt", "w") as file:
    file.write(repr(metrics["eval_mean_loss"]))
trainer.end()
"""


def launch(script: Path, processes: int, *arguments: str) -> None:
    command = [sys.executable, str(script), *arguments]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, str(script), *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_processes_write_the_store_of_one(tmp_path):
    script = tmp_path / "capture.py"
    script.write_text(CAPTURE)
    for processes in (1, 2):
        launch(script, processes, str(tmp_path / f"store{processes}"))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"store{n}").glob("shard*")} for n in (1, 2))
    assert len(one) == 21 and one == two


def test_two_processes_train_an_ensemble(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    base = toy.save_model(toy.llama(), tmp_path / "base")
    launch(script, 2, str(tmp_path / "run"), base)
    losses = [(tmp_path / "run" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert losses[0] == losses[1]
    assert (tmp_path / "run" / "ensemble" / "README.md").is_file()
