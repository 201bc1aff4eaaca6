"""Teachers follow their students: the multi-tensor update against the plain one of the reference."""

import pytest
import torch

from tests.tiny import tiny_options
from xkd_fast import reference
from xkd_fast.engine.ema import Teachers


def moved_students(variant, dtype):
    """A model whose students have left their teachers."""
    torch.manual_seed(0)
    model = reference.XKD(tiny_options(variant=variant)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_student." in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def update(model):
    pairs = [(model.student(modality), model.teacher(modality)) for modality in ("video", "audio")]
    return Teachers(*pairs)


@pytest.mark.parametrize("variant", ["xkd", "mas", "mats"])
def test_update_equals_the_reference(variant):
    """MATS's stack moved twice or by one momentum, swapped modalities, or a head left behind."""
    ours, plain = moved_students(variant, torch.float64), moved_students(variant, torch.float64)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    teachers = update(ours)
    for momenta in ((0.9, 0.8), (0.99, 0.7)):
        teachers(*momenta)
        reference.update_teachers(plain, *momenta)
    for (name, tensor), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-15, msg=name)
        moves = "_teacher." in name and "prototype_scale" not in name
        assert torch.equal(tensor, before[name]) is not moves, name


def test_momentum_1_keeps_the_teachers_and_0_makes_them_students():
    """The ends of the momentum's range."""
    model = moved_students("xkd", torch.float32)
    before = [parameter.clone() for parameter in model.video_teacher.parameters()]
    update(model)(1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.video_teacher.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(model.audio_student.parameters(), model.audio_teacher.parameters(), strict=True)
    )


def test_float32_teachers_follow_at_the_last_momenta_of_a_run():
    """An update that underflows, as one in bfloat16 does at 1 − m < 2⁻⁸."""
    model = moved_students("xkd", torch.float32)
    name = "encoder.blocks.0.fc1.weight"
    teacher, student = (getattr(model, f"video_{role}").get_parameter(name) for role in ("teacher", "student"))
    distance = (teacher - student).norm()
    teachers = update(model)
    for _ in range(100):
        teachers(0.9999, 0.9999)
    assert ((teacher - student).norm() / distance).item() == pytest.approx(0.9999**100, abs=1e-4)
    assert teacher.dtype == torch.float32 and not teacher.requires_grad
