"""What trainers leave on a model beside its parameters: wrapped forwards, hooks, modes, marks."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Dictionaries of `nn.Module` that hold what a model consists of. Adapters are added to them while a run goes on.
_STRUCTURE = ("_parameters", "_buffers", "_modules")


class ModelState:
    """Attributes, hooks, modes and trainability of every module of a model, as they are now.

    A trainer wraps the model's forward in autocast, patches a fused head onto it, enables gradient checkpointing with
    hooks on the embeddings, and marks the model as prepared. All of it outlives the trainer, so the next one would not
    find the model that the first one found.

    Args:
        model (`nn.Module`): the model. Parameters and buffers are not copied.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.record()

    def record(self) -> None:
        """Take the model as it is now for its state."""
        model = self._model
        self._modules = [(weakref.ref(module), _attributes(module)) for module in model.modules()]
        self._trainable = [(weakref.ref(parameter), parameter.requires_grad) for parameter in model.parameters()]
        configs = (getattr(model, name, None) for name in ("config", "generation_config"))
        self._configs = [(config, dict(vars(config))) for config in configs if config is not None]

    def restore(self) -> None:
        """Put everything back. Modules and parameters that were added since are left alone."""
        for reference, attributes in self._modules:
            module = reference()
            if module is not None:
                _restore_attributes(module, attributes)
        for reference, requires_grad in self._trainable:
            parameter = reference()
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
        for config, values in self._configs:
            for name in set(vars(config)) - set(values):
                delattr(config, name)
            vars(config).update(values)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state holds when the block begins and again when it ends, also after an exception."""
        self.restore()
        try:
            yield
        finally:
            self.restore()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: (value, dict(value)) if _is_hooks(name, value) else (value, None)
        for name, value in vars(module).items()
        if name not in _STRUCTURE
    }


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(module)
    for name in set(own) - set(attributes) - set(_STRUCTURE):
        del own[name]
    for name, (value, content) in attributes.items():
        own[name] = value
        if content is not None:
            # In place: the handles that remove hooks refer to the dictionary itself.
            value.clear()
            value.update(content)


def _is_hooks(name: str, value: Any) -> bool:
    return "hooks" in name and isinstance(value, dict)
