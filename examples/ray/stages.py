"""A whole run as tasks of Ray, each of which starts when what it needs is done.

    python examples/ray/stages.py --config run.yaml --parts 8

Install Ray on the cluster beside the library: `pip install "ray[default]"`. The working directory, and `output_dir` in
the configuration, have to be folders that all of its machines share.
"""

import argparse
import os
import subprocess
import time

# The exit code of a command before which others have to end, and the seconds until it is tried again.
NOT_READY = 75
PAUSE = 60


def command(config: str, stage: str, index: int = 0, parts: int = 1) -> list[str]:
    """The command line of one part of a stage."""
    return ["hf-ensemble", "train", "--config", config, "--stage", stage, "--shard", f"{index}/{parts}"]


def run(line: list[str], folder: str, *needs: None) -> None:
    """Run a command in a folder; Ray starts it when the results of the tasks in `needs` are there."""
    while (code := subprocess.run(line, check=False, cwd=folder).returncode) == NOT_READY:
        time.sleep(PAUSE)
    if code:
        raise subprocess.CalledProcessError(code, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="file with the options of `hf-ensemble run`")
    parser.add_argument("--parts", type=int, default=8, help="tasks of a stage that has parts")
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of a task")
    arguments = parser.parse_args()
    import ray

    ray.init()
    # A task whose machine was lost is started again, and goes on where it stopped; one whose command has failed is not.
    task = ray.remote(num_gpus=arguments.gpus, max_retries=3)(run)

    def stage(name: str, parts: int = 1, needs: list = ()) -> list:
        lines = [command(arguments.config, name, index, parts) for index in range(parts)]
        return [task.remote(line, os.getcwd(), *needs) for line in lines]

    gradients = stage("gradients", arguments.parts)
    baseline = stage("baseline")
    # These have nothing to do where the configuration asks for none.
    calibration = stage("calibration", arguments.parts)
    at_baseline = stage("gradients_at_baseline", arguments.parts, baseline)
    group = stage("group", needs=[*gradients, *baseline, *calibration, *at_baseline])
    adapter = stage("adapter", arguments.parts, group)
    ray.get(stage("evaluation", needs=adapter))


if __name__ == "__main__":
    main()
