"""ARGD: its losses and its update beside PyTorch's, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_dhbe
import torch_distill
import toys

from jaxbd.base import Batch, Problem, RepairData, UserError
from jaxbd.models import build
from jaxbd.repairs import argd, argd_losses, attention

SHAPE = (8, 8, 3)
SPEC = build.Spec(arch="cnn", classes=4, image_shape=SHAPE, options={"width": 3, "stages": 2})
NET, NET64 = build.net(SPEC), build.net(dataclasses.replace(SPEC, dtype="float64"))
SETTINGS = dict(weights=(20.0, 50.0), edge_weight=3.0, embedding_weight=40.0, embedding_dim=5)


def maps(seed: int, count: int = 6, sides=(8, 4, 2)) -> list:
    """Random attention maps in float64; call with `jax.enable_x64`."""
    rng = np.random.default_rng(seed)
    return [
        attention.attention_map(jnp.asarray(rng.normal(size=(count, side, side, 3))))
        for side in sides
    ]


def as_torch(found) -> list[torch.Tensor]:
    return [torch.tensor(np.asarray(each))[:, None] for each in found]


def test_nodes_edges_and_embedding_are_those_of_pytorch():
    with jax.enable_x64(True):
        student, teacher = maps(0), maps(1)
        embedding = argd_losses.start_embedding(jax.random.key(0), 3, 5)
        both = as_torch(student), as_torch(teacher)
        expected = torch_distill.nodes(*both, (2.0, 5.0, 3.0))
        ours = attention.attention_distance(student, teacher, (2.0, 5.0, 3.0))
        np.testing.assert_allclose(ours, expected, rtol=1e-10)
        ours = argd_losses.edge_loss(student, teacher)
        np.testing.assert_allclose(ours, torch_distill.edges(*both), rtol=1e-10)
        expected = torch_distill.Embedding(3, 5).load(embedding)(*both)
        ours = argd_losses.embedding_loss(embedding, student, teacher)
        np.testing.assert_allclose(ours, expected.detach(), rtol=1e-10)


def test_pooling_is_that_of_pytorch_up_and_down():
    with jax.enable_x64(True):
        values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)))
        for size in ((3, 2), (7, 5), (14, 9)):
            expected = torch.nn.functional.adaptive_avg_pool2d(
                torch.tensor(np.asarray(values)), size
            )
            np.testing.assert_allclose(attention.pool(values, size), expected, rtol=1e-12)


def test_the_shares_of_the_students_maps_add_up_to_one():
    embedding = argd_losses.start_embedding(jax.random.key(0), 3, 5)
    shares = argd_losses.relate(embedding, maps(0), maps(1))
    assert shares.shape == (6, 3, 3)
    np.testing.assert_allclose(shares.sum(2), 1, rtol=1e-5)
    assert shares.std() > 0.01


def test_one_layer_has_no_edges():
    assert argd_losses.edge_loss(maps(0)[:1], maps(1)[:1]) == 0


@pytest.mark.parametrize("preset", [argd.released, argd.paper])
def test_one_update_of_the_student_is_that_of_pytorch(preset):
    """The embedding learns with the student as in the paper, or stays, as released."""
    config = preset(crop_padding=0, flip=False, **SETTINGS)
    made = argd.make(Problem(NET64, SHAPE, 4), config)
    twin = lambda variables: torch_dhbe.load(torch_dhbe.Student(4, 3, 3), variables)
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        drawn = Batch(
            jnp.asarray(rng.uniform(size=(6, *SHAPE))), jnp.arange(6, dtype=jnp.int32) % 4
        )
        suspect, other = (toys.widen(jax.jit(NET.init)(jax.random.key(n))) for n in (0, 1))
        state = made.init(jax.random.key(0), suspect, RepairData(drawn))
        state = made.phases[1].begin(state._replace(teacher=other))
        student, teacher = twin(suspect), twin(other)
        embedding = torch_distill.Embedding(2, 5).load(state.relation)
        after, info = jax.jit(made.phases[1].step)(jax.random.key(2), state, drawn)

        def distance(own, wanted):
            weighted = torch_distill.nodes(own, wanted, (20.0, 50.0))
            weighted = weighted + 3.0 * torch_distill.edges(own, wanted)
            return weighted + 40.0 * embedding(own, wanted)

        images = torch.tensor(np.asarray(drawn.images)).permute(0, 3, 1, 2)
        labels = torch.tensor(np.asarray(drawn.labels)).long()
        learned = config.embedding == "learned"
        more = embedding.parameters() if learned else ()
        expected = torch_distill.update(
            student, teacher, images, labels, distance, rate=0.1, decay=1e-4, more=more
        )
        np.testing.assert_allclose(info[:2], expected, rtol=1e-9)
        torch_distill.assert_same(twin(after.student), student)
        torch_distill.assert_same(torch_distill.Embedding(2, 5).load(after.relation), embedding)
        moved = [
            (a != b).any()
            for a, b in zip(*map(jax.tree.leaves, (after.relation, state.relation)), strict=True)
        ]
        assert any(moved) == learned


def test_presets_part_where_paper_and_code_do():
    paper, released = argd.paper(), argd.released()
    assert (paper.embedding, released.embedding) == ("learned", "random")
    assert paper.epochs == released.epochs == 10


def test_a_net_without_layers_is_refused():
    made = argd.make(Problem(toys.NET, toys.SHAPE, 4), argd.Config())
    with pytest.raises(UserError, match=r"argd: a net made from a bare apply .* such as ft-sam"):
        made.init(jax.random.key(0), toys.victim(1), RepairData(toys.quadrants(0, 8, np.float32)))


@pytest.mark.parametrize(
    "change",
    [
        dict(weights=()),
        dict(weights=(-1.0,)),
        dict(edge_weight=float("nan")),
        dict(embedding_weight=-1.0),
        dict(embedding_dim=0),
        dict(embedding="sideways"),
        dict(power=0.0),
        dict(learning_rate=0.0),
        dict(teacher_epochs=0),
        dict(milestones=(0.6, 0.3)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_bad_values_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"argd: .*{next(iter(change))}"):
        argd.Config(**change)
