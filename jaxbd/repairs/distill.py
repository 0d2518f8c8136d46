"""Distillation of a fine-tuned teacher's attention into the suspect, shared by NAD and ARGD."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Key,
    Net,
    Phase,
    Problem,
    Repair,
    RepairData,
    Variables,
)
from jaxbd.images import to_float
from jaxbd.repairs import attention, tuning


class Settings(Protocol):
    """Settings common to both methods; see their `Config`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def power(self) -> float: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def milestones(self) -> tuple[float, ...]: ...
    @property
    def teacher_steps(self) -> int: ...
    @property
    def teacher_milestones(self) -> tuple[float, ...]: ...
    @property
    def crop_padding(self) -> int: ...
    @property
    def flip(self) -> bool: ...


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32, counted over both phases.
      student, teacher: variables; both start as the suspect's.
      opt: optimiser state of the net in training.
      relation: parameters of the distance; {} if it has none.
      relation_opt: optimiser state of `relation`.
    """

    step: Array
    student: Variables
    teacher: Variables
    opt: optax.OptState
    relation: ArrayTree
    relation_opt: optax.OptState


class TeacherInfo(NamedTuple):
    """Info of the phase that trains the teacher: loss [] in nats and accuracy [] on the batch."""

    loss: Array
    accuracy: Array


class Info(NamedTuple):
    """Info of the phase that trains the student, all [] on the batch: cross-entropy in nats,
    weighted distance of its attention from the teacher's, and accuracy."""

    loss: Array
    distance: Array
    accuracy: Array


class Distance(NamedTuple):
    """Distance between the student's and the teacher's attention.

    Attributes:
      init: (key, number of layers) -> relation, its parameters.
      measure: (relation, student's maps, teacher's maps) -> [] weighted; maps [B, H, W] per layer.
      is_trained: whether the parameters are trained with the student.
    """

    init: Callable[[Key, int], ArrayTree]
    measure: Callable[[ArrayTree, list[Array], list[Array]], Array]
    is_trained: bool = False


def rules(config: Settings) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """SGD with Nesterov momentum for the teacher's phase, and for the student's."""
    teacher, student = (
        tuning.step_down(config.learning_rate, num_steps, milestones)
        for num_steps, milestones in (
            (config.teacher_steps, config.teacher_milestones),
            (config.num_steps, config.milestones),
        )
    )
    sgd = lambda rate: tuning.sgd(rate, config.momentum, config.weight_decay, nesterov=True)
    return sgd(teacher), sgd(student)


def assemble(problem: Problem, config: Settings, distance: Distance, method: str) -> Repair:
    """A repair with two phases: "teacher" fine-tunes a copy of the suspect, "student" trains the
    suspect itself on labels and on the teacher's attention.

    Raises: UserError from `init` when the net shows no layer with spatial positions.
    """
    net = problem.net
    teacher_rule, student_rule = rules(config)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        images = to_float(data.clean.images[:2])
        layers = attention.count_layers(net, variables, images, method)
        # copies, since drivers donate the state
        student, teacher = (
            jax.tree.map(jnp.copy, {"batch_stats": {}, **variables}) for _ in range(2)
        )
        relation, opt = distance.init(key, layers), teacher_rule.init(teacher["params"])
        relation_opt = student_rule.init(relation)
        return State(jnp.zeros((), jnp.int32), student, teacher, opt, relation, relation_opt)

    def train_teacher(key: Key, state: State, batch: Batch) -> tuple[State, TeacherInfo]:
        batch = tuning.vary(key, batch, config)
        teacher, opt, loss, accuracy = losses.descend(
            net, teacher_rule, state.teacher, state.opt, batch
        )
        after = state._replace(step=state.step + 1, teacher=teacher, opt=opt)
        return after, TeacherInfo(loss, accuracy)

    def begin(state: State) -> State:
        # `opt` held the state of the teacher's optimiser
        return state._replace(opt=student_rule.init(state.student["params"]))

    def train_student(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        batch = tuning.vary(key, batch, config)
        return student_step(net, student_rule, distance, config.power, state, batch)

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.student

    phases = (
        Phase("teacher", train_teacher, config.teacher_steps, TeacherInfo),
        Phase("student", train_student, config.num_steps, Info, begin=begin),
    )
    return Repair(init, phases, extract)


def student_loss(
    trained: tuple[ArrayTree, ArrayTree],
    variables: Variables,
    net: Net,
    distance: Distance,
    power: float,
    batch: Batch,
    wanted: list[Array],
) -> tuple[Array, tuple[Array, Array, Array, ArrayTree]]:
    """Cross-entropy plus weighted distance; Li et al. 2021, section 3, the overall loss.

    Args:
      trained: the params of the student and of the distance; variables: the student's other
        variables.
      wanted: the teacher's maps.
    Returns: (loss [], (cross-entropy [], distance [], logits [B, K], new batch_stats)).
    """
    params, relation = trained
    logits, stats, outputs = attention.show_training(
        net, {**variables, "params": params}, batch.images
    )
    entropy = losses.cross_entropy(logits, batch.labels)
    apart = distance.measure(relation, attention.attention_maps(outputs, power), wanted)
    apart = apart.astype(entropy.dtype)
    return entropy + apart, (entropy, apart, logits, stats)


def student_step(
    net: Net,
    rule: optax.GradientTransformation,
    distance: Distance,
    power: float,
    state: State,
    batch: Batch,
) -> tuple[State, Info]:
    """One update of the student, and of the distance's parameters if they are trained. The teacher
    is frozen and runs in evaluation."""
    assert net.outputs is not None, "init refuses nets without"
    wanted = attention.attention_maps(net.outputs(state.teacher, batch.images)[1], power)
    trained: Any = (state.student["params"], state.relation)
    (_, (entropy, apart, logits, stats)), gradient = jax.value_and_grad(student_loss, has_aux=True)(
        trained, state.student, net, distance, power, batch, wanted
    )
    updates, opt = rule.update(gradient[0], state.opt, trained[0])
    params = optax.apply_updates(trained[0], updates)
    relation, relation_opt = state.relation, state.relation_opt
    if distance.is_trained:
        updates, relation_opt = rule.update(gradient[1], relation_opt, relation)
        relation = optax.apply_updates(relation, updates)
    student = {**state.student, "params": params, "batch_stats": stats}
    after = state._replace(
        step=state.step + 1, student=student, opt=opt, relation=relation, relation_opt=relation_opt
    )
    accuracy = (logits.argmax(-1) == batch.labels).mean()
    return after, Info(entropy, apart, accuracy)
