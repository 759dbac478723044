"""Items of eight zero-shot tasks as jsonl, and a scorer of them that knows nothing of the harness."""

import gzip
import json
import re

import numpy as np

DAYS = ["sunny", "cold", "very dark", "long and happy", "quiet", "windy"]
NAMES = ["Lily", "Tom", "Sue", "Max", "Ben", "Mia"]
TASKS = ["hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa", "lambada"]


def choices(*texts):
    return {"text": list(texts), "label": list("ABCDE"[: len(texts)])}


def items(task):
    """Six items with what real ones have: brackets, three to five choices, labels of either kind."""
    for n, (name, day) in enumerate(zip(NAMES, DAYS)):
        other = NAMES[n - 1]
        if task == "hellaswag":
            ends = [f"plays with  a {day} ball.", "[step] eats.", f"says hi [title] to {other}.", "was sad all day. "]
            yield {"activity_label": "Playing", "ctx": f" {name} has a toy [x]. she", "endings": ends, "label": n % 4}
        elif task == "openbookqa":
            stem = {"question_stem": f"{name} likes a {day} day because it is"}
            yield {**stem, "choices": choices("fun", "a big red car", "the end", "hot"), "answerKey": "ABCD"[n % 4]}
        elif task == "winogrande":
            text = f"{name} gave {other} a toy because _ was {day} and wanted to play."
            yield {"sentence": text, "option1": name, "option2": other, "answer": "12"[n % 2]}
        elif task in ("arc_easy", "arc_challenge"):
            texts = ["a tree", f"a {day} dog", "water", "the sun in the sky", "one"][: 3 + (n + len(task)) % 3]
            question = f"What did {name} see in the park?"
            yield {"question": question, "choices": choices(*texts), "answerKey": "ABC"[n % 3]}
        elif task == "boolq":
            passage = f"Once upon a time, {name} went out. It was a {day} day."
            yield {"question": f"was it a {day} day", "passage": passage, "idx": n, "label": n % 2}
        elif task == "piqa":
            ways = {"sol1": f"ask {other} to help", "sol2": f"sit down in the {day} room and cry"}
            yield {"goal": f"How does {name} find her ball?", **ways, "label": n % 2}
        else:
            yield {"text": f"{name} and {other} went to the park. They like to play. {other} said hi to {name}"}


FILES = {"hellaswag": "validation", "winogrande": "validation", "boolq": "validation", "piqa": "validation"}


def write_items(folder):
    for task in TASKS:
        lines = "".join(json.dumps(item) + "\n" for item in items(task))
        name = "lambada_openai" if task == "lambada" else task
        with gzip.open(folder / f"{name}.{FILES.get(task, 'test')}.jsonl.gz", "wt") as file:
            file.write(lines)
    return folder


def clean(text):
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def prompts(task, item):
    """[(context, continuation)], the texts whose lengths acc_norm divides by, and the right one."""
    if task == "hellaswag":
        ends = [clean(end) for end in item["endings"]]
        context = clean(f"{item['activity_label']}: {item['ctx']}")
        return [(context, f" {end}") for end in ends], ends, item["label"]
    if task == "winogrande":
        start, end = item["sentence"].split("_")
        options = [start + item["option1"], start + item["option2"]]
        return [(option, f" {end.strip()}") for option in options], options, "12".index(item["answer"])
    if task == "boolq":
        context, texts = f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", ["no", "yes"]
        return [(context, f" {text}") for text in texts], texts, item["label"]
    if task == "piqa":
        texts = [item["sol1"], item["sol2"]]
        return [(f"Question: {item['goal']}\nAnswer:", f" {text}") for text in texts], texts, item["label"]
    if task == "lambada":
        context, _, word = item["text"].rpartition(" ")
        return [(context, f" {word}")], [word], 0
    context = item["question_stem"] if task == "openbookqa" else f"Question: {item['question']}\nAnswer:"
    texts = item["choices"]["text"]
    return [(context, f" {text}") for text in texts], texts, "ABCDE".index(item["answerKey"])


def scores(task, logp):
    """The metrics of a task; logp(context, continuation) -> (log p, whether it is greedy)."""
    right, right_normed, totals = [], [], []
    for item in items(task):
        pairs, texts, gold = prompts(task, item)
        found = [logp(*pair) for pair in pairs]
        sums = np.array([total for total, _ in found])
        totals.append(sums[gold])
        right.append(found[0][1] if task == "lambada" else sums.argmax() == gold)
        right_normed.append((sums / [len(text) for text in texts]).argmax() == gold)
    if task == "lambada":
        return {"perplexity": float(np.exp(-np.mean(totals))), "acc": float(np.mean(right))}
    normed = {} if task in ("winogrande", "boolq") else {"acc_norm": float(np.mean(right_normed))}
    return {"acc": float(np.mean(right)), **normed}
