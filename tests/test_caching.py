"""What factories remember is forgotten when a process is crowded, and nothing in use breaks by
it."""

import jax.numpy as jnp
import pytest

from jaxbd import caching
from jaxbd.training.program import Program


@pytest.fixture
def crowded(monkeypatch):
    """Nine of ten mappings are in use."""
    monkeypatch.setattr(caching, "mappings", lambda: (9, 10))


def made(made_of: list):
    @caching.cached(2)
    def factory(number: int):
        made_of.append(number)
        return Program(lambda x: x + number)

    return factory


def test_remembers_until_told_to_forget():
    made_of = []
    factory = made(made_of)
    assert factory(1) is factory(1)
    caching.forget()
    factory(1)
    assert made_of == [1, 1]


def test_keeps_the_last_results_only():
    made_of = []
    factory = made(made_of)
    for number in (1, 2, 3, 1):
        factory(number)
    assert made_of == [1, 2, 3, 1]


def test_a_crowded_process_forgets_before_it_compiles(crowded):
    made_of = []
    factory = made(made_of)
    program = factory(1)
    assert float(program(jnp.zeros(()))) == 1  # compiles, and so forgets
    assert factory(1) is not program
    assert float(program(jnp.ones(()))) == 2  # what is in use goes on
    assert program.traces == 1


def test_a_process_with_room_keeps_everything():
    count, most = caching.mappings()
    assert count <= caching.CROWDED * most
    assert not caching.relieve()


def test_a_system_that_does_not_tell_is_never_crowded(monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "_LIMIT", tmp_path / "none")
    assert caching.mappings() == (0, 0)
    assert not caching.relieve()


@pytest.mark.skipif(not caching.mappings()[1], reason="the system does not tell")
def test_forgetting_frees_the_mappings_of_programs():
    factory = made([])
    for number in range(20):  # the last two are remembered
        factory(number)(jnp.zeros(()))
    held = [factory(number) for number in (18, 19)]
    full, _ = caching.mappings()
    del held
    caching.forget()
    assert caching.mappings()[0] < full
