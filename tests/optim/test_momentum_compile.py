"""MomentumSAM and torch.compile: every way to compile a model trains to eager's bits, and compiles it once."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.optim.momentum import same
from tests.optim.nets import Net, X, clean_copy, loss_of, optimizer_of, train, trained
from tests.optim.tagger import assert_shows_clean

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_compiler"),
    # Which torch.compile would ignore, had pytest not reset the filters of warnings.
    pytest.mark.filterwarnings("ignore:Using `torch.compile.*global hooks"),
]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Own(nn.Module):
    """`Net` without containers of PyTorch's own, which compiled modules do not look into."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.first, self.second, self.head = net.body[0], net.body[2], net.head

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def by_wrapper(model, **options):
    return torch.compile(model, **options)


def in_a_function(model, **options):
    return torch.compile(lambda x: model(x), **options)


def in_place(model, **options):
    model.compile(**options)
    return model


WAYS = {
    "wrapper": (by_wrapper, {}),
    "wrapper_fullgraph": (by_wrapper, {"fullgraph": True}),
    "function": (in_a_function, {}),
    "in_place": (in_place, {}),
    "in_place_fullgraph": (in_place, {"fullgraph": True}),
}
every_way = pytest.mark.parametrize(("compiled", "options"), WAYS.values(), ids=WAYS.keys())


@every_way
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another optimizer"])
def test_compiled_model_trains_to_eager_bits_and_is_compiled_once(compiled, options, others):
    kept = [optimizer_of(nn.Linear(3, 3)) for _ in range(others)]
    model, twin, counter = Own(), Own(), CompileCounter()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    run = compiled(model, backend=counter, **options)
    counts = []
    for _ in range(6):
        train(run, optimizer, 1)
        train(twin, straight, 1)
        counts.append(counter.frame_count)
    assert same(model.parameters(), twin.parameters())
    assert counts[0] >= 1
    assert len(set(counts)) == 1
    assert not any(other.perturbed for other in kept)
    run(X)
    assert_shows_clean(model, optimizer)


@pytest.mark.parametrize("compiled", [by_wrapper, in_a_function, in_place])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_model_compiled_in_any_way_trains_with_perturb_by_hand(compiled, fullgraph):
    kept = optimizer_of(nn.Linear(3, 3))
    model, twin, counter = Own(), Own(), CompileCounter()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    run = compiled(model, backend=counter, fullgraph=fullgraph)
    for _ in range(6):
        optimizer.zero_grad()
        optimizer.perturb()
        loss_of(run).backward()
        optimizer.step()
    train(twin, straight, 6)
    assert same(model.parameters(), twin.parameters())
    assert counter.frame_count == 1
    assert not kept.perturbed


def test_function_compiled_as_one_graph_is_not_trained_without_perturb_by_hand():
    model = Own()
    optimizer = optimizer_of(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ForwardWatch"):
        train(in_a_function(model, backend="eager", fullgraph=True), optimizer)


@every_way
def test_compiled_model_of_somebody_else_is_compiled_as_without_the_optimizer(compiled, options):
    """A teacher, or a discriminator: not one more graph, no break, and no compilation at each step."""
    teacher, counter = Own(), CompileCounter()
    run = compiled(teacher, backend=counter, **options)
    model = Net()
    optimizer = optimizer_of(model)
    expected = Own()(X)
    for _ in range(6):
        optimizer.zero_grad()
        out = run(X)
        assert torch.equal(out, expected)
        (loss_of(model) + out.mean()).backward()
        optimizer.step()
    assert counter.frame_count == 1


@every_way
def test_evaluation_of_a_compiled_model_sees_clean_weights(compiled, options):
    model = Own()
    optimizer = optimizer_of(model)
    run = compiled(model, backend="eager", **options)
    train(run, optimizer)
    expected = clean_copy(model, Own)(X)
    run(X)
    assert optimizer.perturbed
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(X), expected)
    model.train()
    assert optimizer.perturbed
    optimizer.eval()
    assert torch.equal(run(X), expected)


@pytest.mark.parametrize("teacher_first", [False, True])
def test_student_and_teacher_through_one_compiled_function(teacher_first):
    """The graph of the first one is then tried for the second one."""
    student, teacher, twin = Own(), Own(), Own()
    optimizer, straight = optimizer_of(student), optimizer_of(twin)
    run = torch.compile(lambda model, x: model(x), backend="eager")
    expected = Own()(X)
    if teacher_first:
        run(teacher, X)
    for _ in range(4):
        train(lambda x: run(student, x), optimizer, 1)
        assert torch.equal(run(teacher, X), expected)
    train(twin, straight)
    assert same(student.parameters(), twin.parameters())


def test_parts_that_are_compiled_one_by_one_train_to_eager_bits():
    model, twin = Net(), Net()
    optimizer, straight = optimizer_of(model), optimizer_of(twin)
    for layer in (model.body[0], model.body[2], model.head):
        layer.compile(backend="eager")
    train(model, optimizer)
    train(twin, straight)
    assert same(model.parameters(), twin.parameters())


def test_state_dict_of_the_compiled_wrapper_shows_clean_weights():
    model, optimizer = trained()
    wrapper = torch.compile(model, backend="eager")
    expected = {f"_orig_mod.{name}": value.clone() for name, value in model.state_dict().items()}
    wrapper(X)
    shown = wrapper.state_dict()
    assert shown.keys() == expected.keys()
    assert all(torch.equal(shown[name], value) for name, value in expected.items())
    assert not torch.equal(model.head.weight, expected["_orig_mod.head.weight"])
    optimizer.restore()


@pytest.mark.slow
def test_training_of_a_compiled_model_prints_no_warning(tmp_path):
    """torch warns of hooks that see both its wrapper and the model, which is as it should be."""
    code = """
        import torch
        from fsam_triton import MomentumSAM
        model = torch.nn.Linear(3, 3)
        compiled = torch.compile(model, backend="eager")
        optimizer = MomentumSAM(compiled.parameters())
        for _ in range(3):
            compiled(torch.ones(3)).sum().backward()
            optimizer.step()
        compiled(torch.ones(3))
        assert optimizer.perturbed
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr


def test_filters_of_others_go_before_that_one():
    model = Own()
    optimizer = optimizer_of(model)
    run = by_wrapper(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="global hooks"):
            train(run, optimizer)
