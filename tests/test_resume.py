"""What may differ at resume: every field has a kind, and the ones that change the mathematics need permission."""

import pytest

from lckv_jax.config import RunConfig, build_config, config_json
from lckv_jax.errors import UserError
from lckv_jax.train import resume

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4)


def make_config(optimizer=(), train=(), data=(), model=(), **top):
    tree = {"out": "x", "model": SIZES | dict(model), "data": dict(data), "optimizer": dict(optimizer)}
    return build_config(RunConfig, tree | {"train": {"steps": 100} | dict(train)} | top, "test")


BASE = make_config()


def kinds(**changed):
    return {change.field: change.kind for change in resume.changes(BASE, make_config(**changed))}


def test_every_change_is_shown_with_its_field_and_kind():
    found = resume.changes(
        BASE,
        make_config(
            optimizer={"learning_rate": 0.5},
            train={"steps": 200, "log_every": 1},
            data={"sources": ["a.txt"]},
            mesh={"fsdp": 2},
            allow_changes=["seed"],
        ),
    )
    assert [str(change) for change in found] == [
        'data.sources: [{"path": "builtin", "field": "text", "weight": null}] -> '
        '[{"path": "a.txt", "field": "text", "weight": null}] (changes the mathematics)',
        "optimizer.learning_rate: 0.001 -> 0.5 (changes the mathematics)",
        "train.steps: 100 -> 200 (changes the mathematics)",
        "train.log_every: 5 -> 1",
        "mesh.fsdp: 1 -> 2 (the same up to rounding)",
    ]


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (dict(out="y"), "free"),
        (dict(train={"save_minutes": 5.0}), "free"),
        (dict(train={"keep_best": 3}), "free"),
        (dict(train={"eval_batches": 3}), "free"),
        (dict(metrics={"tensorboard": True}), "free"),
        (dict(data={"folder": "elsewhere"}), "free"),
        (dict(model={"remat": False}), "rounding"),
        (dict(model={"scan_layers": False}), "rounding"),
        (dict(model={"attention": "xla"}), "rounding"),
        (dict(train={"loss_chunk": 8}), "rounding"),
        (dict(train={"accumulation": 2}), "rounding"),
        (dict(seed=1), "mathematics"),
        (dict(model={"sharing": "lckv"}), "mathematics"),
        (dict(model={"dtype": "bfloat16"}), "mathematics"),
        (dict(model={"rope_scaling": {"type": "linear", "factor": 2.0}}), "mathematics"),
        (dict(model={"no_grad_passes": 3}), "mathematics"),
        (dict(train={"z_loss": 1e-4}), "mathematics"),
        (dict(data={"batch_size": 4}), "mathematics"),
        (dict(data={"packing": "joined"}), "mathematics"),
        (dict(model={"hidden_size": 16}), "shape"),
        (dict(model={"tie_embeddings": True}), "shape"),
    ],
)
def test_kinds(changed, kind):
    assert list(kinds(**changed).values()) == [kind]


def test_more_steps_of_a_constant_learning_rate_change_nothing():
    constant = make_config(optimizer={"schedule": "constant"})
    longer = make_config(optimizer={"schedule": "constant"}, train={"steps": 500})
    assert [change.kind for change in resume.changes(constant, longer)] == ["free"]


def test_what_adds_leaves_to_the_state_cannot_be_allowed():
    averaged, spiky = make_config(train={"ema_decay": 0.9}), make_config(train={"skip_spikes": 6.0})
    found = [
        resume.changes(BASE, averaged),
        resume.changes(spiky, BASE),
        resume.changes(spiky, make_config(train={"skip_spikes": 6.0, "spike_window": 9})),
        resume.changes(BASE, make_config(optimizer={"name": "lion"})),
    ]
    assert [[change.kind for change in some] for some in found] == [["shape"]] * 4
    assert resume.changes(averaged, make_config(train={"ema_decay": 0.99}))[0].kind == "mathematics"
    assert resume.changes(BASE, make_config(train={"spike_window": 9}))[0].kind == "mathematics"


def test_what_changes_the_mathematics_stops_unless_allowed_by_name():
    found = resume.changes(BASE, make_config(optimizer={"learning_rate": 0.5}, seed=3, train={"keep": 9}))
    with pytest.raises(UserError) as caught:
        resume.check_changes(found, ["seed"], "X has")
    assert str(caught.value) == (
        "X has another config: optimizer.learning_rate 0.001 -> 0.5; undo that, choose another `out`, "
        'or go on all the same with "allow_changes=[optimizer.learning_rate]"'
    )
    with pytest.raises(UserError, match=r"seed 0 -> 3, optimizer.* \"allow_changes=\[seed,optimizer.learning_rate\]\""):
        resume.check_changes(found, [], "X has")
    resume.check_changes(found, ["seed", "optimizer.learning_rate"], "X has")


def test_another_shape_is_refused_even_if_it_is_allowed():
    found = resume.changes(BASE, make_config(model={"hidden_size": 16}))
    with pytest.raises(UserError, match=r"another model or optimiser: model.hidden_size 8 -> 16; .* other shapes"):
        resume.check_changes(found, ["model.hidden_size"], "X has")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optimizer.learning_rat", "did you mean optimizer.learning_rate"),
        ("learning_rate", "did you mean optimizer.learning_rate"),
        ("mesh", "did you mean mesh.data or mesh.fsdp or mesh.tensor"),
        ("allow_changes", "no field"),
        ("???", "write section.field"),
    ],
)
def test_a_name_that_is_no_field(name, hint):
    with pytest.raises(UserError, match=f"allow_changes: .*{hint}"):
        resume.check_allowed_names([name])
    resume.check_allowed_names(["seed", "optimizer.learning_rate", "model.rope_scaling"])


def test_an_older_config_means_the_same():
    tree = config_json(BASE)
    tree["data"]["sources"] = ["builtin"]
    tree["model"]["remat"] = True
    for section, field in (("train", "keep_best"), ("train", "save_minutes"), ("optimizer", "schedule")):
        del tree[section][field]
    del tree["metrics"], tree["allow_changes"]
    assert resume.changes(resume.read_config(tree, "old"), BASE) == []
    with pytest.raises(UserError, match=r"old: train.pace: unknown key; .* newer version"):
        resume.read_config(tree | {"train": {"steps": 5, "pace": 1}}, "old")


def test_every_field_of_the_tables_exists():
    names = [*resume._FREE, *resume._ROUNDING, *resume._SHAPE, *resume._DATA]
    known = resume._field_names()
    assert all(any(field.startswith(name) for field in known) for name in names)
    assert all(name in known for name in names if not name.endswith("."))
