"""Zero-shot tasks: their scores are those of a scorer that knows nothing of the harness, and mistakes are told."""

import gzip
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest
from stories260k import write_stories260k, write_tokenizer
from task_data import TASKS, items, scores, write_items

from lckv_jax import ModelConfig
from lckv_jax.convert.hub import load_hub
from lckv_jax.data.tokenizer import Bytes, load_tokenizer
from lckv_jax.errors import UserError
from lckv_jax.evaluate import task_files
from lckv_jax.evaluate.harness import HarnessModel
from lckv_jax.evaluate.tasks import FOLDER, load_tasks, run_task
from lckv_jax.model.transformer import forward, init_params

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of six items for each task."""
    return write_items(tmp_path_factory.mktemp("zero_shot"))


def tiny(sharing="0_2_2"):
    config = ModelConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8,
        sharing=sharing, no_grad_passes=2, init_std=0.2,
    )  # fmt: skip
    return init_params(config, jax.random.key(0)), config, Bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """stories260K where its weights are, else a model of random numbers: (params, config, tokenizer)."""
    weights = Path(os.environ.get("LCKV_TEST_DATA", ROOT.parent / "shared" / "data")) / "weights" / "stories260K"
    if not weights.is_dir():
        return tiny("standard")
    folder = write_stories260k(weights, tmp_path_factory.mktemp("stories260K"))
    write_tokenizer(weights, folder)
    return *load_hub(folder), load_tokenizer(folder / "tokenizer.model")


def plain_logp(params, config, tokenizer, length=256):
    """log p of a continuation and whether it is greedy, from the float64 softmax of one row's logits."""
    run = jax.jit(lambda tokens: forward(params, config, tokens))

    @lru_cache
    def logits(ids):
        return np.asarray(run(np.array([ids + (0,) * (length - len(ids))], np.int32))[0], np.float64)

    def logp(context, continuation):
        size = 1 + len(tokenizer.encode(context))
        ids = (tokenizer.bos_id, *tokenizer.encode(context + continuation))
        rows = logits(ids)[size - 1 : len(ids) - 1]
        picked = rows[np.arange(len(rows)), ids[size:]] - np.log(np.exp(rows).sum(-1))
        return picked.sum(), bool((rows.argmax(-1) == ids[size:]).all())

    return logp


def test_all_eight_score_as_a_plain_scorer_does(data, trained):
    lm = HarnessModel(*trained, max_length=256, batch_tokens=2048)
    logp = plain_logp(*trained)
    for task in load_tasks(TASKS, data=data):
        result = run_task(lm, task)
        want = scores(task.name, logp)
        assert {name: value for name, (value, _) in result.metrics.items()} == pytest.approx(want, rel=1e-5)
        assert (result.task, result.items, result.cut) == (task.name, 6, 0)
        assert result.exact and result.exact_difference is None  # nothing is cyclic
        assert all(error is not None and error >= 0 for _, error in result.metrics.values())
    assert lm.compilations <= 8


def test_metrics_and_standard_errors_are_those_of_the_harness_itself(data, trained):
    from lm_eval.evaluator import evaluate

    lm = HarnessModel(*trained, max_length=256)
    (task,) = load_tasks(["arc_easy"], data=data)
    result = run_task(lm, task, limit=5)
    assert result.items == 5 and result.chance == pytest.approx((1 / 5 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 3) / 5)
    with task_files.quiet():
        theirs = evaluate(lm, {"tasks": {"arc_easy": task.task}}, limit=5, log_samples=False)["results"]["arc_easy"]
    for name, (value, error) in result.metrics.items():
        assert (theirs[f"{name},none"], theirs[f"{name}_stderr,none"]) == (value, error)


THEIRS = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "winogrande": "winogrande/default"}
THEIRS |= {"boolq": "super_glue/boolq/default", "lambada": "lambada/lambada_openai"}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_harness_own_task(name, data):
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    (ours,) = load_tasks([name], data=data)
    rows = list(items(name))
    if name == "hellaswag":
        rows = [{**row, "ctx_a": row["ctx"], "ctx_b": ""} for row in rows]
    path = Path(lm_eval.__file__).parent / "tasks" / f"{THEIRS.get(name, f'{name}/{name}')}.yaml"
    config = {key: value for key, value in load_yaml(path).items() if key != "tag"}
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    config["custom_dataset"] = lambda **_: splits
    with task_files.quiet():
        theirs = ConfigurableTask(config=config)
        for task in (ours.task, theirs):
            task.set_config("num_fewshot", 0)
            task.build_all_requests()
    assert [one.args for one in ours.task.instances] == [one.args for one in theirs.instances]
    assert [ours.task.doc_to_target(doc) for doc in ours.task.eval_docs] == [
        theirs.doc_to_target(doc) for doc in theirs.eval_docs
    ]
    assert ours.task.aggregation() == theirs.aggregation() and ours.version == str(theirs.VERSION)


