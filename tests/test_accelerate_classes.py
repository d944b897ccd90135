"""Classes that pickle, write or change their methods by themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from norm_patterns import Nested, counted, image
from torch import Tensor, nn
from torch.fx import symbolic_trace

import ebdiff


class Reducing(Nested):
    """Holds what cannot be pickled, and says how it is made again."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = (part for part in "a")

    def __reduce__(self) -> Any:
        return made_again, (type(self), self.state_dict())


class ReducingByProtocol(Reducing):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return made_again, (type(self), self.state_dict())


def made_again(kind: type[Nested], state: dict[str, Tensor]) -> Nested:
    model = kind()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", [Reducing, ReducingByProtocol])
def test_a_class_that_says_how_it_is_pickled_is_pickled_so(kind: type[Nested]) -> None:
    model = kind()
    nn.init.normal_(model.norm.weight)
    expected = model(image())
    ebdiff.accelerate(model, verbose=False)
    loaded, copied = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    assert (type(loaded), type(copied)) == (kind, type(model))
    assert torch.equal(loaded(image()), expected)
    with counted() as norms:
        torch.testing.assert_close(copied(image()), expected)
    assert norms == []
    ebdiff.restore(model)
    assert torch.equal(model(image()), expected)
    assert type(copy.deepcopy(nn.ModuleList([model]))[0]) is kind


def test_a_graph_module_is_left_as_it_compiles_its_own_forward() -> None:
    model: Any = symbolic_trace(Nested())
    expected = model(image())
    report = ebdiff.accelerate(model, verbose=False)
    assert report.left["norm"] == "Nested writes its methods itself (torch.fx)"
    for node in model.graph.nodes:
        if node.op == "output":
            with model.graph.inserting_before(node):
                node.args = (model.graph.call_function(torch.neg, node.args),)
    model.recompile()
    assert torch.equal(model(image()), -expected)


def test_called_again_it_takes_in_what_the_class_has_become(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Nested):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x))

    def other(self: Own, x: Tensor) -> Tensor:
        return 3 * self.act(self.norm(x))

    def neither(self: Own, x: Tensor) -> Tensor:
        return self.norm(x)

    model = Own()
    for forward in (Own.forward, other, neither):
        monkeypatch.setattr(Own, "forward", forward)
        assert ebdiff.accelerate(model, verbose=False).norms == (forward is not neither)
        torch.testing.assert_close(model(image()), forward(model, image()))
    assert type(model) is Own
