"""The teacher: how it moves, what it never does."""

from collections.abc import Callable

import pytest
import torch

from triptych.models.mplug import MPlug
from triptych.objectives.momentum import MomentumTeacher

Make = Callable[..., MPlug]


def shift(model: MPlug) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) + 0.5)


def test_it_starts_as_a_copy(make_model: Make) -> None:
    model = make_model()
    teacher = MomentumTeacher(model)
    theirs = dict(model.named_parameters())
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert parameter is not theirs[name]
    assert teacher.momentum == 0.995


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.995, 1.0])
def test_every_parameter_follows_by_the_formula(momentum: float, make_model: Make) -> None:
    model = make_model()
    teacher = MomentumTeacher(model, momentum)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        shift(model)
        for name, parameter in model.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * parameter.detach()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        teacher.update(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), "the model itself must not move"
    found = dict(teacher.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name].detach(), wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_a_frozen_part_keeps_its_first_values_and_all_else_moves(make_model: Make) -> None:
    model = make_model()
    teacher = MomentumTeacher(model, 0.5, frozen=("fusion", "text.embeddings"))
    first = {name: parameter.clone() for name, parameter in teacher.model.named_parameters()}
    shift(model)
    teacher.update(model)
    stayed = {name for name, parameter in teacher.model.named_parameters() if torch.equal(parameter, first[name])}
    assert stayed == {name for name in first if name.startswith(("fusion.", "text.embeddings."))}
    assert any(name.startswith("text.blocks.") for name in first.keys() - stayed)


def test_a_frozen_part_must_exist(make_model: Make) -> None:
    with pytest.raises(ValueError, match="no part called fuse, visio to keep frozen"):
        MomentumTeacher(make_model(), frozen=("fuse", "fusion", "visio"))


def test_it_gets_no_gradient(make_model: Make) -> None:
    model = make_model()
    teacher = MomentumTeacher(model)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    pixels_BCHW = torch.randn(1, 3, 16, 16, requires_grad=True)
    teacher.model.encode_image(pixels_BCHW).hidden_BLD.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("dropout", [False, True])
def test_it_evaluates_unless_dropout_is_asked_for(dropout: bool, make_model: Make) -> None:
    model = make_model(dropout=0.5).train()
    teacher = MomentumTeacher(model, dropout=dropout)
    ids_BL = torch.randint(0, 40, (2, 6))
    holder = torch.nn.ModuleList([teacher])
    for mode in (True, False, True):
        holder.train(mode)
        assert all(module.training == (mode and dropout) for module in teacher.modules())
        first, second = (teacher.model.encode_text(ids_BL).hidden_BLD for _ in range(2))
        assert torch.equal(first, second) != (mode and dropout)
    assert model.training


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_momentum_must_be_a_share(momentum: float, make_model: Make) -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        MomentumTeacher(make_model(), momentum)