def test_the_difference_to_exact_passes_is_told(data):
    params, config, tokenizer = tiny()
    (task,) = load_tasks(["hellaswag"], data=data)
    lm = HarnessModel(params, config, tokenizer, max_length=128)
    trained = run_task(lm, task, limit=4)
    exact = run_task(lm.with_passes("exact"), task, limit=4)
    difference = trained.exact_difference
    assert not trained.exact and trained.compilations > 0 and trained.passes == "trained" and trained.chance == 0.25
    assert exact.exact and exact.exact_difference is None and exact.compilations == 0
    assert difference.items == 4 and 0 < difference.mean < difference.largest
    for name, (value, _) in exact.metrics.items():
        assert difference.metrics[name] == (trained.metrics[name][0], value)


def test_long_items_are_cut_and_counted(data):
    lm = HarnessModel(*tiny("standard"), max_length=52)
    (task,) = load_tasks(["boolq"], data=data)
    assert run_task(lm, task).cut == 6
    (task,) = load_tasks(["openbookqa"], data=data)
    assert 0 < run_task(lm, task).cut < 6
    with pytest.raises(
        UserError, match=r"task openbookqa, item 0: a continuation of 14 tokens is longer than max_leng"
    ):
        run_task(HarnessModel(*tiny("standard"), max_length=13), task)


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests", "."]
sys.modules.update(dict.fromkeys(["torch", "transformers"]))
from pathlib import Path
from test_tasks import HarnessModel, load_tasks, run_task, tiny
batches = []
def tell(done, total):
    batches.append(done)
    if len(batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
folder, finished = map(Path, sys.argv[1:])
lm = HarnessModel(*tiny("standard"), max_length=128, batch_tokens=512, finished=finished, tell=tell)
(task,) = load_tasks(["piqa"], data=folder)
print(run_task(lm, task, limit=1).items, flush=True)
batches.clear()
(task,) = load_tasks(["hellaswag"], data=folder)
run_task(lm, task)
"""


def test_a_killed_evaluation_goes_on_and_needs_no_torch(data, tmp_path):
    finished = tmp_path / "new" / "finished.jsonl"
    command = [sys.executable, "-c", KILLED, str(data), str(finished)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL and done.stdout == "1\n" and done.stderr == "", done.stderr
    whole = finished.read_text()
    with finished.open("a") as file:
        file.write('{"key": "abc", "ans')  # as if killed in the midst of a line
    told = []
    lm = HarnessModel(
        *tiny("standard"), max_length=128, batch_tokens=512, finished=finished, tell=lambda *done: told.append(done)
    )
    (task,) = load_tasks(["hellaswag"], data=data)
    result = run_task(lm, task)
    assert told[0] == (len(whole.splitlines()) - 2, 24) and 0 < told[0][0] < 24 and told[-1] == (24, 24)
    assert finished.read_text().startswith(whole) and len(finished.read_text().splitlines()) == 26
    fresh = run_task(HarnessModel(*tiny("standard"), max_length=128, batch_tokens=512), task)
    assert result.metrics == fresh.metrics
    told.clear()
    run_task(lm.with_passes(1e-3), task)  # other passes, other answers
    assert told[0] == (0, 24)


def test_files_of_finished_requests_that_are_none(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"key": "a", "answer": [1.0, true]}\nnonsense\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: no finished request; delete"):
        HarnessModel(*tiny(), max_length=32, finished=bad)
    with pytest.raises(UserError, match="cannot hold finished requests"):
        HarnessModel(*tiny(), max_length=32, finished=tmp_path)


# ---------------------------------------------------------------- mistakes


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one task whose data nobody has, in place of the harness' 14,000, which take seconds to find."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "far.yaml").write_text(
        "task: far_away\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(task_files, "_hub", lambda: manager)
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def test_unknown_tasks_and_tasks_of_the_hub(hub, data):
    with pytest.raises(UserError, match=r"^unknown task 'helaswag'; did you mean hellaswag\?$"):
        load_tasks(["helaswag"], data=data)
    with pytest.raises(UserError, match=r"unknown task 'xyzzy'; there are arc_challenge, arc_easy, .*own"):
        load_tasks(["xyzzy"], data=data)
    with pytest.raises(UserError, match=r"task far_away is one of the harness' hub.*it needs a network"):
        load_tasks(["far_away"], data=data)
    with pytest.raises(UserError, match="no tasks are named"):
        load_tasks([], data=data)


def test_a_task_is_found_by_its_file_or_its_own_name(data):
    lambada = load_tasks(["lambada", "lambada_openai", "lambada"], data=data)
    assert [task.name for task in lambada] == ["lambada", "lambada_openai"]
    assert {(task.data, task.version) for task in lambada} == {("lambada_openai.test.jsonl.gz", "1.0")}
    assert len({task.sha256 for task in lambada}) == 1 and len(lambada[0].sha256) == 64
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TASKS)


def lines(folder, task, change):
    """The first three items of a task in a plain .jsonl file, the second one changed."""
    texts = [json.dumps(item) for item in items(task)][:3]
    texts[1] = change(json.loads(texts[1]))
    (folder / f"{task}.test.jsonl").write_text("\n".join(texts) + "\n")
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda item: json.dumps({**item, "answerKey": "Z"}), r"test.jsonl, line 2: .*by the task file of openbookqa"),
        (
            lambda item: json.dumps({"choices": 1, "answerKey": "A"}),
            r"line 2 has no field 'question_stem', which openb",
        ),
        (lambda item: json.dumps({**item, "question_stem": None}), r"line 2 has no field 'question_stem'"),
        (lambda item: "[1, 2]", r"openbookqa.test.jsonl, line 2 is no JSON object"),
        (lambda item: '{"question_stem": ', r"openbookqa.test.jsonl, line 2 is no JSON object"),
        (
            lambda item: json.dumps({**item, "question_stem": 7}),
            r"openbookqa.test.jsonl, line 2 does not fit the lines before it",
        ),
        (lambda item: json.dumps({**item, "choices": {"label": ["A"]}}), r"openbookqa"),
    ],
)
def test_lines_that_do_not_fit(tmp_path, change, told):
    with pytest.raises(UserError, match=told):
        run_task(
            HarnessModel(*tiny("standard"), max_length=64),
            *load_tasks(["openbookqa"], data=lines(tmp_path, "openbookqa", change)),
        )


def test_a_choice_without_its_context_decides_nothing(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "a", "c": ["b", "d"], "label": 0}))
    (tmp_path / "mine.yaml").write_text(
        "{task: mine, dataset_path: json, dataset_kwargs: {data_files: {test: mine.jsonl}}, test_split: test, "
        "output_type: multiple_choice, doc_to_text: q, doc_to_choice: c, doc_to_target: label, "
        "metric_list: [{metric: acc_mutual_info}], metadata: {version: 1}}"
    )
    (task,) = load_tasks(["mine"], folder=tmp_path, data=tmp_path)
    by_passes = {"trained": [-3.0, -5.0, -1.0, -9.0], "exact": [-3.0, -5.0, -9.0, -1.0]}

    class Model:
        config, cut, compilations, passes = tiny()[1], set(), 0, "trained"

        def with_passes(self, passes):
            other = Model()
            other.passes = passes
            return other

        def loglikelihood(self, requests):
            return [(logp, False) for logp in by_passes[self.passes]]

    difference = run_task(Model(), task).exact_difference
    assert (difference.changed, difference.largest) == (0, 8.0)


@pytest.mark.parametrize(
    "how", ['gen_prefix: "{{hint}}"', "gen_prefix: hint", 'description: "{{hint}}! "', "gen_prefix: H"]
)
def test_fields_of_what_stands_around_a_prompt(tmp_path, how):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"q": "a", "c": ["b", "d"], "label": 0, "hint": "H"}))
    (tmp_path / "mine.yaml").write_text(
        "{task: mine, dataset_path: json, dataset_kwargs: {data_files: {test: mine.jsonl}}, test_split: test, "
        "output_type: multiple_choice, doc_to_text: q, doc_to_choice: c, doc_to_target: label, "
        f"{how}, metric_list: [{{metric: acc}}], metadata: {{version: 1}}}}"
    )
    (task,) = load_tasks(["mine"], folder=tmp_path, data=tmp_path)
    run_task(HarnessModel(*tiny("standard"), max_length=64), task)
    assert task.task.instances[0].args[0] == ("H! a" if "description" in how else "a H")


def test_files_that_are_not_there_or_empty(tmp_path, data):
    with pytest.raises(
        UserError, match=r"piqa.yaml: its data .*piqa.validation.jsonl.gz is not there; give the folder"
    ):
        load_tasks(["piqa"], data=tmp_path)
    (tmp_path / "piqa.validation.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"piqa.validation.jsonl has no lines"):
        load_tasks(["piqa"], data=tmp_path)
    (tmp_path / "boolq.validation.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(UserError, match=r"boolq.validation.jsonl.gz cannot be read"):
        load_tasks(["boolq"], data=tmp_path)
    with pytest.raises(UserError, match="has no task files"):
        load_tasks(["piqa"], folder=tmp_path)
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: hub/data\ntest_split: test\n")
    with pytest.raises(UserError, match="a local task has dataset_path: json"):
        load_tasks(["mine"], folder=tmp_path)
    with pytest.raises(UserError, match=r"limit=0; give 1 or more"):
        run_task(HarnessModel(*tiny("standard"), max_length=64), *load_tasks(["piqa"], data=data), limit=0)


def test_a_label_that_is_no_choice(tmp_path):
    texts = [json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": label}) for label in (1, 2)]
    (tmp_path / "piqa.validation.jsonl").write_text("\n".join(texts))
    with pytest.raises(UserError, match=r"piqa.validation.jsonl, line 2: answer 2 \(counted from 0\) of 2 choices"):
        run_task(HarnessModel(*tiny("standard"), max_length=64), *load_tasks(["piqa"], data=tmp_path))
