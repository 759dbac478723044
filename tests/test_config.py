"""RunConfig: YAML in, overrides win, JSON out and back, and one sentence for every mistake."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from lckv_jax import ModelConfig
from lckv_jax.config import RunConfig, SourceConfig, build_config, config_json, load_config
from lckv_jax.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
MODEL = """
  vocab_size: 64
  hidden_size: 16
  intermediate_size: 20
  num_layers: 8
  num_heads: 4
  num_kv_heads: 2
  head_dim: 6"""
MINIMAL = f"out: runs/x\ntrain:\n  steps: 30\nmodel:{MODEL}\n"
FULL = f"""
out: runs/full
seed: 3
model:{MODEL}
  sharing: "0_6s_6_6_6_6_6_7"
  window: 12
  start: input
  tolerance: 1e-3
  rope_scaling: {{type: llama3, factor: 8, original_max_position_embeddings: 16}}
data:
  sources: [builtin, "texts/*.txt"]
optimizer: {{learning_rate: 1E-3, clip_norm: null}}
train:
  steps: 30
  no_grad_passes_schedule: [[0, 2], [1000, 7]]
mesh: {{data: 2, fsdp: -1}}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a config given as text, and shows the file as FILE in errors."""

    def load(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            return load_config(path, overrides)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "FILE")) from error

    return load


def refuses(load, message, *arguments):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_yaml_to_json_and_back(load, text):
    config = load(text)
    plain = json.loads(json.dumps(config_json(config)))
    again = build_config(RunConfig, plain, "json")
    assert again == config
    assert hash(again) == hash(config)
    assert len({config, again, load(text, "seed=4")}) == 2


def test_values_arrive_typed(load):
    config = load(FULL)
    assert str(config.model.sharing) == "0_6s_6_6_6_6_6_7"
    assert config_json(config)["model"]["sharing"] == "0_6s_6_6_6_6_6_7"
    assert config.model.tolerance == 1e-3
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.clip_norm is None
    assert [source.path for source in config.data.sources] == ["builtin", "texts/*.txt"]
    assert config.train.no_grad_passes_schedule == ((0, 2), (1000, 7))
    assert config.model.rope_scaling is not None
    assert isinstance(config.model.rope_scaling.factor, float)
    assert load(MINIMAL + "data: {sources: a.txt}").data.sources == (SourceConfig(path="a.txt"),)
    assert str(load(MINIMAL).model.sharing) == "0_1_2_3_4_5_6_7"


def test_configs_are_frozen(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(MINIMAL).seed = 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    config = load_config(path)
    assert build_config(RunConfig, config_json(config), "json") == config


def test_there_are_shipped_configs():
    assert CONFIGS


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=100", 100),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=2", 2.0),
        ("optimizer.learning_rate=.5e+1", 5.0),
        ("optimizer.clip_norm=null", None),
        ("model.tie_embeddings=true", True),
        ("model.dtype=bfloat16", "bfloat16"),
        ("data.folder=a=b", "a=b"),
        ("data.sources=[a, {path: b, field: c}]", (SourceConfig(path="a"), SourceConfig(path="b", field="c"))),
        ("train.no_grad_passes_schedule=[[0, 1]]", ((0, 1),)),
        ("seed=7", 7),
        ("out=elsewhere", "elsewhere"),
    ],
)
def test_overrides_win_and_are_typed(load, override, value):
    config = load(FULL, "seed=1", override)
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_overrides_make_the_sections_they_need(load):
    config = load(MINIMAL, "model.rope_scaling.type=linear", "model.rope_scaling.factor=2", "optimizer.b1=0.5")
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 2.0
    assert config.optimizer.b1 == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"cannot read the override 'train.steps'; write section.key=value, such as train.steps=100"),
        ("=3", "cannot read the override '=3'"),
        ("model..window=3", "cannot read the override"),
        ("out.folder=x", "'out' is a value, not a section"),
        ("train.steps=[", r"override 'train.steps=\[': not valid YAML"),
        ("train.steps=1e3", "train.steps: .*valid integer, got 1000.0"),
        ("train.steps=", "train.steps: .*valid integer, got None"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
        ("mesh={data: 1, data: 2}", "override .*'data' is given twice"),
    ],
)
def test_wrong_overrides(load, override, message):
    refuses(load, message, MINIMAL, override)


# ---------------------------------------------------------------- the map in YAML

UNQUOTED = MINIMAL + "  sharing: 0_6_6_6_6_6_6_7\n"


def test_unquoted_map_is_refused_with_the_mend(load):
    refuses(load, '^FILE: model.sharing: got the number .*YAML.*quote it, as in sharing: "0_6_6_6_6_6_6_7"$', UNQUOTED)
    refuses(load, "model.sharing: got the number", MINIMAL + "  sharing: 7_7_7_7_7_7_7_7\n")


@pytest.mark.parametrize("spec", ["0_6_6_6_6_6_6_7", "7_7_7_7_7_7_7_7", "[0, 6, 6, 6, 6, 6, 6, 7]", "lckv(warmup=2)"])
def test_map_as_override_needs_no_quotes(load, spec):
    want = "7_7_7_7_7_7_7_7" if spec[0] == "7" else "0_6_6_6_6_6_6_7"
    assert str(load(UNQUOTED, f"model.sharing={spec}").model.sharing) == want


@pytest.mark.parametrize("line", ['"0 6*6 7"', "lckv(warmup=2)", "[0, 6, 6, 6, 6, 6, 6, 7]", "0 6*6 7"])
def test_other_forms_of_the_map_in_yaml(load, line):
    assert str(load(MINIMAL + f"  sharing: {line}\n").model.sharing) == "0_6_6_6_6_6_6_7"


def test_num_layers_override_must_fit_the_map(load):
    text = UNQUOTED.replace("0_6_6_6_6_6_6_7", '"0_6_6_6_6_6_6_7"')
    message = "^FILE: model.sharing: the map has 8 entries .* 9 layers: layer 8 has no entry"
    refuses(load, message, text, "model.num_layers=9")


# ---------------------------------------------------------------- mistakes in the file


def test_duplicate_key_is_refused_with_its_line(load):
    text = MINIMAL + "  window: 3\n  remat: true\n  window: 4\n"
    assert text.splitlines()[13] == "  window: 4"
    refuses(load, "^FILE: line 14: the key 'window' is given twice", text)


def test_first_of_two_sections_is_not_lost(load):
    refuses(load, "'train' is given twice", MINIMAL + "train:\n  steps: 4\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("modle: {}", "^FILE: modle: unknown key; did you mean 'model'?"),
        ("  widow: 3", "^FILE: model.widow: unknown key; did you mean 'window'?"),
        ("  rope_scaling: {type: linear, facto: 2}", "model.rope_scaling.facto: unknown key; did you mean 'factor'?"),
        ("data: {sequence_len: 3}", "data.sequence_len: unknown key; did you mean 'seq_len'?"),
        ("optimizer: {learning_rat: 1}", "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("mesh: {tensors: 1}", "mesh.tensors: unknown key; did you mean 'tensor'?"),
        ("mesh: {zzz: 1}", "mesh.zzz: unknown key; known keys: data, fsdp, tensor"),
        ("1: 2", "FILE: 1: .*keys should be strings"),
        ("seed: 1.5", "^FILE: seed: input should be a valid integer, got 1.5"),
        ("seed: '1'", "seed: .*integer, got '1'"),
        ("seed: true", "seed: .*integer, got True"),
        ("seed: -1", "seed: .*greater than or equal to 0, got -1"),
        ("  remat: 1", "model.remat: unknown name '1'; known: none, full"),
        ("  window: 0", "model.window: .*greater than 0, got 0"),
        ("  grad_passes: 0", "model.grad_passes: .*greater than 0"),
        (
            "  dtype: float16",
            "model.dtype: unknown name 'float16'; did you mean '.*float.*'.*known: float32, bfloat16, float64",
        ),
        ("  start: random", "model.start: unknown name 'random'; known: zero, input$"),
        ("  tolerance: 0.1\n  no_grad_passes: 0", "model: tolerance needs no_grad_passes of at least 1"),
        ("  sharing:", "model.sharing: expected a map"),
        ("  sharing: lckv(warmup=3)", "model.sharing: .*give an even number"),
        ("optimizer:", "optimizer: .*got None"),
        ("optimizer: 3", "optimizer: .*got 3"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate: .*valid number, got 'fast'"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: .*got nan"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate: .*got inf"),
        ("optimizer: {b2: 1.0}", "optimizer.b2: .*less than 1"),
        ("data: {sources: [1]}", "data.sources.0: .*got 1"),
        ("data: {sources: [{path: a, feild: b}]}", "data.sources.0.feild: unknown key; did you mean 'field'?"),
        ("data: {sources: [{path: a, weight: 0.5}, b]}", "data: sources: some have a weight and some have none"),
        ("data: {sources: [{path: a, weight: 0.5}, {path: b, weight: 0.4}]}", "sources: the weights add up to 0.9"),
        ("data: {validation: [{path: a, weight: 1.0}]}", "data: validation: its sources have no weight"),
        ("optimizer: {name: adam}", "optimizer.name: unknown name 'adam'; did you mean 'adamw'?"),
        ("optimizer: {schedule: cosin}", "optimizer.schedule: unknown name 'cosin'; did you mean 'cosine'?"),
        ("metrics: {profile: [5, 2]}", "metrics.profile: .*5 is after 2"),
        ("data: {validation_fraction: 0}", "data.validation_fraction: .*greater than 0"),
        ("mesh: {data: -1, fsdp: -1}", "mesh: data=.*: each axis is a positive size, and at most one is -1"),
        ("mesh: {fsdp: 0}", "mesh: data=.*: each axis is a positive size"),
        ("mesh: {data: 1, tensor: -2}", "mesh: data=.*: each axis is a positive size"),
        ("  rope_scaling: {factor: 2}", "model.rope_scaling.type: is missing"),
        (
            "  rope_scaling: {type: yarn, factor: 2}",
            "model.rope_scaling.type: unknown name 'yarn'.*known: linear, llama3",
        ),
        ("  rope_scaling: {type: linear, factor: 0.5}", "model.rope_scaling.factor: .*greater than or equal to 1"),
        ("  rope_scaling: {type: llama3, factor: 2, low_freq_factor: 4}", "high_freq_factor must be larger"),
        ("data: [", "^FILE: not valid YAML"),
        ("data: !!python/object:os.system {}", "^FILE: not valid YAML"),
    ],
)
def test_mistakes_in_the_file(load, extra, message):
    refuses(load, message, MINIMAL + extra + "\n")


@pytest.mark.parametrize("schedule", ["[[1, 2]]", "[[0, 2], [0, 3]]", "[[0, 2], [9, 3], [5, 1]]"])
def test_schedule_starts_at_0_and_ascends(load, schedule):
    message = r"train.no_grad_passes_schedule: starts with step 0 and its steps ascend, as in \[\[0, 2\], \[1000, 7\]\]"
    refuses(load, message, MINIMAL, f"train.no_grad_passes_schedule={schedule}")


@pytest.mark.parametrize("schedule", ["[[0, 0]]", "[0, 2]", "[[0, 2, 3]]", "[[-1, 2]]", "7"])
def test_schedule_is_pairs_of_step_and_passes(load, schedule):
    refuses(load, "train.no_grad_passes_schedule", MINIMAL, f"train.no_grad_passes_schedule={schedule}")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("out: runs/x\n", "^FILE: out: is missing and has no default; add it$"),
        ("  steps: 30\n", "^FILE: train: "),
        ("  head_dim: 6", "^FILE: model.head_dim: is missing and has no default; add it$"),
        (f"model:{MODEL}\n", "^FILE: model: is missing"),
    ],
)
def test_missing_keys(load, missing, message):
    assert missing in MINIMAL
    refuses(load, message, MINIMAL.replace(missing, ""))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=5", "num_heads=5 is not a multiple of num_kv_heads=2"),
        ("model.num_kv_heads=8", "num_heads=4 is not a multiple of num_kv_heads=8"),
        ("model.head_dim=7", "head_dim=7 is odd"),
        ("model.num_layers=0", "model.num_layers: .*greater than 0"),
        ("optimizer.warmup_steps=30", "optimizer.warmup_steps=30 leaves nothing of train.steps=30; warm up for fewer"),
    ],
)
def test_sizes_must_fit(load, override, message):
    refuses(load, message, MINIMAL, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "^FILE: a config is a YAML mapping with the keys out, seed, model"),
        ("- 1\n- 2\n", "a config is a YAML mapping"),
        ("just text", "a config is a YAML mapping"),
        (b"\xff\xfe\x00\x01", "^FILE: cannot be read as a config: .*utf-8"),
        (b"out: \x00\x01", "^FILE: not valid YAML"),
    ],
    ids=["empty", "list", "text", "binary", "control"],
)
def test_not_a_config(load, content, message):
    refuses(load, message, content)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"absent.yaml: cannot be read as a config: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"cannot be read as a config: Is a directory"):
        load_config(tmp_path)


def test_config_built_in_python_takes_every_form_of_the_map():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_layers": 3, "num_heads": 2}
    sizes |= {"num_kv_heads": 1, "head_dim": 4}
    for spec in ("0_2_2", [0, 2, 2], ModelConfig(**sizes, sharing="0_2_2").sharing):
        assert str(ModelConfig(**sizes, sharing=spec).sharing) == "0_2_2"
    with pytest.raises(ValueError, match=r"sharing: layer 1 reads layer 5"):
        ModelConfig(**sizes, sharing="0_5_2")


def test_a_leading_zero_is_no_octal_number(load):
    assert load(MINIMAL, "out=08").out == "08"
    refuses(load, "train.steps: .*integer, got '010'", MINIMAL, "train.steps=010")


def test_an_override_into_a_section_without_entries(load):
    assert load(MINIMAL + "metrics:\n", "metrics.tensorboard=true").metrics.tensorboard


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"^override 'train\.stepz=3': train\.stepz: unknown key; did you mean 'steps'"),
        ("model.sharing=0_9", r"^override 'model\.sharing=0_9': model\.sharing: "),
        ("evaluation.every=3", r"^override 'evaluation\.every=3': evaluation: unknown key"),
        ("optimizer.warmup_steps=30", r"^FILE with optimizer\.warmup_steps=30: optimizer\.warmup_steps=30 leaves"),
    ],
)
def test_an_override_is_blamed_for_its_mistakes(load, override, message):
    refuses(load, message, MINIMAL, override)


def test_of_repeated_overrides_the_last_is_blamed(load):
    refuses(load, r"^override 'train\.steps=-1'", MINIMAL, "train.steps=-1", "train.steps=5", "train.steps=-1")


def test_the_file_is_blamed_for_its_own_mistakes(load):
    refuses(load, r"^FILE: model\.stepz: unknown key", f"{MINIMAL}\n  stepz: 3\n", "seed=1")
