"""Bad flags, files and folders on the command line: one line each, and nothing is trained."""

import json
import re

import pytest
import transformers

from helpers import toy
from helpers.captures import capture
from hf_ensemble.cli.main import main

LINE = json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n"


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders and files to name in flags."""
    folder = tmp_path_factory.mktemp("world")
    capture(folder / "store", rows=toy.sft_tasks(train=8, validation=4))
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            (folder / "data" / name / f"{split}.jsonl").write_text(LINE * 3)
    (folder / "empty").mkdir()
    for name, text in {"broken": LINE + "{", "list": "[1]\n", "gap": '{"prompt": "a", "completion": null}\n'}.items():
        (folder / name / "a").mkdir(parents=True)
        (folder / name / "a" / "train.jsonl").write_text(text)
        (folder / name / "a" / "validation.jsonl").write_text(LINE)
    texts = {
        "list.yaml": "- a\n",
        "broken.yaml": "a: [",
        "number.yaml": "3: 4\n",
        "unknown.yaml": "speed: 1\n",
        "type.yaml": "num_components: many\n",
        "mapping.yaml": "max_auxiliary: {a: 1}\n",
        "values.yaml": "max_auxiliary: [1, 2]\n",
        "nothing.yaml": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return folder


RUN = [
    "--data",
    "{w}/data",
    "--model_name_or_path",
    "{w}/no-model",
    "--output_dir",
    "{o}",
    "--use_cpu",
    "--bf16",
    "false",
]
STORE = ["--store", "{w}/store", "--output_dir", "{o}"]
COMMANDS = {
    "no command": ([], "expected a command, one of run, capture"),
    "unknown command": (["trian"], "found 'trian'. Did you mean 'train'?"),
    "unknown flag before the command": (["--speed", "1"], "hf-ensemble: "),
}
FLAGS = {
    "run": {
        "nothing": ([], None, "Expected --data and --model_name_or_path; see hf-ensemble run --help"),
        "no data": (["--data", "{w}/none"], RUN, "there is no file or folder .*none'"),
        "data is another file": (["--data", "{w}/list.yaml"], RUN, "expected a file that ends in .jsonl"),
        "data without tasks": (["--data", "{w}/empty"], RUN, "No task in .*expected NAME/train.jsonl"),
        "broken line": (["--data", "{w}/broken"], RUN, "line 2 of .*broken/a/train.jsonl' is not JSON"),
        "line is a list": (["--data", "{w}/list"], RUN, "line 1 of .*expected an object"),
        "answer is missing": (["--data", "{w}/gap"], RUN, "row 0.*'completion', found None"),
        "unknown task": (["--tasks", "z"], RUN, r"No task named \['z'\]"),
        "fraction is text": (
            ["--validation_fraction", "half"],
            RUN,
            r"argument --validation_fraction\S*: invalid float value",
        ),
        "fraction is 0": (["--validation_fraction", "0"], RUN, "validation_fraction has to be a finite number above 0"),
        "fraction is nan": (["--validation_fraction", "nan"], RUN, "validation_fraction has to be .* found nan"),
        "no rows": (["--max_train_rows", "0"], RUN, "max_train_rows has to be a positive integer"),
        "negative rows": (["--max_validation_rows", "-1"], RUN, "max_validation_rows has to be a positive integer"),
        "head of a language model": (["--head", "linear"], RUN, "Unknown arguments: --head"),
        "subsets are negative": (
            ["--fidelity_subsets", "-1"],
            RUN,
            "fidelity_subsets has to be an integer of at least 0",
        ),
        "size is 0": (["--fidelity_sizes", "1", "0"], RUN, "Each of fidelity_sizes has to be a positive integer"),
        "model is missing": ([], RUN, "no-model"),
        "type is unknown": (["--dtype", "float33"], RUN, "float33"),
        "rank is text": (
            ["--lora_r", "big"],
            RUN,
            r"argument --lora_r\S*: invalid int value: 'big'. See hf-ensemble run",
        ),
        "unknown flag": (["--speed", "1"], RUN, "Unknown arguments: --speed. .*See hf-ensemble run --help"),
        "dimension is text": (
            ["--projection_dim", "abc"],
            RUN,
            r"argument --projection_dim\S*: invalid int value: 'abc'",
        ),
        "dimension is 0": (
            ["--projection_dim", "0"],
            RUN,
            "projection_dim has to be a positive integer or None, found 0",
        ),
        "groups are 0": (["--num_groups", "0"], RUN, "num_groups has to be a positive integer"),
        "margin is unknown": (["--margin", "wide"], RUN, "margin has to be one of"),
        "rate is nan": (["--learning_rate", "nan"], RUN, "learning_rate has to be .* found nan"),
        "epochs are 0": (["--num_train_epochs", "0"], RUN, "num_train_epochs has to be a finite number above 0"),
        "batch is 0": (["--per_device_train_batch_size", "0"], RUN, "per_device_train_batch_size has to be a positive"),
        "flag of a selection": (["--max_auxiliary", "1"], RUN, "Unknown arguments: --max_auxiliary"),
        "switch is text": (["--train_baseline", "perhaps"], RUN, "Truthy value expected: got perhaps"),
    },
    "train": {
        "stage is unknown": (["--stage", "groups"], RUN, r"stage has to be one of \('meta', .*, found 'groups'"),
        "stage has no parts": (
            ["--stage", "weights", "--shard", "0/2"],
            RUN,
            "weights has no parts, found shard=0/2",
        ),
        "shard is too large": (["--stage", "adapter", "--shard", "2/2"], RUN, "shard as INDEX/COUNT.*found '2/2'"),
        "shard of no stage": (["--shard", "0/2"], RUN, "Expected --stage beside --shard and --wait, found none"),
        "wait is negative": (["--stage", "group", "--wait", "-1"], RUN, "wait has to be a finite number of at least 0"),
        "stage and last stage": (
            ["--stage", "group", "--until", "groups"],
            RUN,
            "Expected --stage or --until, found --stage group and --until groups",
        ),
        "target without a stage": (["--target", "a"], RUN, "a selection trains once: found --target a"),
    },
    "capture": {
        "shard is a word": (["--shard", "first"], RUN, "Expected shard as INDEX/COUNT, 0/8 to 7/8 .*found 'first'"),
    },
    "status": {
        "nothing": ([], None, "Expected --run; see hf-ensemble status --help"),
        "no run": (["--run", "{w}/data"], None, "Expected a run in .*found none. Name the output_dir of a run"),
    },
    "fidelity": {
        "nothing": ([], None, "see hf-ensemble fidelity --help"),
        "no subsets": (["--fidelity_subsets", "0"], RUN, "fidelity_subsets has to be a positive integer, found 0"),
        "repeats are text": (["--num_repeated", "x"], RUN, r"argument --num_repeated\S*: invalid int value"),
        "first order is negative": (
            ["--num_first_order", "-1"],
            RUN,
            "num_first_order has to be an integer of at least 0",
        ),
        "seed is negative": (["--subset_seed", "-1"], RUN, "subset_seed has to be an integer of at least 0"),
    },
    "compare": {
        "a selection": (["--target", "a"], RUN, "compare is for an ensemble.*found --target a. Leave it out"),
    },
    "select": {
        "no store": ([], None, "Expected --store FOLDER"),
        "store is missing": (["--store", "{w}/none"], [], "Expected a gradient store in .*none', found no"),
        "store is a file": (["--store", "{w}/list.yaml"], [], "Expected a gradient store in"),
        "unknown target": (["--target", "z"], STORE, r"Unknown targets \['z'\]"),
        "unknown tasks": (["--tasks", "z"], STORE, r"Unknown tasks \['z'\]"),
        "repeated tasks": (["--tasks", "sums", "sums"], STORE, "Expected different tasks"),
        "unknown include": (["--include", "z"], STORE, r"Unknown tasks to include \['z'\]"),
        "unknown exclude": (["--exclude", "z"], STORE, r"Unknown tasks to exclude \['z'\]"),
        "unknown method": (["--selection_method", "best"], STORE, "selection_method has to be one of"),
        "unknown metric": (["--selection_metric", "f1"], STORE, "selection_metric has to be one of"),
        "budget is text": (["--max_auxiliary", "two"], STORE, r"argument --max_auxiliary\S*: invalid int value: 'two'"),
        "budget is negative": (["--max_examples", "-1"], STORE, "max_examples has to be an integer of at least 0"),
        "components are 0": (["--num_components", "0"], STORE, "num_components has to be a positive integer"),
        "clusters are no JSON": (["--clusters", "{"], STORE, "clusters has to be JSON like"),
        "clusters are a list": (["--clusters", "[1]"], STORE, "clusters has to map tasks to numbers"),
        "cluster count is text": (
            ["--clusters", '{"sums": "2"}'],
            STORE,
            "number of clusters of 'sums' has to be a pos",
        ),
        "cluster count is 0": (
            ["--clusters", '{"sums": 0}'],
            STORE,
            "number of clusters of 'sums' has to be a positive",
        ),
        "clusters above the rows": (["--clusters", '{"sums": 99}'], STORE, "expected 1 to 8 clusters, found 99"),
        "clusters of an unknown task": (["--clusters", '{"z": 2}'], STORE, r"Unknown tasks to cluster \['z'\]"),
        "unknown flag": (["--speed", "1"], STORE, "Unknown arguments: --speed. See hf-ensemble select --help"),
        "word without a flag": (["sums"], STORE, "a word that belongs to no flag"),
        "no file of settings": (["--config", "{w}/none.yaml"], STORE, "No configuration file at"),
        "settings without a file": (["--config"], STORE, "--config takes a YAML file"),
        "settings are a folder": (["--config", "{w}"], STORE, "No configuration file at"),
        "settings are a list": (["--config", "{w}/list.yaml"], STORE, "has to map names to values, found list"),
        "settings are broken": (["--config", "{w}/broken.yaml"], STORE, "broken.yaml' is not YAML"),
        "settings are binary": (["--config", "{w}/binary.yaml"], STORE, "binary.yaml' is no text"),
        "name is a number": (["--config", "{w}/number.yaml"], STORE, "has to map names to values, found the name 3"),
        "unknown setting": (["--config={w}/unknown.yaml"], STORE, "Unknown arguments: --speed"),
        "setting of another type": (
            ["--config", "{w}/type.yaml"],
            STORE,
            r"argument --num_components\S*: invalid int value",
        ),
        "setting is a mapping": (
            ["--config", "{w}/mapping.yaml"],
            STORE,
            r"argument --max_auxiliary\S*: invalid int value",
        ),
        "setting has two values": (
            ["--config", "{w}/values.yaml"],
            STORE,
            "max_auxiliary in .*values.yaml takes one value, found 2",
        ),
    },
    "group": {
        "no store": ([], None, "Expected --store FOLDER"),
        "more groups than tasks": (["--num_groups", "9"], STORE, "--num_groups 9 is more than the 3 tasks"),
        "groups are text": (["--max_groups", "two"], STORE, r"argument --max_groups\S*: invalid int value: 'two'"),
        "cost is nan": (
            ["--group_cost", "nan"],
            STORE,
            "group_cost has to be a finite number of at least 0, found nan",
        ),
        "no subsets": (["--affinity_subsets", "0"], STORE, "affinity_subsets has to be a positive integer"),
        "unknown method": (["--grouping_method", "kmeans"], STORE, "grouping_method has to be one of"),
        "seed is negative": (["--seed", "-1"], STORE, "seed has to be an integer of at least 0"),
        "unknown target": (
            ["--target", "z", "--grouping_method", "mixtures"],
            STORE,
            r"Unknown targets \['z'\]; the tasks are",
        ),
        "target of a partition": (["--target", "b"], STORE, "--target weigh.*Set --grouping_method mixtures"),
        "switch is text": (["--overlapping_groups", "perhaps"], STORE, "Truthy value expected: got perhaps"),
    },
    "generate": {
        "type is unknown": (["--dtype", "float33"], [], "dtype has to be 'auto' or a type of torch.*found 'float33'"),
        "routing is unknown": (["--routing", "best"], [], "routing has to be one of .*'prompt'.*found 'best'"),
        "unknown setting": (["--config={w}/unknown.yaml"], [], "Unknown arguments: --speed, in .*unknown.yaml"),
    },
    "merge": {
        "method is unknown": (["--method", "mean"], [], "method has to be one of .*'ties'.*found 'mean'"),
        "quantized base": (["--load_in_4bit"], [], "Unknown arguments: --load_in_4bit. See hf-ensemble merge --help"),
    },
    "export": {
        "type is unknown": (["--dtype", "float33"], [], "dtype has to be 'auto' or a type of torch.*found 'float33'"),
        "shards are 0": (["--num_shards", "0"], [], "num_shards has to be a positive integer, found 0"),
    },
    "demo": {
        "settings without a file": (["--config"], [], "--config takes a YAML file"),
        "seed is text": (["--seed", "x"], [], r"argument --seed\S*: invalid int value: 'x'"),
        "seed is negative": (["--seed", "-1"], [], "seed has to be an integer of at least 0"),
        "no subsets": (["--fidelity_subsets", "0"], [], "fidelity_subsets has to be a positive integer"),
        "unknown flag": (["--speed", "1"], [], "Unknown arguments: --speed"),
    },
}


def filled(flags, world, folder):
    return [flag.replace("{w}", str(world)).replace("{o}", str(folder)) for flag in flags]


@pytest.mark.parametrize(
    ("command", "bad"), [pytest.param(name, bad, id=f"{name}-{bad}") for name, own in FLAGS.items() for bad in own]
)
def test_flags_are_refused_in_one_line(command, bad, world, tmp_path, capsys):
    flags, others, message = FLAGS[command][bad]
    flags = filled([*(others or []), *flags], world, tmp_path / "out")
    assert main([command, *flags]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hf-ensemble: ") and said.count("\n") == 1 and len(said) < 1000
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", COMMANDS)
def test_commands_are_refused_in_one_line(bad, capsys):
    argv, message = COMMANDS[bad]
    with pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and message in said and "--help" in said


def test_the_traceback_is_there_for_who_asks(world):
    with pytest.raises(ValueError, match="Unknown targets"):
        main(["select", "--debug", *filled(STORE, world, world / "out"), "--target", "z"])
